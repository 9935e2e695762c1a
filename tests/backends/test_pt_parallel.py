"""PyTorch models cut across processes, against the whole model: answers, shares, bytes, sums, training, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from adapter_samples import write_sample_adapter

from gptj import GPTJConfig
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config.schema import schema
from gptj.errors import InputError, WriteError
from gptj.parity.revealing import revealing_fill
from gptj.sharding import Mesh

WORKER = Path(__file__).parents[1] / "support" / "parallel_pt.py"
CONFIG = GPTJConfig(vocab_size=96, n_positions=32, n_embd=64, n_layer=3, n_head=4, rotary_dim=8,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cut") / "model", CONFIG, revealing_fill(0))


def torchrun(processes: int, *words: Any, **options: Any) -> Any:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300, **options
    )


@pytest.fixture(scope="module")
def found(model_folder, tmp_path_factory) -> dict[str, Any]:
    """Four processes first, so that two, and one, read what they wrote."""
    place, facts = tmp_path_factory.mktemp("checkpoints"), {}
    write_sample_adapter(place / "adapter", "all", config=CONFIG)
    for processes, meshes in (
        (4, ("tp:1:4", "tp_fsdp:2:2")),
        (2, ("tp:1:2", "fsdp:2:1", "dp:2:1")),
        (1, ("fsdp:1:1",)),
    ):
        done = torchrun(processes, WORKER, model_folder, place, *meshes)
        assert done.returncode == 0, done.stderr[-3000:]
        facts |= json.loads(done.stdout.splitlines()[-1])
    return facts | {"place": place}


CUT = ("tp:1:4", "tp:1:2", "tp_fsdp:2:2", "fsdp:2:1")


@pytest.mark.parametrize("words", CUT)
def test_each_process_holds_and_reads_its_share_as_the_table_says(found, words):
    facts = found[words]
    whole = CONFIG_NUMBERS
    parts = int(words[-1]) * int(words[-3])
    assert facts["held"] == facts["table"]
    assert sum(facts["held"]) <= whole * (1 / parts + 0.01) + 16 * CONFIG.n_embd * CONFIG.n_layer
    assert facts["read"] == 4 * sum(facts["held"])


CONFIG_NUMBERS = sum(row.size for row in schema(CONFIG))


@pytest.mark.parametrize("words", ("tp:1:4", "tp:1:2"))
def test_answers_and_tokens_are_the_whole_models_after_one_sum_a_block(found, words):
    facts = found[words]
    assert facts["difference"] <= 2e-5 and facts["attentions"] <= 2e-5
    assert facts["tokens"] == [True, True] and facts["one_draw"]
    assert facts["all_reduces"] == CONFIG.n_layer + 1


@pytest.mark.parametrize("words", ("tp:1:4", "tp:1:2"))
def test_an_adapter_is_cut_as_the_matrices_beside_it(found, words):
    facts = found[words]
    assert facts["adapted"] <= 2e-5 and facts["after"] <= 2e-5 and facts["moved"] > 1e-2
    assert facts["adapted_tokens"]


@pytest.mark.parametrize("words", ("tp_fsdp:2:2", "fsdp:2:1", "fsdp:1:1", "dp:2:1"))
def test_training_is_that_of_one_process(found, words):
    facts = found[words]
    for name in ("loss", "norm"):
        mine, expected = facts[name]
        assert abs(mine - expected) <= 1e-5 * abs(expected), name
    assert facts["gradients"] <= 1e-5  # of the largest of each tensor


def test_a_loss_is_made_of_parts_of_the_vocabulary(found):
    facts = found["tp_fsdp:2:2"]
    assert facts["no_logits"] and not facts["logits_gathered"]
    assert facts["loss_in_float64"] <= 1e-9


def test_a_checkpoint_is_bit_for_bit_the_same_on_every_mesh(found):
    trained = ("tp_fsdp:2:2", "fsdp:2:1", "fsdp:1:1")
    saved = {f"step {words.replace(':', ' ')}": found[words]["saved"] for words in trained}
    for words in trained:
        loaded = found[words]["loaded"]
        assert "step tp_fsdp 2 2" in loaded
        assert loaded == {name: saved[name] for name in loaded}


def test_a_folder_that_cannot_be_written_ends_every_process_wait(found):
    assert found["tp_fsdp:2:2"]["refused"] and found["fsdp:2:1"]["refused"]


def test_a_folder_is_written_without_any_process_holding_the_model(found):
    folder = open_checkpoint(found["place"] / "saved tp_fsdp 2 2")
    assert folder.config.architecture_sha256 == CONFIG.architecture_sha256 and len(folder.tensors) == 3 * 10 + 5
    assert 1 <= found["tp_fsdp:2:2"]["whole at a time"] <= 2  # one, and the next while it is read


def test_a_checkpoint_whose_parts_lie_on_other_hosts_is_refused(model_folder, tmp_path, monkeypatch):
    import torch

    import gptj.pt as gptj
    from gptj.pt import parallel

    parallel.join_processes()
    try:
        model = gptj.GPTJForCausalLM.from_pretrained(model_folder, mesh=Mesh(), strategy="fsdp")
        real = parallel.checkpoint.save

        def save(state: Any, *, checkpoint_id: Any) -> None:
            real(state, checkpoint_id=checkpoint_id)
            next(Path(checkpoint_id).glob("*.distcp")).unlink()

        monkeypatch.setattr(parallel.checkpoint, "save", save)
        with pytest.raises(WriteError, match="all processes share"):
            parallel.save_training(tmp_path / "step", model, torch.optim.AdamW(model.parameters()), step=1)
        assert not (tmp_path / "step").exists()
    finally:
        parallel.leave_processes()


def test_a_lone_process_is_told_how_to_be_several(model_folder):
    import gptj.pt as gptj

    with pytest.raises(InputError, match="torchrun"):
        gptj.GPTJForCausalLM.from_pretrained(model_folder, strategy="tp")
    with pytest.raises(InputError, match="without a strategy"):
        gptj.GPTJForCausalLM.from_pretrained(model_folder, mesh=object())
    with pytest.raises(InputError, match="on one device with inference=True"):
        gptj.GPTJForCausalLM.from_pretrained(model_folder, strategy="tp", quantize="int8")


def test_the_command_says_the_same_on_two_processes_and_says_it_once(model_folder):
    words = (
        "generate",
        model_folder,
        "--token-ids",
        "1 2 3",
        "--max-new-tokens",
        "6",
        "--seed",
        "1",
        "--backend",
        "pt",
    )
    one = subprocess.run([sys.executable, "-m", "gptj", *map(str, words)], capture_output=True, text=True)
    two = torchrun(2, "-m", "gptj", *words, "--strategy", "tp")
    assert one.stdout and two.stdout == one.stdout, two.stderr[-2000:]


def test_a_process_that_dies_ends_the_others(model_folder, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys, gptj.pt as g\n"
        "from gptj.pt import parallel\n"
        "me = parallel.join_processes()\n"
        "m = g.GPTJForCausalLM.from_pretrained(sys.argv[1], strategy='tp')\n"
        "while True:\n"
        "    m.generate([[1, 2, 3]], max_new_tokens=4)\n"
        "    if me.rank: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    start = time.monotonic()
    done = torchrun(2, script, model_folder)
    assert done.returncode != 0 and time.monotonic() - start < 120
    assert signal.SIGKILL.name in done.stderr
