"""Lawful oddities: folders of other programs that every release of transformers opens, and that must open here.

A module of this package is a kind, with a list `ODDITIES`. Each oddity changes a good folder (the tiny revealing
model with a tokenizer and a generation_config.json) without changing what the model computes.
tests/conversion/test_lawful.py opens each from the command line, tests/backends/test_lawful.py in the three wings.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizer_samples import small

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill

__all__ = ["Oddity", "good_folder", "oddities"]


@dataclasses.dataclass(frozen=True)
class Oddity:
    """One way in which a lawful folder is odd.

    Attributes:
        what: in words.
        make: changes the good folder.
        says: a word that the warning must contain, or None where there is nothing to say.
        direct: whether `from_pretrained` opens it as it is; else it is converted first.
        arguments: of `convert` (and, where `direct`, of `from_pretrained`), such as weights.
        inside: the folder to open, relative to the good folder.
    """

    what: str
    make: Callable[[Path], object]
    says: str | None = None
    direct: bool = True
    arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inside: str = "."


def good_folder(path: Path) -> Path:
    """The folder that the oddities change."""
    write_checkpoint(path, revealing_config(vocab_size=300, eos_token_id=256), revealing_fill(0))
    small().save_pretrained(path)
    (path / "manifest.json").unlink()
    (path / "generation_config.json").write_text('{"eos_token_id": 256, "max_new_tokens": 4}')
    return path


def oddities() -> list[Oddity]:
    """All of them, from the package's modules."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [oddity for name in names for oddity in importlib.import_module(f"lawful.{name}").ODDITIES]
