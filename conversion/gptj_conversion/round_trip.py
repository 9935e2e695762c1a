"""A model through each format and back, which the matrix of invariances holds to what it was."""

from __future__ import annotations

import os
from pathlib import Path

from gptj.errors import ConfigError
from gptj_conversion.convert import convert, target_formats

__all__ = ["through_formats"]


def through_formats(directory: str | os.PathLike[str], kept: Path) -> tuple[dict[str, Path], list[str]]:
    """The model after it was written in each format and converted back, by the format's name; what had to be left out.

    mesh-transformer-jax computes fewer models than a config can describe, so its format cannot hold every one.
    """
    back, notes = {}, []
    for name in target_formats():
        shards = 1 if name == "mesh" else None
        try:
            there = convert(directory, kept / f"{name}-there", to=name, shards=shards, fingerprint=False)
        except ConfigError as error:
            if name != "mesh":
                raise
            notes.append(f"There is no row through {name}: {error}.")
        else:
            back[name] = convert(there, kept / f"{name}-back", fingerprint=False)
    return back, notes
