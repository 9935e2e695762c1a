"""Every test here runs once in each backend that GPTJ_TEST_BACKENDS names, over a server on a loopback port."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Less to compile, as in tests/backends.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
for _name, _value in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "tensorflow"}.items():
    os.environ.setdefault(_name, _value)

from served import Served, small_tokenizer
from wings import Wing, named_backends

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill

collect_ignore_glob = [] if named_backends() else ["*.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "wing" in metafunc.fixturenames:
        metafunc.parametrize("wing", named_backends(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def wing(request: pytest.FixtureRequest) -> Wing:
    return Wing(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of sharp logits, and a tokenizer."""
    config = revealing_config(n_positions=256, vocab_size=300, eos_token_id=289, bos_token_id=289)
    path = write_checkpoint(tmp_path_factory.mktemp("served") / "tiny", config, revealing_fill(0))
    small_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model(wing: Wing, folder: Path) -> Any:
    model = wing.model("causal_lm").from_pretrained(folder, param_dtype="float32")
    model.prepare_for_inference()
    model.to_numpy = wing.numpy
    return model


@pytest.fixture(scope="session")
def serve(model: Any) -> Callable[..., Served]:
    return lambda **options: Served(model, **options)


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Served]:
    with Served(model, most_rows=4, most_waiting=1000) as running:
        yield running
