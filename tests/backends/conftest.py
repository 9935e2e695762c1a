"""Every test here runs once in each backend that GPTJ_TEST_BACKENDS names, through the public interface alone.

A backend that is named and cannot be imported fails its tests. Where none is named, nothing here is collected:
the core's environment has no framework.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# float64 is a mode of the whole process in jax, and float32 tests are float32 in it all the same.
os.environ.setdefault("JAX_ENABLE_X64", "1")
# XLA compiles for seconds what runs for milliseconds here. Without LLVM's optimizations that takes a third less in
# Flax, a fifth in TensorFlow; the bounds are the same. tests/parity, interop and peers compile as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
for _name, _value in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "tensorflow"}.items():
    os.environ.setdefault(_name, _value)

from wings import Wing, named_backends

from gptj import GPTJConfig
from gptj.backends import BACKENDS
from gptj.checkpoint import write_checkpoint
from gptj.config.schema import Head
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights

_others = set(BACKENDS) - set(named_backends())
collect_ignore_glob = [f"test_{name}_*.py" for name in _others] if named_backends() else ["*.py"]
if named_backends() == ("tf",):  # test_tf_parallel.py has what TensorFlow's commands do across processes
    collect_ignore_glob.append("test_commands_together.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "wing" in metafunc.fixturenames:
        chosen = getattr(metafunc.module, "WINGS", BACKENDS)
        names = [name for name in named_backends() if name in chosen]
        metafunc.parametrize("wing", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def wing(request: pytest.FixtureRequest) -> Wing:
    return Wing(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with the revealing weights of a head and a config, written once."""
    written: dict[Any, Path] = {}

    def find(head: Head = "causal_lm", **changes: Any) -> Path:
        config = revealing_config(**changes)
        key = head, config
        if key not in written:
            path = tmp_path_factory.mktemp(head) / "model"
            written[key] = write_checkpoint(path, config, revealing_fill(0), head=head)
        return written[key]

    return find


@pytest.fixture(scope="session")
def revealing(wing: Wing, folder: Callable[..., Path]) -> Callable[..., Any]:
    """The revealing model of a head, in the wing and dtype asked for, loaded once."""
    loaded: dict[Any, Any] = {}

    def find(head: Head = "causal_lm", *, dtype: str = "float32", **changes: Any) -> Any:
        key = head, dtype, revealing_config(**changes)
        if key not in loaded:
            loaded[key] = wing.model(head).from_pretrained(folder(head, **changes), param_dtype=dtype)
        return loaded[key]

    return find


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Oracle]:
    """The oracle on the same weights."""

    def find(head: Head = "causal_lm", **changes: Any) -> Oracle:
        config: GPTJConfig = revealing_config(**changes)
        return Oracle(config, revealing_weights(config, head=head), bare=head == "base")

    return find
