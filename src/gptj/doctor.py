"""`gptj doctor`: which frameworks are here, in which versions, and what around them changes results or speed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from gptj.backends import BACKENDS, ENVIRONMENT_VARIABLE, installed_backends

__all__ = ["Examination", "examine"]

_DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow-cpu", "tensorflow"),
    "keras": ("keras",),
    "jax": ("jax",),
    "flax": ("flax",),
}
_CORE = ("gptj", "numpy", "ml_dtypes", "safetensors", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        platform: Python, system and machine.
        versions: of the core's packages.
        backends: for each backend its frameworks' versions, None for one that is not installed.
        warnings: what in the environment changes results or speed, and what to do about it.
    """

    platform: str
    versions: dict[str, str | None]
    backends: dict[str, dict[str, str | None]]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The findings, ready for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> dict[str, str]:
        """The findings as pairs of a name and what was found."""
        found = {"python": self.platform, **{name: version or "-" for name, version in self.versions.items()}}
        for name, frameworks in self.backends.items():
            versions = ", ".join(f"{framework} {version}" for framework, version in frameworks.items() if version)
            lacking = None in frameworks.values()
            found[f"gptj.{name}"] = f'not installed: pip install "gptj[{name}]"' if lacking else versions
        return found


def examine() -> Examination:
    """Look around without importing a framework."""
    backends = {
        name: {module: _version(_DISTRIBUTIONS[module]) for module in one.requires} for name, one in BACKENDS.items()
    }
    return Examination(
        platform=f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        versions={name: _version((name,)) for name in _CORE},
        backends=backends,
        warnings=tuple(_warnings()),
    )


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _warnings() -> list[str]:
    """What is set that changes a result, one sentence each."""
    found = []
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        found.append(f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}: gptj.tf needs tensorflow there")
    if (kind := _keras_floatx()) not in (None, "float32"):
        found.append(f"keras.json sets floatx to {kind}: gptj passes every dtype, your own Keras code may not")
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        found.append("JAX_ENABLE_X64 is set: jax makes float64 where your own code names no dtype")
    if "fast_math=true" in os.environ.get("XLA_FLAGS", ""):
        found.append("XLA_FLAGS turns on fast math: NaN and infinity are no longer kept")
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        found.append(
            f"ATEN_CPU_CAPABILITY={os.environ['ATEN_CPU_CAPABILITY']}: PyTorch rounds otherwise than by default"
        )
    if "torch" in sys.modules or "jax" in sys.modules or "tensorflow" in sys.modules:
        found.append("a framework is already imported: what it read from the environment can no longer change")
    if len(installed_backends()) > 1 and not os.environ.get(ENVIRONMENT_VARIABLE):
        found.append(f"several backends and no {ENVIRONMENT_VARIABLE}: say which with --backend, or import gptj.pt")
    return found


def _keras_floatx() -> str | None:
    home = Path(os.environ.get("KERAS_HOME", Path("~/.keras").expanduser()))
    try:
        return str(json.loads((home / "keras.json").read_text()).get("floatx"))
    except (OSError, ValueError, AttributeError):
        return None
