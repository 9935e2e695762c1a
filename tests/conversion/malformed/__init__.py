"""Malformed inputs by kind, the door that each is brought to, and what must come of it.

A module of this package is a kind: it has a `TITLE` and a list `CASES`. `python -m malformed` (with tests/conversion
on the path) runs all and prints the table of docs/faults.md; `--write` puts it there; `python -m malformed KIND`
prints what came of each case of a kind. A kind runs in a process of its own, so that a hang, an endless allocation
or a death by signal is an outcome like any other and not the end of the tests.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gptj.errors import CheckpointWarning, GPTJError

__all__ = ["GOOD", "Malformed", "Outcome", "cases", "gptj", "kinds"]

GOOD = ("refused", "said")

Outcome = Literal["refused", "said", "unnamed", "silent", "wrong", "traceback", "memory", "hang", "left"]
"""What came of a case. Only `GOOD` ones are right: an error of ours that names the culprit, or a warning that does."""


@dataclasses.dataclass(frozen=True)
class Malformed:
    """One malformed input.

    Attributes:
        what: in words.
        make: writes it into an empty folder.
        door: reads it from that folder, as a user would. What it writes is `folder / "out"`. An AssertionError says
            that the door gave a wrong result.
        names: a word that the error or the warning must contain: a file, tensor, field or option.
        outcome: "refused", or "said" where it is read and a warning names the culprit.
    """

    what: str
    make: Callable[[Path], object]
    door: Callable[[Path], object]
    names: str
    outcome: Literal["refused", "said"] = "refused"


def kinds() -> tuple[str, ...]:
    """The names of the kinds, which are this package's modules."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "__main__"))


def title(kind: str) -> str:
    """What the kind is about."""
    return str(importlib.import_module(f"malformed.{kind}").TITLE)


def cases(kind: str) -> list[Malformed]:
    """The cases of a kind."""
    return list(importlib.import_module(f"malformed.{kind}").CASES)


def gptj(*arguments: object, stdin: str | None = None) -> str:
    """A door: the command line in a process of its own. Its result; notes on stderr are warned of.

    Raises:
        GPTJError: it ended with status 1 or 2 and one message.
        RuntimeError: it ended otherwise, or with a traceback.
    """
    done = subprocess.run(
        [sys.executable, "-m", "gptj", *map(str, arguments)], capture_output=True, text=True, input=stdin or ""
    )
    if "Traceback" in done.stderr or done.returncode not in (0, 1, 2):
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-2000:]}")
    if done.returncode:
        raise GPTJError(done.stderr.strip() or done.stdout.strip())
    if done.stderr:
        warnings.warn(done.stderr, CheckpointWarning, stacklevel=2)
    return done.stdout
