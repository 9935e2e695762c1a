"""Writing the formats whose arrays have names: one file or several and an index, swapped in as a whole.

What the containers share is here: which tensor goes to which file, how it is spelt and turned, config.json,
the index and the manifest. A container only knows how to put named runs of bytes into a file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import Head, TensorSpec, schema
from gptj.reading.files import BLOCK_BYTES
from gptj.writing.checkpoint_writer import check_head_and_size, written_config
from gptj.writing.containers import Entry, NamedContainer
from gptj.writing.extra_files import check_extra_files, choose_fate
from gptj.writing.folder import FolderWriter, WritingOptions, WritingOrder
from gptj.writing.journal import whole_files
from gptj.writing.output_directory import Fate, OutputDirectory
from gptj.writing.shards import cut_sizes, index_text, shard_name
from gptj_conversion.common.dialects import Dialect, Spelling, spell
from gptj_conversion.common.plan import PlannedFile
from gptj_conversion.common.transpose import copy_transposed

__all__ = ["plan_foreign", "write_foreign"]


def write_foreign(
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    read: Callable[[TensorSpec], NDArray[Any]],
    writer: type[NamedContainer],
    *,
    file_name: str,
    dialect: Dialect,
    dtype_of: Callable[[str], str],
    head: Head = "causal_lm",
    index_prefix: str = "",
    weights_format: str,
    options: WritingOptions | None,
) -> Path:
    """The directory, written whole: config.json, the weights, an index where they are in several files, manifest.json.

    Args:
        directory: where; its parent must exist.
        config, head: the model.
        read: gives the tensor of a row; called once a row.
        writer: the container.
        file_name: of the weights, `flax_model.msgpack`; shards and index are named after it.
        dialect: how arrays are spelt and turned.
        dtype_of: the dtype to store a canonical tensor in.
        index_prefix: what the index puts before each name.
        weights_format: what the manifest calls the format; the dialect if empty.
        options: whatever any writer may be told.

    Raises:
        WriteError, SchemaError, InputError: as for `gptj.writing.checkpoint_writer.write_checkpoint`.
    """
    options = options or WritingOptions()
    check_head_and_size(head, options.max_shard_bytes)
    fate = _fate_for(file_name)
    extra = dict(options.extra_files)
    check_extra_files(extra, lambda name: fate(name) != "keep")
    entries = _entries(config, head, dialect, dtype_of)
    shards = _cut(file_name, entries, options.max_shard_bytes)
    places = {entry.row.name: (name,) for name, shard in shards.items() for entry in shard}
    order = WritingOrder(
        weights_format or dialect,
        config,
        head,
        {entry.row.name: entry.dtype.name for entry in entries},
        options.rules,
        options.facts,
        details=file_name,
        files_of=places.__getitem__,
    )
    with (
        OutputDirectory(
            directory, overwrite=options.overwrite, fate=fate, adopt=options.facts.adopt, fs=options.fs
        ) as output,
        FolderWriter(output, order) as folder,
    ):
        parts = [order.planned_part([name], [entry.row for entry in shard]) for name, shard in shards.items()]
        finished = folder.resume(whole_files(output, parts))
        names = [*shards]
        output.require_space(sum(entry.nbytes for name in names[finished:] for entry in shards[name]))
        for number, (name, shard) in enumerate(shards.items()):
            file = writer(output, name, shard, head) if number >= finished else None
            for entry in shard:
                if file is not None:
                    file.add(entry, _blocks_of(entry, folder, read(entry.row)))
                options.tell(entry.row.name, 0 if file is None else entry.nbytes)
            if file is not None:
                folder.finish_part({name: file.finish()})
        stored = [entry.dtype.name for entry in entries]
        texts = {CONFIG_FILE: written_config(config, head, stored).to_json().encode(), **extra}
        if len(shards) > 1:
            arrays = {index_prefix + entry.name: name for name, shard in shards.items() for entry in shard}
            total = sum(entry.nbytes for entry in entries)
            texts[f"{file_name}.index.json"] = index_text(dict(sorted(arrays.items())), total)
        folder.finish(texts)
    return Path(directory)


def plan_foreign(
    config: GPTJConfig,
    *,
    file_name: str,
    dialect: Dialect,
    dtype_of: Callable[[str], str],
    head: Head,
    max_shard_bytes: int,
) -> tuple[PlannedFile, ...]:
    """The weights files that `write_foreign` would write."""
    check_head_and_size(head, max_shard_bytes)
    shards = _cut(file_name, _entries(config, head, dialect, dtype_of), max_shard_bytes)
    return tuple(PlannedFile(name, len(shard), sum(entry.nbytes for entry in shard)) for name, shard in shards.items())


def _entries(config: GPTJConfig, head: Head, dialect: Dialect, dtype_of: Callable[[str], str]) -> list[Entry]:
    """The entries to write, in an order in which names with the same beginning stand together."""
    rows = schema(config, head)
    entries = [_entry(row, numpy_dtype(dtype_of(row.name)), _with_prefix(row, head, dialect)) for row in rows]
    if dialect == "pt":
        return entries
    place = {part: n for n, part in enumerate(dict.fromkeys(p for e in entries for p in e.name.split("/")))}
    return sorted(entries, key=lambda entry: [place[part] for part in entry.name.split("/")])


def _with_prefix(row: TensorSpec, head: Head, dialect: Dialect) -> Spelling:
    """A base model's variables are called transformer/... in TensorFlow, and only there."""
    if head == "base" and dialect == "tf":
        return spell("transformer." + row.name, dialect)
    return spell(row.name, dialect)


def _entry(row: TensorSpec, dtype: np.dtype[Any], spelling: Spelling) -> Entry:
    return Entry(row, dtype, spelling.name, spelling.transposed)


def _cut(file_name: str, entries: Sequence[Entry], max_shard_bytes: int) -> dict[str, list[Entry]]:
    """The entries of each weights file, by its name."""
    left = iter(entries)
    counts = cut_sizes([(entry.nbytes, 1) for entry in entries], max_shard_bytes)
    return {
        shard_name(file_name, number, len(counts)): [*itertools.islice(left, count)]
        for number, count in enumerate(counts, start=1)
    }


def _fate_for(file_name: str) -> Callable[[str], Fate]:
    """The fate of each file of an old directory, where weights files are named after `file_name`."""
    stem, suffix = file_name.rsplit(".", 1)
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?")
    return lambda name: choose_fate(name, lambda name: bool(ours.fullmatch(name)))


def _blocks_of(entry: Entry, folder: FolderWriter, values: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of a canonical tensor in the format's layout, some rows at a time; recorded when all were taken."""
    if not entry.transposed:
        yield from folder.store_blocks(entry.row, values, entry.dtype)
        return
    stored = folder.store(entry.row, values, entry.dtype)
    rows = max(1, BLOCK_BYTES // (entry.shape[1] * entry.dtype.itemsize))
    for at in range(0, entry.shape[0], rows):
        part = stored[:, at : at + rows]
        block = np.empty(part.shape[::-1], entry.dtype)
        copy_transposed(block, part)
        yield block.reshape(-1).view(np.uint8).data
