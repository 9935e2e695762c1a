"""`gptj doctor`: what is installed, what this machine has, and what around them changes results or speed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gptj
from gptj.backends import (
    BACKENDS,
    DISTRIBUTION,
    ENVIRONMENT_VARIABLE,
    EXTRAS,
    EXTRAS_BESIDE_ALL,
    choose_backend,
    install_line,
    installed_backends,
    missing_from,
)
from gptj.backends.surroundings import memory, processors
from gptj.errors import BackendError

__all__ = ["Examination", "examine"]

_DISTRIBUTIONS = {"tensorflow": ("tensorflow-cpu", "tensorflow")}
"""The distributions of modules that are called otherwise."""

_CORE = ("numpy", "ml_dtypes", "safetensors", "tokenizers")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "OPENBLAS_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Examination:
    """The findings: versions, devices, and settings that change results.

    Attributes:
        platform: Python, system and machine.
        cores: that this process may use.
        threads: the variables that are set of those that say how many threads to use.
        memory_bytes: of the machine, or that its container may use, in all; None where the system does not say.
        free_memory_bytes: of these, what is free or can be freed.
        devices: what there is beside the CPU, in words; a framework may be built without it.
        versions: of the core's packages.
        backends: for each backend its frameworks' versions, None for one that is not installed.
        extras: for each other extra the versions of what it brings, None for what is not installed.
        warnings: what in the environment changes results or speed, and what to do about it.
    """

    platform: str
    cores: int
    threads: dict[str, str]
    memory_bytes: int | None
    free_memory_bytes: int | None
    devices: tuple[str, ...]
    versions: dict[str, str | None]
    backends: dict[str, dict[str, str | None]]
    extras: dict[str, dict[str, str | None]]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The findings, ready for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> dict[str, str]:
        """The findings as pairs of a name and what was found."""
        memory = "-"
        if self.memory_bytes is not None and self.free_memory_bytes is not None:
            memory = f"{self.free_memory_bytes / 1e9:.1f} GB free of {self.memory_bytes / 1e9:.1f} GB"
        found = {
            "python": self.platform,
            "threads": ", ".join([f"{self.cores} cores", *(f"{name}={n}" for name, n in self.threads.items())]),
            "memory": memory,
            "devices": "; ".join(("the CPU", *(self.devices or ("no GPU that the system shows",)))),
            **{name: version or "-" for name, version in self.versions.items()},
        }
        for name, frameworks in self.backends.items():
            found[f"gptj.{name}"] = _describe_versions(frameworks, name)
        for extra, modules in self.extras.items():
            found[f"[{extra}]"] = _describe_versions(modules, extra)
        return found


def _describe_versions(versions: dict[str, str | None], extra: str) -> str:
    if None in versions.values():
        return f"not installed: {install_line(extra)}"
    return ", ".join(f"{module} {version}" for module, version in versions.items())


def examine() -> Examination:
    """Examine the installation, without importing a framework."""
    total, free = memory()
    return Examination(
        platform=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        cores=processors(),
        threads={name: os.environ[name] for name in _THREADS if os.environ.get(name)},
        memory_bytes=total,
        free_memory_bytes=free,
        devices=tuple(_devices()),
        versions={"gptj": gptj.__version__, **{name: _version(name) for name in _CORE}},
        backends={name: {module: _version(module) for module in one.requires} for name, one in BACKENDS.items()},
        extras={
            extra: {module: _version(module) if module not in missing_from(extra) else None for module in modules}
            for extra, modules in (EXTRAS | EXTRAS_BESIDE_ALL).items()
            if extra not in BACKENDS
        },
        warnings=tuple(_warnings()),
    )


def _version(module: str) -> str | None:
    """The version of the distribution that brings a module."""
    for name in _DISTRIBUTIONS.get(module, (module,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _devices() -> Iterator[str]:
    """The accelerators of this machine, asked of the system and not of a framework."""
    yield from _nvidia()
    yield from _nodes()


def _nodes() -> Iterator[str]:
    """The accelerators that the system has a device node for, and Apple's."""
    if Path("/dev/kfd").exists():
        yield "an AMD GPU (/dev/kfd)"
    if any(Path("/dev").glob("accel[0-9]*")):
        yield "a TPU or another accelerator (/dev/accel)"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        yield "Apple's GPU (mps)"


def _nvidia() -> Iterator[str]:
    """NVIDIA's GPUs: name, memory, what the card computes in 16 bits, and the driver, as far as nvidia-smi says."""
    command = shutil.which("nvidia-smi")
    for fields in ("name,memory.total,memory.free,compute_cap,driver_version", "name,memory.total"):
        if command is None:
            return
        query = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=10)
            if done.returncode == 0:  # an older one does not know every field
                yield from (describe_card(line) for line in done.stdout.splitlines() if line.strip())
                return


def describe_card(line: str) -> str:
    """A line of nvidia-smi in words.

    >>> describe_card("NVIDIA H100 80GB HBM3, 81559 MiB, 80995 MiB, 9.0, 570.86")
    'NVIDIA H100 80GB HBM3, 81559 MiB (80995 MiB free), driver 570.86, best in bfloat16'
    """
    name, total, *more = (word.strip() for word in line.split(","))
    if len(more) != 3:
        return line.strip()
    free, capability, driver = more
    try:
        best = next(dtype for least, dtype in _OF_CAPABILITY if float(capability) >= least)
    except ValueError:  # such as [N/A]
        return f"{name}, {total} ({free} free), driver {driver}"
    return f"{name}, {total} ({free} free), driver {driver}, best in {best}"


_OF_CAPABILITY = ((8.0, "bfloat16"), (5.3, "float16"), (0.0, "float32"))
"""The least compute capability that multiplies in each dtype by itself."""

_CPU_BUILDS = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "jax"}


def _built_for_cpus() -> Iterator[str]:
    """The frameworks that are installed and built without GPUs, by their distributions; none is imported."""
    torch = _version("torch")
    if torch is not None and torch.endswith("+cpu"):
        yield "pt"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("tensorflow-cpu")
        yield "tf"
    if _version("jax") is not None:
        names = (one.metadata["Name"] or "" for one in importlib.metadata.distributions())
        if not any(name.lower().replace("_", "-").startswith(("jax-cuda", "jax-rocm", "jax-metal")) for name in names):
            yield "flax"


def _warnings() -> list[str]:
    """Settings of the environment that change a result, or keep a GPU idle, one sentence each."""
    found: list[str] = []
    if any(_nvidia()):
        found += (
            f"a GPU is here, and {_CPU_BUILDS[name]} is installed without it: gptj.{name} runs on the CPU (docs/gpu.md)"
            for name in _built_for_cpus()
        )
    if _version("gptj") is not None and _version(DISTRIBUTION) is not None:
        found.append(
            f"another distribution, gptj, is installed over {DISTRIBUTION}: pip uninstall gptj, and install anew"
        )
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
    if os.environ.get(ENVIRONMENT_VARIABLE):
        try:
            choose_backend()
        except BackendError as error:
            found.append(str(error))
    elif len(installed_backends()) > 1:
        found.append(f"several backends and no {ENVIRONMENT_VARIABLE}: say which with --backend, or import gptj.pt")
    return found


def _keras_floatx() -> str | None:
    home = Path(os.environ.get("KERAS_HOME", Path("~/.keras").expanduser()))
    try:
        return str(json.loads((home / "keras.json").read_text()).get("floatx"))
    except (OSError, ValueError, AttributeError):
        return None
