"""TensorFlow models cut across devices and processes, and copies that train, against the whole model on one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.config.schema import schema
from gptj.errors import InputError
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_fill
from gptj.sharding import Mesh

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "support" / "parallel_tf.py"
CONFIG = GPTJConfig(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4, rotary_dim=8,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 96, (4, 9))
NUMBERS = sum(row.size for row in schema(CONFIG))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cut") / "model", CONFIG, revealing_fill(0))


def free_addresses(count: int) -> list[str]:
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{free.getsockname()[1]}" for free in (first, second)][:count]


def start(words: tuple[Any, ...], **variables: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"} | {name: str(v) for name, v in variables.items()}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def start_clients(words: tuple[Any, ...]) -> list[subprocess.Popen[str]]:
    jobs = ",".join(free_addresses(2))
    return [start(words, DTENSOR_JOBS=jobs, DTENSOR_NUM_CLIENTS=2, DTENSOR_CLIENT_ID=n) for n in range(2)]


CUT = ("tp:1:4", "tp:2:2", "dp:2:1")


@pytest.fixture(scope="module")
def found(model_folder, tmp_path_factory) -> dict[str, Any]:
    """What one process with four devices found."""
    process = start((WORKER, "cut", model_folder, tmp_path_factory.mktemp("saved"), *CUT))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


@pytest.fixture(scope="module")
def copied(model_folder) -> dict[str, Any]:
    """What a process that trains copies found."""
    process = start((WORKER, "copies", model_folder))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


@pytest.mark.parametrize("words", CUT)
def test_a_model_on_several_devices_is_the_whole_one(found, words):
    facts, parts = found[words], int(words[-1])
    assert facts["layouts"] == facts["cuts"] and facts["held"] == facts["table"]
    assert sum(facts["held"]) <= NUMBERS * (1 / parts + 0.01) + 16 * CONFIG.n_embd * CONFIG.n_layer
    assert facts["difference"] <= 2e-5 and facts["scores"] <= 2e-5  # of three texts, whatever dp is
    assert facts["tokens"] == [True] * (4 if words == "tp:2:2" else 2) and facts["folder"]


@pytest.mark.parametrize("words", CUT)
def test_its_logits_are_the_oracles(found, words):
    fill = revealing_fill(0)
    rows = {row.name: row for row in schema(CONFIG)}
    mask = np.ones(IDS.shape, int)
    mask[1, :4] = 0
    expected = (
        Oracle(CONFIG, lambda name: fill(rows[name]))
        .forward(IDS, attention_mask=mask, head_mask=np.linspace(0, 1, 4))
        .logits
    )
    assert np.abs(np.array(found[words]["logits"]) - expected).max() <= 2e-5


@pytest.mark.parametrize("words", CUT)
def test_a_forward_pass_sums_once_a_block(found, words):
    sums = CONFIG.n_layer + 1 if "tp" in words else 0
    assert found[words]["sums"] == ({"CollectiveReduceV2": sums} if sums else {})


def test_the_cache_is_cut_as_the_model_is(found):
    assert found["tp:2:2"]["cache"] == ["dp", "tp", "unsharded", "unsharded"]
    assert found["dp:2:1"]["cache"] == ["dp", "unsharded", "unsharded", "unsharded"]


@pytest.mark.parametrize(
    "act", ("training", "use_cache", "past_key_values", "tf.function", "fit", "save_weights", "a gradient", "taps")
)
def test_what_a_cut_model_cannot_do_is_refused_by_name(found, act):
    assert act in found["tp:1:4"]["refused"][act]


def test_rows_that_dp_does_not_divide_are_refused(found):
    assert "batch: cannot be cut into 2 equal parts" in found["tp:2:2"]["refused"]["batch"]


@pytest.mark.parametrize("kind", ("causal_lm", "regression"))
def test_fit_over_copies_takes_the_step_of_one_device(copied, kind):
    copies = copied[kind]
    one, two = copies["results"]
    assert np.allclose(two, one, rtol=1e-5, atol=0) and copies["gradients"] <= 1e-5 and copies["moved"] > 10


def test_two_processes_read_half_each_and_agree(model_folder, tmp_path):
    running = start_clients((WORKER, "cut", model_folder, tmp_path, "tp:1:2"))
    outputs = [process.communicate(timeout=400) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs[0][1][-3000:]
    facts = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    for one in facts:
        assert one["agreed"] == 12345
        assert one["tp:1:2"]["difference"] <= 2e-5 and one["tp:1:2"]["tokens"] == [True, True]
        assert one["tp:1:2"]["layouts"] == one["tp:1:2"]["cuts"]
        assert one["tp:1:2"]["read"] == 4 * sum(one["tp:1:2"]["table"])
    assert facts[0]["tp:1:2"]["drawn"] == facts[1]["tp:1:2"]["drawn"]


def test_the_command_says_the_same_on_two_processes_and_says_it_once(model_folder):
    words = ("-m", "gptj", "generate", model_folder, "--token-ids", "1 2 3", "--max-new-tokens", "6", "--seed", "1")
    words += ("--backend", "tf")
    alone = start(words)
    expected, _ = alone.communicate(timeout=400)
    host, _, port = free_addresses(1)[0].partition(":")
    launched = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": host, "MASTER_PORT": port}
    running = [start((*words, "--strategy", "tp"), RANK=n, **launched) for n in range(2)]
    outputs = [process.communicate(timeout=400) for process in running]
    assert expected and [out for out, _ in outputs] == [expected, ""], outputs[0][1][-2000:]
    assert [process.returncode for process in running] == [0, 0]


def test_the_pages_loop_over_processes_is_one_processes_and_ends_with_the_first_that_dies(copied, model_folder):
    task = {"cluster": {"worker": free_addresses(2)}}
    running = [
        start((WORKER, "workers", model_folder, ROOT / "docs" / "scale.md"),
              TF_CONFIG=json.dumps(task | {"task": {"type": "worker", "index": n}}))
        for n in range(2)
    ]  # fmt: skip
    running[1].communicate(timeout=400)
    begin = time.monotonic()
    out, err = running[0].communicate(timeout=120)
    assert time.monotonic() - begin < 60 and running[0].returncode not in (0, None)
    lines = [line for line in err.splitlines() if "another process is gone" in line]
    assert len(lines) == 1, err[-3000:]
    step, fit = map(json.loads, out.splitlines()[:2])
    assert step["loss"] == pytest.approx(copied["one"]["loss"], rel=1e-5)
    assert step["weights"] == pytest.approx(copied["one"]["weights"], rel=1e-5)
    assert "MultiWorkerMirroredStrategy" in fit


def test_what_dtensor_has_not_and_what_the_launcher_left_out_is_refused(model_folder, monkeypatch):
    import gptj.tf as gptj
    from gptj.tf import parallel

    load = gptj.GPTJForCausalLM.from_pretrained
    with pytest.raises(InputError, match="devices"):
        load(model_folder, mesh=Mesh(tp=64), strategy="tp")
    with pytest.raises(InputError, match="no mesh"):
        load(model_folder, mesh="cpu", strategy="tp")
    for strategy in ("fsdp", "tp_fsdp"):
        with pytest.raises(InputError, match="TensorFlow trains no model in parts"):
            load(model_folder, mesh=Mesh(), strategy=strategy)
    with pytest.raises(InputError, match="cannot be prepared"):
        load(model_folder, strategy="tp", inference=True)
    for variables, name in (
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "DTENSOR_JOBS"),
        ({"DTENSOR_NUM_CLIENTS": "2", "DTENSOR_CLIENT_ID": "0"}, "DTENSOR_JOBS"),
        ({"DTENSOR_NUM_CLIENTS": "3", "DTENSOR_CLIENT_ID": "0", "DTENSOR_JOBS": "a:1,b:1"}, "DTENSOR_JOBS"),
        ({"DTENSOR_JOBS": "a:1,b:1"}, "DTENSOR_NUM_CLIENTS"),
    ):
        with monkeypatch.context() as patched, pytest.raises(InputError, match=f"environment: {name}"):
            for key, value in variables.items():
                patched.setenv(key, value)
            parallel.join_processes()


def test_a_distribution_of_keras_own_is_refused(model_folder):
    import keras

    import gptj.tf as gptj

    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0"]))
    try:
        with pytest.raises(InputError, match=r"keras\.distribution: does nothing"):
            gptj.GPTJForCausalLM.from_pretrained(model_folder)
    finally:
        keras.distribution.set_distribution(None)
