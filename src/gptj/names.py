"""The errors of names that a module has not, or not yet: `hasattr` says no, and `from gptj import X` says why.

`hasattr`, `help` and every tool that looks through a module take an AttributeError for "not there". But Python turns
one into "cannot import name" in `from gptj import X` and drops its words, so that gets an ImportError; it is known by
who asks, which is Python's own import.
"""

from __future__ import annotations

import difflib
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType

from gptj.errors import BackendAttributeError, BackendError

__all__ = ["asked_by_import", "missing_name", "unchosen"]


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
        close = difflib.get_close_matches(name, sorted({*names, *submodules}), n=1, cutoff=0.7)
        hint = f"Did you mean {close[0]}?" if close else None
    if by_import and hint is not None:
        return ImportError(f"cannot import name {name!r} from {module.__name__!r}. {hint}", name=module.__name__)
    found = f"module {module.__name__!r} has no attribute {name!r}"
    return AttributeError(found if hint is None else f"{found}. {hint}", name=name)


def unchosen(name: str, error: ImportError) -> BackendAttributeError:
    """The error of a model class that cannot be had, in the words of the `error` of its backend, for `hasattr`."""
    if isinstance(error, BackendError):
        return BackendAttributeError(
            f"gptj.{name} is a class of a backend, and {error.problem}",
            where=error.where,
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        )
    return BackendAttributeError(f"gptj.{name} is a class of a backend, which cannot be imported", found=str(error))
