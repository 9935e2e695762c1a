"""Printing for people and programs: facts, JSON, notes, sizes, generated text, and the console for tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from gptj.errors import harmless, shown

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "open_console", "print_facts", "print_json", "print_note", "printed_warnings", "spell", "spell_size", "write_text",
]  # fmt: skip


def printed_warnings() -> list[str]:
    """The warnings that this command has printed."""
    context = click.get_current_context(silent=True)
    return [] if context is None else context.meta.setdefault("gptj.said", [])


def print_note(text: str) -> None:
    """Print a note, unless a warning has said it: each thing is said once."""
    if not any(text in warning for warning in printed_warnings()):
        click.echo(f"note: {text}", err=True)


def open_console(*, stderr: bool = False) -> Console:
    """The terminal, or a file that is wide enough for every table."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and len(columns) < 5 else 0
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width if width >= 20 else 140)


def print_json(value: Any) -> None:
    """Print a value as indented JSON in ASCII."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True))


def print_facts(facts: Mapping[str, str]) -> None:
    """Print a line a fact, the same on a terminal of any width and in a file."""
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:<{width}}  {value}")


def spell_size(nbytes: int) -> str:
    """A number of bytes: exactly, and from 10 kB on in a larger unit too.

    >>> spell_size(9_999), spell_size(12_992), spell_size(24_241_003_136)
    ('9,999 bytes', '13.0 kB (12,992 bytes)', '24.2 GB (24,241,003,136 bytes)')
    """
    unit = next((unit for unit in (1e9, 1e6, 1e3) if nbytes >= unit), 1)
    short = f"{nbytes / unit:.1f} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'}).get(unit)}"
    return f"{nbytes:,} bytes" if nbytes < 10_000 else f"{short} ({nbytes:,} bytes)"


def spell(value: Any) -> str:
    """A fact in words: yes and no, thousands with commas, lists with commas, - for nothing."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return shown(value).strip("'")


def write_text(text: str) -> None:
    """Print text at once: unchanged into a pipe or a file, on a terminal without control characters (see `harmless`).

    click would take what looks like a colour out of it.
    """
    if sys.stdout is not None:
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
