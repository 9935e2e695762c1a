"""Writing a checkpoint: one tensor at a time, each file read back, the directory swapped in as a whole.

What is the same in every format stands in `folder`, how tensors become files in `safetensors_shards`, how files become
a directory in `output_directory`; here is what belongs to a checkpoint besides its weights, and the one door.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import HEADS, Head, TensorSpec, schema
from gptj.errors import InputError, shown
from gptj.reading.manifest import (
    CONFIG_HASH_KEY,
    Fingerprint,
    Origin,
)
from gptj.reading.safetensors_file import WEIGHT_DTYPES
from gptj.reading.weight_files import INDEX_FILE, is_weights_name
from gptj.writing.extra_files import check_extra_files, choose_fate
from gptj.writing.file_system import FileSystem
from gptj.writing.folder import FolderWriter, ManifestFacts, TensorObserver, WritingOrder
from gptj.writing.journal import WritingRules
from gptj.writing.output_directory import Fate, OutputDirectory
from gptj.writing.safetensors_shards import SafetensorsShards
from gptj.writing.shards import index_text
from gptj.writing.shared_directory import SharedDirectory

__all__ = ["DtypeChoice", "check_head_and_size", "write_checkpoint", "written_config"]

DtypeChoice = str | Callable[[TensorSpec], str] | None
"""The dtype that tensors are stored in: one for all, one for each row, or None: as they come."""


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    read: Callable[[TensorSpec], NDArray[Any]],
    *,
    head: Head = "causal_lm",
    dtype: DtypeChoice = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    beside_others: bool = False,
    metadata: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Callable[[str, int], None] | None = None,
    allow_overflow: bool = False,
    allow_nonfinite: bool = False,
    origin: Callable[[TensorSpec], Origin] | None = None,
    examine: Callable[[Path], Fingerprint | None] | None = None,
    witness: TensorObserver | None = None,
    input_identity: Any = None,
    resume: bool = False,
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
        beside_others: whether it may hold files and folders that are no checkpoint's, as a trainer's output folder
            does; they stay as they are, and `overwrite` is needed only where a file would be replaced.
        metadata: strings for the weights' headers.
        provenance: where the weights came from, for manifest.json; anything that JSON can say.
        extra_files: further files by name.
        progress: told the name and stored bytes of each tensor when it has been written.
        allow_overflow: let a narrowing cast turn finite values into infinity.
        allow_nonfinite: write NaN and infinity.
        origin: where a row's tensor comes from, for manifest.json.
        examine: told where the finished directory stands before it is swapped in, without its manifest; raises to
            refuse it, and returns the fingerprint for the manifest.
        witness: shown each tensor as it is stored, for `examine` to ask.
        input_identity: what the tensors are read from, in any way that JSON can say and that changes when they
            do. With it, a writer that is killed can be continued.
        resume: go on from what a killed writer of the same input and arguments left, after its finished files have
            been hashed again. Then an interrupt leaves what there is for the next.
        fs: the system calls, for tests.

    Raises:
        WriteError: the directory may not be replaced or could not be written.
        SchemaError: a tensor has another shape, is not made of floating-point numbers, is not finite, or overflows.
        InputError: an argument breaks its rule.
    """
    extra = dict(extra_files or {})
    _check_arguments(head, max_shard_bytes, extra, metadata, provenance)
    if resume and input_identity is None:
        raise InputError("is needed to resume", where="input_identity")
    header = {**(metadata or {}), "format": "pt", CONFIG_HASH_KEY: config.architecture_sha256}
    rules = WritingRules(max_shard_bytes, allow_overflow, allow_nonfinite)
    chosen = {row.name: _choose_dtype(dtype, row) for row in schema(config, head)}
    facts = ManifestFacts(
        provenance=provenance or {}, origin=origin, examine=examine, input_identity=input_identity, resume=resume,
        observer=witness,
    )  # fmt: skip
    order = WritingOrder("safetensors", config, head, chosen, rules, facts, details=header)
    kind = SharedDirectory if beside_others else OutputDirectory
    with (
        kind(directory, overwrite=overwrite, fate=_fate_beside(extra), adopt=facts.adopt, fs=fs) as output,
        FolderWriter(output, order) as writer,
    ):
        weights = SafetensorsShards(writer, header)
        first = weights.resume()
        output.require_space(_least_bytes(order, first))
        for number, row in enumerate(order.rows):
            nbytes = 0
            if number >= first:
                nbytes = weights.add(number, np.asarray(read(row)))
            if progress is not None:
                progress(row.name, nbytes)
        weights.finish()
        tensors = writer.tensors
        text = written_config(config, head, {tensor.dtype for tensor in tensors.values()}).to_json()
        texts = {CONFIG_FILE: text.encode(), **extra}
        if len(writer.notes) > 1:
            places = {name: tensor.files[0] for name, tensor in tensors.items()}
            total = sum(record.nbytes - record.hashed_bytes for note in writer.notes for record in note.files.values())
            texts[INDEX_FILE] = index_text(places, total)
        writer.finish(texts, in_order=True)
    return Path(directory)


def _check_arguments(
    head: Head,
    max_shard_bytes: int,
    extra: Mapping[str, bytes],
    metadata: Mapping[str, str] | None,
    provenance: Mapping[str, Any] | None,
) -> None:
    check_head_and_size(head, max_shard_bytes)
    check_extra_files(extra, lambda name: choose_fate(name, is_weights_name) != "keep")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError("not a string", where=f"metadata[{shown(key)}]", found=shown(value))
    try:
        json.dumps(dict(provenance or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"not JSON: {error}", where="provenance") from None


def check_head_and_size(head: str, max_shard_bytes: int) -> None:
    """Raise InputError unless there is such a head, and weights can be cut into files of so many bytes."""
    if not isinstance(head, str) or head not in HEADS:
        raise InputError("no such head", where="head", expected="one of " + ", ".join(HEADS), found=shown(head))
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise InputError(
            "breaks its rule",
            where="max_shard_bytes",
            expected="a whole number, 1 or above",
            found=shown(max_shard_bytes),
        )


def _fate_beside(extra: Mapping[str, bytes]) -> Callable[[str], Fate]:
    """The fate of an old directory's file, where further files replace those of their names."""
    return lambda name: "replace" if name in extra else choose_fate(name, is_weights_name)


def _least_bytes(order: WritingOrder, first: int) -> int:
    """The fewest bytes that the tensors from row `first` on can take: two a number where the dtype is not known yet."""
    dtypes = ((row, order.dtypes[row.name]) for row in order.rows[first:])
    return sum(row.size * (2 if dtype is None else numpy_dtype(dtype).itemsize) for row, dtype in dtypes)


def _choose_dtype(dtype: DtypeChoice, row: TensorSpec) -> str | None:
    if dtype is None:
        return None
    return numpy_dtype(dtype(row) if callable(dtype) and not isinstance(dtype, type) else dtype).name


def written_config(config: GPTJConfig, head: Head, stored: Iterable[str]) -> GPTJConfig:
    """The config of a config.json as transformers expects it; torch_dtype is the widest of the dtypes in `stored`.

    Its qa_outputs has num_labels rows and ours a start and an end, so with that head num_labels is 2, whatever a
    base model's config said.
    """
    widest = max(stored, key=WEIGHT_DTYPES.index)
    config = config.for_other_programs()
    kept = {key: value for key, value in config.extra.items() if key != "dtype"}
    if head == "question_answering" and config.num_labels != 2:
        config = config.replace(num_labels=2)
    return config.replace(extra={**kept, "architectures": [HEADS[head]], "torch_dtype": widest})
