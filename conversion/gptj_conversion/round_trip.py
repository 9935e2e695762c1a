"""A model through each format and back, which the matrix of invariances holds to what it was."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptj.errors import ConfigError
from gptj_conversion.convert import convert, target_formats

__all__ = ["run_matrix_through_formats", "through_formats"]


def run_matrix_through_formats(
    directory: str | os.PathLike[str], backends: Sequence[str], *, dtype: str, seed: int,
    progress: Callable[[str], None] | None = None,
) -> Any:  # fmt: skip
    """The matrix of a model, with a row for each file format.

    Raises:
        GPTJError: see `gptj.parity.matrix.run_matrix`.
    """
    from gptj.parity.matrix import run_matrix

    with tempfile.TemporaryDirectory(prefix="gptj-parity-") as kept:
        folders, notes = through_formats(directory, Path(kept))
        return run_matrix(directory, backends, folders=folders, notes=notes, dtype=dtype, seed=seed, progress=progress)


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
