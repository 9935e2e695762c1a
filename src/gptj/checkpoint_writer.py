"""Writing a checkpoint: one tensor at a time, each file read back, the directory swapped in as a whole.

A safetensors header stands before the data but names the dtypes of all of it. So room is left for the longest
header that these rows can have, the data is streamed behind it, and the header, padded with spaces as the format
allows, is written last. Nobody has to know the dtypes before the tensors come, and no tensor is asked for twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.errors import FormatError, InputError, SchemaError, WriteError, shown
from gptj.manifest import CONFIG_HASH_KEY, MANIFEST_FILE, FileRecord, Manifest, TensorRecord
from gptj.output_directory import Fate, FileSystem, OutputDirectory, OutputFile, require_plain_name
from gptj.safetensors_file import BLOCK_BYTES, WEIGHT_DTYPES, cast, numpy_dtype, pack_header, read_safetensors
from gptj.schema import HEADS, Head, TensorSpec, schema
from gptj.weight_files import INDEX_FILE, WEIGHTS_FILE, is_weights_name

__all__ = ["DtypeChoice", "write_checkpoint"]

DtypeChoice = str | Callable[[TensorSpec], str] | None
"""What tensors are stored as: one dtype for all, one for each row, or None: as they come."""

_MOST_SHARDS = 99_999
_FOREIGN_WEIGHTS = re.compile(r"(pytorch_model|tf_model|flax_model|model\.weights).*\.(bin|h5|msgpack)(\.index\.json)?")


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    read: Callable[[TensorSpec], NDArray[Any]],
    *,
    head: Head = "causal_lm",
    dtype: DtypeChoice = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Callable[[str, int], None] | None = None,
    allow_overflow: bool = False,
    allow_nonfinite: bool = False,
    fs: FileSystem | None = None,
) -> Path:
    """The directory, written whole: config.json, the weights, manifest.json and `extra_files`.

    On any failure, what stood there still stands. Where a checkpoint is replaced (`overwrite`), its weights,
    config and manifest go, and its other files (a tokenizer's, a README) are carried over.

    Args:
        directory: where; its parent must exist.
        config, head: the model; its schema says which tensors are written and in which order.
        read: gives the tensor of a row, of the row's shape and in any memory layout or byte order; called once a
            row, and what it gave is let go before the next call.
        dtype: what the tensors are stored as.
        max_shard_bytes: weights of more bytes than this are cut into several files and an index.
        overwrite: whether a directory with something in it may be replaced.
        metadata: strings for the weights' headers.
        provenance: where the weights came from, for manifest.json; anything that JSON can say.
        extra_files: further files by name.
        progress: told the name and stored bytes of each tensor when it has been written.
        allow_overflow: let a narrowing cast turn finite values into infinity.
        allow_nonfinite: write NaN and infinity.
        fs: the system calls, for tests.

    Raises:
        WriteError: the directory may not be replaced or could not be written.
        SchemaError: a tensor has another shape, is not made of floating-point numbers, is not finite, or overflows.
        InputError: an argument breaks its rule.
    """
    extra = dict(extra_files or {})
    _check_arguments(head, max_shard_bytes, extra, metadata, provenance)
    rows = schema(config, head)
    header = {**(metadata or {}), "format": "pt", CONFIG_HASH_KEY: config.architecture_sha256}
    with OutputDirectory(directory, overwrite=overwrite, fate=_fate, fs=fs) as output:
        output.require_space(_least_bytes(rows, dtype))
        weights = _WeightsWriter(output, rows, header, max_shard_bytes, allow_overflow, allow_nonfinite)
        for number, row in enumerate(rows):
            nbytes = weights.add(number, np.asarray(read(row)), _choose_dtype(dtype, row))
            if progress is not None:
                progress(row.name, nbytes)
        files, tensors = weights.finish()
        texts = {CONFIG_FILE: _config_text(config, head, tensors).encode(), **extra}
        if len(weights.shards) > 1:
            texts[INDEX_FILE] = _index_text(tensors, weights.total_bytes).encode()
        for name, data in texts.items():
            files[name] = FileRecord(len(data), output.write_file(name, data))
        manifest = Manifest(_tool(), config.architecture_sha256, files, tensors, dict(provenance or {}))
        output.write_file(MANIFEST_FILE, manifest.to_json().encode())
        output.commit()
    return Path(directory)


def _check_arguments(
    head: Head,
    max_shard_bytes: int,
    extra: Mapping[str, bytes],
    metadata: Mapping[str, str] | None,
    provenance: Mapping[str, Any] | None,
) -> None:
    if head not in HEADS:
        raise InputError("no such head", where="head", expected="one of " + ", ".join(HEADS), found=shown(head))
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise InputError(
            "breaks its rule",
            where="max_shard_bytes",
            expected="a whole number, 1 or above",
            found=shown(max_shard_bytes),
        )
    for name in extra:
        require_plain_name(name, where="extra_files")
        if _fate(name) != "keep":
            raise InputError("a name that the checkpoint itself uses", where="extra_files", found=shown(name))
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError("not a string", where=f"metadata[{shown(key)}]", found=shown(value))
    try:
        json.dumps(dict(provenance or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"not JSON: {error}", where="provenance") from None


def _fate(name: str) -> Fate:
    """What becomes of an old directory's file: a checkpoint's own files go, foreign weights are not thrown away."""
    if name in (CONFIG_FILE, MANIFEST_FILE) or is_weights_name(name):
        return "replace"
    return "refuse" if _FOREIGN_WEIGHTS.fullmatch(name) else "keep"


def _least_bytes(rows: Sequence[TensorSpec], dtype: DtypeChoice) -> int:
    """What the tensors will take; at least two bytes a number where that is not known before they come."""
    chosen = [_choose_dtype(dtype, row) for row in rows]
    return sum(row.size * (2 if one is None else one.itemsize) for row, one in zip(rows, chosen, strict=True))


def _choose_dtype(dtype: DtypeChoice, row: TensorSpec) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    return numpy_dtype(dtype(row) if callable(dtype) and not isinstance(dtype, type) else dtype)


def _config_text(config: GPTJConfig, head: Head, tensors: Mapping[str, TensorRecord]) -> str:
    """config.json as transformers expects it; torch_dtype is the widest that is stored."""
    stored = {tensor.dtype for tensor in tensors.values()}
    widest = max(stored, key=WEIGHT_DTYPES.index)
    kept = {key: value for key, value in config.extra.items() if key != "dtype"}
    return config.replace(extra={**kept, "architectures": [HEADS[head]], "torch_dtype": widest}).to_json()


def _index_text(tensors: Mapping[str, TensorRecord], total_bytes: int) -> str:
    weight_map = {name: tensor.file for name, tensor in tensors.items()}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def _tool() -> str:
    from gptj import __version__

    return f"gptj {__version__}"


# ---- the weights


@dataclasses.dataclass
class _Shard:
    """A weights file in the making.

    Attributes:
        file: the file.
        room: the bytes that are left for the header.
        tensors: name, dtype and shape of each tensor in it.
        hashes: the sha256 of each.
        sizes: the bytes of each.
    """

    file: OutputFile
    room: int
    tensors: list[tuple[str, str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    hashes: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)


class _WeightsWriter:
    """Takes tensors one by one; starts another shard when one is full."""

    def __init__(
        self,
        output: OutputDirectory,
        rows: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        max_shard_bytes: int,
        allow_overflow: bool,
        allow_nonfinite: bool,
    ) -> None:
        self.output = output
        self.rows = rows
        self.metadata = metadata
        self.max_shard_bytes = max_shard_bytes
        self.allow_overflow = allow_overflow
        self.allow_nonfinite = allow_nonfinite
        self.shards: list[_Shard] = []

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(sum(shard.sizes) for shard in self.shards)

    def add(self, number: int, values: NDArray[Any], dtype: np.dtype[Any] | None) -> int:
        """Write the tensor of row `number`; returns its stored bytes."""
        row = self.rows[number]
        if values.shape != row.shape:
            raise SchemaError("wrong shape", where=row.name, expected=row.shape, found=values.shape)
        dtype = _native(values.dtype) if dtype is None else dtype
        if dtype.name not in WEIGHT_DTYPES:
            raise SchemaError(
                "not a dtype of weights", where=row.name, expected=" or ".join(WEIGHT_DTYPES), found=shown(values.dtype)
            )
        nbytes = row.size * dtype.itemsize
        shard = self._shard_for(number, nbytes, dtype.itemsize)
        digest = hashlib.sha256()
        for block in self._blocks(values, dtype, row.name):
            digest.update(block)
            shard.file.write(block)
        shard.tensors.append((row.name, dtype.name, row.shape))
        shard.hashes.append(digest.hexdigest())
        shard.sizes.append(nbytes)
        return nbytes

    def finish(self) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
        """Name the files, and say what is in them."""
        self._close_shard()
        files: dict[str, FileRecord] = {}
        tensors: dict[str, TensorRecord] = {}
        count = len(self.shards)
        for number, (shard, sha256) in enumerate(zip(self.shards, self._file_hashes, strict=True), start=1):
            name = WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            if name != shard.file.name:
                self.output.rename(shard.file.name, name)
            files[name] = FileRecord(shard.file.nbytes, sha256)
            for (tensor, dtype, shape), digest in zip(shard.tensors, shard.hashes, strict=True):
                tensors[tensor] = TensorRecord(name, dtype, shape, digest)
        return files, tensors

    _file_hashes: list[str]

    def _shard_for(self, number: int, nbytes: int, itemsize: int) -> _Shard:
        """The shard to append to: a new one where the last is full, or would leave the tensor unaligned.

        Readers view the data in place, which needs offsets that are multiples of the item size.
        """
        if self.shards:
            shard = self.shards[-1]
            full = sum(shard.sizes) + nbytes > self.max_shard_bytes
            if not full and shard.file.nbytes % itemsize == 0:
                return shard
            self._close_shard()
        else:
            self._file_hashes = []
        if len(self.shards) >= _MOST_SHARDS:
            raise InputError("too small", where="max_shard_bytes", expected=f"at most {_MOST_SHARDS} shards")
        shard = _Shard(self.output.create(f"shard-{len(self.shards) + 1}"), self._room(number))
        shard.file.write(bytes(shard.room))
        self.shards.append(shard)
        return shard

    def _room(self, first: int) -> int:
        """The bytes of the longest header of a file that begins with this row: 8-byte numbers, 4-letter dtypes."""
        rows = [(row.name, "float64", row.shape) for row in self.rows[first:]]
        longest = len(pack_header(rows, self.metadata)) + len(rows)
        return longest + -longest % 8

    def _close_shard(self) -> None:
        """Write the last shard's header, force it to the disk, and compare what the disk holds with what came."""
        shard = self.shards[-1]
        shard.file.rewrite(pack_header(shard.tensors, self.metadata, length=shard.room))
        sha256, parts = shard.file.finish([shard.room, *shard.sizes])
        wrong = [name for (name, _, _), a, b in zip(shard.tensors, shard.hashes, parts[1:], strict=True) if a != b]
        if wrong:
            raise WriteError("what was read back differs from what was written", file=shard.file.path, where=wrong[0])
        _compare_header(shard)
        self._file_hashes.append(sha256)

    def _blocks(self, values: NDArray[Any], dtype: np.dtype[Any], name: str) -> Iterator[memoryview]:
        """The bytes to store: C order, little-endian, cast, some rows at a time."""
        values = values.reshape(1) if values.ndim == 0 else values
        row_bytes = max(values.dtype.itemsize, dtype.itemsize) * (values[:1].size or 1)
        rows = max(1, BLOCK_BYTES // row_bytes)
        for at in range(0, len(values), rows):
            block = values[at : at + rows]
            block = block.astype(_native(block.dtype), order="C", copy=False)
            if not self.allow_nonfinite and not np.isfinite(block).all():
                bad = int((~np.isfinite(block)).sum())
                raise SchemaError(
                    "holds values that are not finite",
                    where=name,
                    found=f"{bad} NaN or infinite in rows {at} to {at + len(block) - 1}",
                    hint="Say allow_nonfinite to write them",
                )
            stored = cast(block, dtype, where=name, allow_overflow=self.allow_overflow)
            yield np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _compare_header(shard: _Shard) -> None:
    """Make sure that our own strict reader and safetensors' both find in the file what was meant."""
    path = shard.file.path
    try:
        ours = [(tensor.name, tensor.dtype, tensor.shape) for tensor in read_safetensors(path).tensors.values()]
        with safe_open(path, framework="numpy") as theirs:
            names = set(theirs.keys())
    except (FormatError, SafetensorError) as error:
        raise WriteError(f"what was written cannot be read back: {error}", file=path) from error
    if ours != shard.tensors or names != {name for name, _, _ in shard.tensors}:
        raise WriteError("the header read back differs from what was written", file=path)
