"""An adapter merged into the matrices that it adds to: W + scale B A."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.adapters.files import read_adapter
from gptj.adapters.rows import AdapterRow
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import BASE_PREFIX, TensorSpec
from gptj.errors import SchemaError, shown
from gptj.paths.json_file import read_files_of
from gptj.reading.folder import open_checkpoint
from gptj.reading.load_plan import plan_causal_lm
from gptj.writing.checkpoint_writer import write_checkpoint

__all__ = ["merge_folder", "merge_kernel", "read_companions"]

_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
_LARGEST_COMPANION_BYTES = 100_000_000

BLOCK_ROWS = 1024
"""Rows of W that are merged at a time, so that the float64 in between is small."""


def merge_kernel(
    kernel: NDArray[Any], row: AdapterRow, a: NDArray[Any], b: NDArray[Any], *, dtype: str | None = None
) -> NDArray[Any]:
    """W + scale B A (out, in), computed in float64 and rounded once, to `dtype` or to W's own.

    Raises:
        SchemaError: a sum does not fit that dtype.
    """
    target = kernel.dtype if dtype is None else numpy_dtype(dtype)
    merged, wide = np.empty(kernel.shape, target), a.astype(np.float64)
    for start in range(0, len(kernel), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        addition = row.scale * (b[rows].astype(np.float64) @ wide)
        with np.errstate(over="ignore"):
            merged[rows] = (kernel[rows].astype(np.float64) + addition).astype(target)
    if not np.isfinite(merged.astype(np.float32)).all():
        raise SchemaError(f"the sum does not fit {target.name}", where=row.kernel, hint="Merge it in a wider dtype")
    return merged


def merge_folder(
    directory: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    weights: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint with an adapter merged into it, a tensor at a time and without a framework.

    Args:
        directory: the base's folder.
        adapter: the adapter's folder.
        output: the folder to write.
        dtype: what is stored; None keeps each tensor's.
        weights: which weights file of the base, where there are several.
        max_shard_bytes: of a weights file.
        overwrite: replace the model that `output` holds.

    Returns:
        The folder, with the base's tokenizer and generation_config.json carried along.

    Raises:
        GPTJError: see `open_checkpoint`, `read_adapter`, `Adapter.rows` and `write_checkpoint`.
    """
    checkpoint = open_checkpoint(directory, weights=weights)
    config = checkpoint.config
    opened = read_adapter(adapter)
    rows = {row.kernel: row for row in opened.rows(config)}
    plan = plan_causal_lm(checkpoint)

    def read(spec: TensorSpec) -> NDArray[Any]:
        if spec.name in plan.zeros:
            return np.zeros(spec.shape, np.float32)
        stored = plan.tensors[spec.name].name
        row = rows.get(spec.name.removeprefix(BASE_PREFIX))
        if row is None:
            return checkpoint.read(stored, dtype)
        return merge_kernel(checkpoint.read(stored), row, *opened.read(row), dtype=dtype)

    origin = {"base": os.fspath(directory), "adapter": os.fspath(adapter), "r": opened.config.r}
    return write_checkpoint(
        output,
        config,
        read,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        extra_files=read_companions(checkpoint.directory),
        provenance={"merged": {key: shown(value) for key, value in origin.items()}},
    )


def read_companions(directory: Path) -> dict[str, bytes]:
    """The files beside a model's weights that hold as well for one that is made of it, by name.

    Raises:
        GPTJError: see `gptj.paths.json_file.read_files_of`.
    """
    return read_files_of(directory, _COMPANIONS, limit_bytes=_LARGEST_COMPANION_BYTES)
