"""The formulas of `gptj.sharding.traffic` against the bytes that processes hand to their collectives; what else has its
processes there: a TPU checkpoint that is opened in parts, a vocabulary that the processes do not divide."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mesh_samples import write_mesh_sample

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_fill
from gptj.sharding import Mesh
from gptj.sharding.plan import Work
from gptj.sharding.traffic import list_collectives

WORKER = Path(__file__).parents[1] / "support" / "traffic_pt.py"
CONFIG = GPTJConfig(vocab_size=96, n_positions=32, n_embd=64, n_layer=3, n_head=4, rotary_dim=8,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
CASES = {
    2: ("forward:tp:1:2:float32:", "forward:tp:1:2:bfloat16:", "training:dp:2:1:float32:", "training:fsdp:2:1:float32:",
        "training:fsdp:2:1:bfloat16:", "training:fsdp:2:1:float32:recompute"),
    4: ("forward:tp:1:4:float32:", "forward:tp:2:2:float32:", "training:fsdp:4:1:float32:",
        "training:tp_fsdp:2:2:float32:", "training:tp_fsdp:2:2:float32:recompute"),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("traffic")
    folder = write_checkpoint(place / "model", CONFIG, revealing_fill(0))
    write_checkpoint(place / "model-odd", CONFIG.replace(vocab_size=98), revealing_fill(0))
    sample = write_mesh_sample(place / "run", shards=4, heads=4)
    facts: dict[str, Any] = {"sample": sample}
    for processes, cases in CASES.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words = map(str, (WORKER, folder, sample.path, sample.config_file, *cases))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        facts |= json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.parametrize("words", [*CASES[2], *CASES[4]])
def test_as_many_bytes_cross_as_the_formulas_say(found, words):
    verb, strategy, dp, tp, dtype, recompute = words.split(":")
    mesh = Mesh(dp=int(dp), tp=int(tp))
    # each process is given two rows
    work = Work(training=verb == "training", batch=2 * mesh.dp, length=8, dtype=dtype, recompute=bool(recompute))
    expected: dict[str, list[int]] = {}
    for one in list_collectives(CONFIG, strategy, mesh, work):
        count, nbytes = expected.get(one.kind, [0, 0])
        expected[one.kind] = [count + one.count, nbytes + one.nbytes]
    assert found[words] == expected


def test_a_tpu_checkpoint_is_opened_by_its_shards_and_computes_the_same(found):
    facts, width = found["tpu"], 16
    parameters = {name: values.size for name, values in found["sample"].tensors.items()}
    whole = [name for name in parameters if "ln_" in name or "fc_out.bias" in name]
    copies = sum(parameters[name] * (4 if "fc_out" in name else 1) for name in whole) + 4 * width
    cut = sum(size for name, size in parameters.items() if name not in whole)
    assert facts["read"] == 4 * (cut // 2 + copies)
    assert facts["difference"] <= 2e-5 and facts["tokens"]


def test_no_block_keeps_attention_weights_that_nobody_asks_for():
    """They would outgrow all else of a long prompt, and on several processes those of all heads would be gathered."""
    import gptj.pt as gptj

    model, kept = gptj.GPTJForCausalLM(CONFIG), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, given, made: kept.append(made[1]))
    assert model([[1, 2, 3]]).attentions is None and kept == [None] * CONFIG.n_layer
    assert [a.shape for a in model([[1, 2, 3]], output_attentions=True).attentions] == [(1, 4, 3, 3)] * CONFIG.n_layer


def test_the_plan_is_measured(tmp_path):
    """The benchmark's way alone: what a tiny model takes is lost in what torch does."""
    options = ["--shape", "tiny", "--processes", "2", "--dtype", "float32", "--only", "training fsdp", "--row", "8"]
    command = [sys.executable, "-m", "benchmarks.plan", "--directory", tmp_path, *options]
    done = subprocess.run(command, cwd=WORKER.parents[2], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert all(re.match(r"training fsdp dp=2 tp=1 float32 2 x 8.* planned, .* measured", line) for line in lines[:-1])
    assert len(lines) == 3 and lines[-1].startswith("worst"), done.stderr


@pytest.mark.parametrize("strategy", ["fsdp", "tp_fsdp"])
def test_a_vocabulary_that_dp_does_not_divide_is_trained_on(found, strategy):
    """As 6B's 50,400 on 64 devices, which cut nothing of it unevenly but the head's bias."""
    norm, expected = found[f"odd {strategy}"]
    assert abs(norm - expected) <= 1e-5 * expected
