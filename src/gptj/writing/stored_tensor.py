"""A tensor on its way to a file: cast, counted and cut into blocks of its canonical bytes, whatever the format."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config.schema import TensorSpec
from gptj.errors import SchemaError, shown
from gptj.reading.files import BLOCK_BYTES
from gptj.reading.manifest import Origin, TensorRecord
from gptj.reading.safetensors_file import WEIGHT_DTYPES, cast
from gptj.reading.tally import CastTally, ValueTally, is_narrowing
from gptj.writing.journal import WritingRules

__all__ = ["BlockTally", "native", "record_tensor", "stored_blocks", "stored_dtype"]

_log = logging.getLogger("gptj")
_NEVER_ZERO = ("kernel", "embedding", "scale")


class BlockTally:
    """Counts what is in a tensor's blocks, and casts them to what is stored."""

    def __init__(self, name: str, source: np.dtype[Any], dtype: np.dtype[Any], rules: WritingRules) -> None:
        self.name = name
        self.dtype = dtype
        self.rules = rules
        self.stored = ValueTally(dtype)
        self.source = self.stored if source == dtype or source.name not in WEIGHT_DTYPES else ValueTally(source)
        narrows = source.name in WEIGHT_DTYPES and is_narrowing(source.name, dtype.name)
        self.casts = CastTally(source) if narrows else None

    def store(self, block: NDArray[Any], at: int) -> NDArray[Any]:
        """The block, which begins at row `at` of its tensor, as it is stored.

        Raises:
            SchemaError: it holds values that are not finite, or that overflow, and may not.
        """
        if block.dtype.name not in WEIGHT_DTYPES:
            return cast(block, self.dtype, where=self.name)  # which says why it cannot be
        bad = self.source.add(block)
        if bad and not self.rules.allow_nonfinite:
            raise SchemaError(
                "holds values that are not finite",
                where=self.name,
                found=f"{bad} NaN or infinite in rows {at} to {at + len(block) - 1}",
                hint="Say allow_nonfinite to write them",
            )
        if block.dtype == self.dtype:
            return block
        stored = cast(block, self.dtype, where=self.name, allow_overflow=True)
        self.stored.add(stored)
        if self.casts is not None and self.casts.add(block, stored) and not self.rules.allow_overflow:
            cast(block, self.dtype, where=self.name)  # which says what overflowed
        return stored


def stored_blocks(values: NDArray[Any], dtype: np.dtype[Any], tally: BlockTally) -> Iterator[memoryview]:
    """A tensor's canonical bytes as stored: C order, little-endian, counted and cast, some rows at a time."""
    values = values.reshape(1) if values.ndim == 0 else values
    row_bytes = max(values.dtype.itemsize, dtype.itemsize) * (values[:1].size or 1)
    rows = max(1, BLOCK_BYTES // row_bytes)
    for at in range(0, len(values), rows):
        block = values[at : at + rows]
        block = block.astype(native(block.dtype), order="C", copy=False)
        yield np.ascontiguousarray(tally.store(block, at)).reshape(-1).view(np.uint8).data


def stored_dtype(row: TensorSpec, values: NDArray[Any], dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    """The dtype that a tensor is stored in, in this machine's byte order; a `dtype` of None is its own.

    Raises:
        SchemaError: it has another shape than its row, or that is no dtype of weights.
    """
    if values.shape != row.shape:
        raise SchemaError("wrong shape", where=row.name, expected=row.shape, found=values.shape)
    dtype = native(values.dtype) if dtype is None else dtype
    if dtype.name not in WEIGHT_DTYPES:
        raise SchemaError(
            "not a dtype of weights", where=row.name, expected=" or ".join(WEIGHT_DTYPES), found=shown(values.dtype)
        )
    return dtype


def record_tensor(
    row: TensorSpec, tally: BlockTally, *, target: Path, files: tuple[str, ...], sha256: str, origin: Origin | None
) -> TensorRecord:
    """The record of a tensor that was stored in these files of `target`; that a matrix is all zero is said."""
    values = tally.stored.record()
    if values.is_all_zero and row.kind in _NEVER_ZERO:
        _log.warning("%s: %s is all zero", target, row.name)
    casts = None if tally.casts is None else tally.casts.record()
    return TensorRecord(files, tally.dtype.name, row.shape, sha256, values, casts, origin)


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")
