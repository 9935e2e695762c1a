"""How weights are cut into files, what the files are called, and the index that says which tensor is in which."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from gptj.errors import InputError, shown

__all__ = ["ShardCutter", "cut_sizes", "index_text", "shard_bytes", "shard_name"]

_MOST_BYTES = 2**63
_MOST_SHARDS = 99_999  # names have five digits


def shard_bytes(size: int | str, *, where: str = "max_shard_size") -> int:
    """The bytes of "5GB", "200MB" or "1GiB", or of a number.

    >>> shard_bytes("5GB"), shard_bytes("1KiB"), shard_bytes(7)
    (5000000000, 1024, 7)

    Raises:
        InputError: it is no size, or less than a byte, or more than 2**63.
    """
    spelt = size if isinstance(size, str) else shown(size)
    found = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?(?:([KMGT])(i?)B|B)?", spelt, re.IGNORECASE)
    power = 0 if found is None else " KMGT".index((found[2] or " ").upper())
    count = 0.0 if found is None else float(found[1]) * (1024 if found[3] else 1000) ** power
    if isinstance(size, bool) or not 1 <= count <= _MOST_BYTES:
        raise InputError("no size", where=where, expected='bytes, or such as "5GB", 1 to 2**63', found=shown(size))
    return int(count)


class ShardCutter:
    """Says of one tensor after the other whether a new file begins with it.

    Args:
        max_shard_bytes: of a file's tensors, where it has more than one.
        count: the files that there are already, all of them finished.
    """

    def __init__(self, max_shard_bytes: int, *, count: int = 0) -> None:
        self.max_shard_bytes = max_shard_bytes
        self.count = count
        self._filled: int | None = None

    def begins(self, nbytes: int, *, itemsize: int = 1) -> bool:
        """Whether a file begins with this tensor, since the last is full, or would leave the tensor unaligned.

        Args:
            nbytes: of the tensor.
            itemsize: what its place must be a multiple of, where readers view the data as it lies in the file.

        Raises:
            InputError: there are too many files for names of five digits.
        """
        filled = self._filled
        if filled is not None and filled + nbytes <= self.max_shard_bytes and filled % itemsize == 0:
            self._filled = filled + nbytes
            return False
        if self.count >= _MOST_SHARDS:
            raise InputError("too small", where="max_shard_bytes", expected=f"at most {_MOST_SHARDS} shards")
        self.count += 1
        self._filled = nbytes
        return True


def cut_sizes(sizes: Iterable[tuple[int, int]], max_shard_bytes: int) -> list[int]:
    """How many of the tensors, each with its bytes and alignment, are in each file.

    >>> cut_sizes([(4, 1), (4, 1), (4, 1)], 8)
    [2, 1]
    """
    cutter = ShardCutter(max_shard_bytes)
    counts: list[int] = []
    for nbytes, itemsize in sizes:
        if cutter.begins(nbytes, itemsize=itemsize):
            counts.append(0)
        counts[-1] += 1
    return counts


def shard_name(file_name: str, number: int, count: int) -> str:
    """The name of weights file `number` of `count`, counted from 1.

    >>> shard_name("model.safetensors", 1, 1), shard_name("tf_model.h5", 2, 3)
    ('model.safetensors', 'tf_model-00002-of-00003.h5')
    """
    stem, suffix = file_name.rsplit(".", 1)
    return file_name if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def index_text(weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    """The index of weights in several files: which array is in which, and the bytes of all arrays."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2) + "\n").encode()
