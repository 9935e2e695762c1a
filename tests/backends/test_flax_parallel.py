"""Flax models cut across devices and processes, against the whole model: answers, shares, bytes, sums, gradients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_samples import write_sample_adapter

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.config.schema import schema
from gptj.errors import InputError
from gptj.parity.revealing import revealing_fill
from gptj.sharding import Mesh
from gptj.sharding.plan import Work
from gptj.sharding.traffic import list_collectives

WORKER = Path(__file__).parents[1] / "support" / "parallel_flax.py"
CONFIG = GPTJConfig(vocab_size=96, n_positions=32, n_embd=64, n_layer=3, n_head=4, rotary_dim=8,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
NUMBERS = sum(row.size for row in schema(CONFIG))


def environment(devices: int, **variables: Any) -> dict[str, str]:
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_X64": "0",
    } | {name: str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cut") / "model", CONFIG, revealing_fill(0))


CUT = ("tp:1:4", "tp:2:2", "tp_fsdp:2:2", "fsdp:4:1", "dp:4:1")


@pytest.fixture(scope="module")
def found(model_folder, tmp_path_factory) -> dict[str, Any]:
    saved = tmp_path_factory.mktemp("saved")
    write_sample_adapter(saved / "adapter", "all", config=CONFIG)
    words = [sys.executable, WORKER, model_folder, saved, *CUT]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment(4), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.parametrize("words", CUT)
def test_a_model_on_four_devices_is_the_whole_one(found, words):
    facts, parts = (
        found[words],
        1 if words.startswith("dp") else int(words[-1]) * (int(words[-3]) if "fsdp" in words else 1),
    )
    assert facts["held"] == facts["table"]
    assert sum(facts["held"]) <= NUMBERS * (1 / parts + 0.01) + 16 * CONFIG.n_embd * CONFIG.n_layer
    assert facts["difference"] <= 2e-5 and facts["gradients"] <= 1e-5
    assert abs(facts["loss"][0] - facts["loss"][1]) <= 1e-5
    assert facts.get("tokens", [True, True]) == [True, True]
    assert facts.get("restored", True) and facts["folder"] and facts["held in a folder's writing"] <= 2


def test_each_device_computes_its_own_rows_and_an_uneven_batch_is_refused(found):
    facts = found["dp:4:1"]
    assert facts["rows"] == [1, CONFIG.n_head] and facts["scores"] <= 2e-5
    assert all("batch: cannot be cut into 4 equal parts" in one for one in facts["refused"])


@pytest.mark.parametrize("words", ("tp:1:4", "tp:2:2", "dp:4:1"))
def test_an_adapter_is_cut_as_the_matrices_beside_it(found, words):
    facts = found[words]
    assert facts["moved"] > 1e-2 and facts["adapted_tokens"]
    assert max(facts[name] for name in ("adapted", "in training", "after")) <= 2e-5


@pytest.mark.parametrize("words", ("tp:1:4", "tp:2:2"))
def test_a_forward_pass_sums_once_a_block(found, words):
    sums = {"all-reduce": CONFIG.n_layer + 1, "all-to-all": 0, "collective-permute": 0, "most operands": 1}
    assert found[words]["sums"] == sums


@pytest.mark.parametrize("words", ("tp:1:4", "tp:2:2"))
def test_each_sum_is_of_the_bytes_that_the_formulas_say(found, words):
    """What attention and feed-forward made is added before it is summed: one buffer."""
    work = Work(batch=4, length=9)
    sums = next(iter(list_collectives(CONFIG, "tp", Mesh(tp=int(words[-1])), work)))  # whole rows were given
    buffers = found[words]["summed"]
    assert len(buffers) == sums.count and {size for one in buffers for size in one} == {sums.nbytes // sums.count}
    assert all(len(one) == 1 for one in buffers)


def test_two_processes_read_half_each_and_agree(model_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "saved").mkdir()
    write_sample_adapter(tmp_path / "saved" / "adapter", "all", config=CONFIG)
    words = [sys.executable, WORKER, model_folder, tmp_path / "saved", "tp:1:2", "tp_fsdp:1:2"]
    running = [
        subprocess.Popen(
            [*map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(1, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=n),
        )
        for n in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs[0][1][-3000:]
    facts = json.loads(outputs[0][0].splitlines()[-1])
    for found in facts.values():
        assert found["difference"] <= 2e-5 and found["gradients"] <= 1e-5
        assert found["read"] == 4 * sum(found["table"]) and found.get("adapted", 0) <= 2e-5
    assert facts["tp:1:2"]["tokens"] == [True, True] and facts["tp:1:2"]["one_draw"]


def test_more_devices_than_there_are_and_what_cannot_be_cut_are_refused(model_folder):
    import gptj.flax as gptj

    load = gptj.GPTJForCausalLM.from_pretrained
    with pytest.raises(InputError, match="devices"):
        load(model_folder, mesh=Mesh(tp=64), strategy="tp")
    with pytest.raises(InputError, match="no mesh"):
        load(model_folder, mesh="cpu", strategy="tp")
    with pytest.raises(InputError, match="two axes"):
        load(model_folder, strategy="tp_fsdp")
    with pytest.raises(InputError, match="cannot be prepared"):
        load(model_folder, strategy="tp", inference=True)
    with pytest.raises(InputError, match="on one device with inference=True"):
        load(model_folder, strategy="tp", quantize="int8")
