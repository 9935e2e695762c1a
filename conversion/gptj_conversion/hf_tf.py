"""tf_model.h5: transformers' TFGPTJ weights in an HDF5 file, read and written with h5py alone.

HDF5 can point anywhere: to other files, to devices, through filters, at itself. So h5py is asked only where each
dataset lies, and a dataset that is not one plain run of IEEE numbers inside this very file is refused; the
numbers are then read from the file itself. Names are checked against the lists that Keras keeps beside them.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from gptj.column_sums import ColumnSums
from gptj.config import GPTJConfig
from gptj.errors import (
    BackendError,
    FormatError,
    GPTJError,
    LimitError,
    SchemaError,
    UnsafeFileError,
    WriteError,
    shown,
)
from gptj.extras import install_line
from gptj.manifest import FileRecord
from gptj.output_directory import OutputDirectory, OutputFile
from gptj.safetensors_file import file_identity, open_regular_file
from gptj.schema import Head
from gptj.weight_files import listed
from gptj_conversion.foreign import (
    ForeignCheckpoint,
    match_arrays,
    read_model_config,
    require_index_agrees,
    sharded_files,
)
from gptj_conversion.foreign_writer import Entry
from gptj_conversion.stored_array import StoredArray

__all__ = ["H5_FILE", "H5_INDEX", "H5Writer", "model_prefix", "open_h5", "plain_name", "read_h5"]

H5_FILE = "tf_model.h5"
H5_INDEX = "tf_model.h5.index.json"
_T = TypeVar("_T")

MOST_OBJECTS = 100_000
DEEPEST = 16
_MAGIC = b"\x89HDF\r\n\x1a\n"
_MODEL = re.compile(r"tfgptj_[a-z_0-9]+/")
_SINGLE = re.compile(r"[^/]+/(?P<weight>tfgptj_[a-z_0-9]+/.*)")


def open_h5(
    directory: str | os.PathLike[str],
    *,
    config: GPTJConfig | None = None,
    weights: str = H5_FILE,
    follow_links: bool = False,
) -> ForeignCheckpoint:
    """The TensorFlow checkpoint in a folder. No array is read.

    Args:
        directory: the folder.
        config: in place of the folder's config.json.
        weights: the file, or the index of several.
        follow_links: accept links that lead out of the folder.

    Raises:
        BackendError: h5py is not installed.
        UnsafeFileError: the file points outside itself, or a name or link leads out of the folder.
        FormatError: a file is malformed.
        SchemaError: the arrays are not the model's.
    """
    directory = Path(directory)
    settled = read_model_config(directory, config, follow_links=follow_links)
    files, weight_map = sharded_files(directory, weights, follow_links=follow_links)
    arrays = [array for file in files for array in read_h5(file)]
    plain_map = None if weight_map is None else {plain_name(name): file for name, file in weight_map.items()}
    require_index_agrees(directory / weights, plain_map, ((array.name, array.file.name) for array in arrays))
    return match_arrays(directory, H5_FILE, "tf", settled, arrays)


def plain_name(weight: str) -> str:
    """A variable's name without the name of the model that it was saved from.

    >>> plain_name("tfgptj_for_causal_lm/transformer/wte/weight:0")
    'transformer/wte/weight:0'
    """
    return _MODEL.sub("", weight, count=1) if _MODEL.match(weight) else weight


def model_prefix(head: str) -> str:
    """What transformers calls the model that has this head: the first part of its variables' names."""
    return "tfgptj_model/" if head == "base" else f"tfgptj_for_{head}/"


def import_h5py() -> Any:
    """The h5py module.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise BackendError("h5py is not installed", hint=install_line("convert")) from None
    return h5py


def read_h5(path: Path) -> list[StoredArray]:
    """Every dataset of one file, by its variable's plain name.

    Raises:
        GPTJError: see `open_h5`.
    """
    h5py = import_h5py()
    with open_regular_file(path) as stream:
        identity = file_identity(stream)
        if (head := stream.read(8)) != _MAGIC:
            raise FormatError("not an HDF5 file", file=path, expected=shown(_MAGIC), found=shown(head))
    try:
        with h5py.File(path, "r") as file:
            walk = _Walk(h5py, file, path, identity)
            walk.group(file, "", 0)
            walk.require_listed()
    except GPTJError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"malformed HDF5: {shown(str(error), longest=120)}", file=path) from None
    walk.refuse_overlaps()
    return walk.arrays


class _Walk:
    """Visits every object once and notes where the datasets lie."""

    def __init__(self, h5py: Any, file: Any, path: Path, identity: Any) -> None:
        self.h5py = h5py
        self.file = file
        self.path = path
        self.identity = identity
        self.seen: set[int] = set()
        self.places: dict[str, StoredArray] = {}

    @property
    def arrays(self) -> list[StoredArray]:
        return list(self.places.values())

    def refuse(self, where: str, problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        raise error(problem, file=self.path, where=shown(where)[1:-1] or None, **facts)

    def group(self, group: Any, prefix: str, depth: int) -> None:
        if depth > DEEPEST:
            self.refuse(prefix, "nested too deeply", LimitError, expected=f"at most {DEEPEST} levels")
        for name in group:
            where = f"{prefix}{name}"
            link = group.get(name, getlink=True)
            if type(link) is not self.h5py.HardLink:
                self.refuse(where, f"a link of kind {type(link).__name__}", UnsafeFileError, expected="no links")
            item = group[name]
            address = self.h5py.h5o.get_info(item.id).addr
            if address in self.seen:
                self.refuse(where, "stands twice in the file")
            self.seen.add(address)
            if len(self.seen) > MOST_OBJECTS:
                self.refuse(where, "too many objects", LimitError, expected=f"at most {MOST_OBJECTS}")
            if isinstance(item, self.h5py.Group):
                self.group(item, f"{where}/", depth + 1)
            elif isinstance(item, self.h5py.Dataset):
                self.places[where] = self.dataset(item, where)
            else:
                self.refuse(where, "neither group nor dataset", found=type(item).__name__)

    def dataset(self, dataset: Any, where: str) -> StoredArray:
        """Where the dataset lies, after it has been found to be a plain run of numbers."""
        h5py = self.h5py
        plist = dataset.id.get_create_plist()
        layout = plist.get_layout()
        if layout == h5py.h5d.VIRTUAL or plist.get_external_count():
            self.refuse(where, "keeps its data in other files", UnsafeFileError, expected="data in this file")
        if layout != h5py.h5d.CONTIGUOUS or plist.get_nfilters():
            self.refuse(
                where, "is chunked, compressed or compact", expected="one plain run of numbers, as Keras writes it"
            )
        dtype = dataset.dtype
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or dtype.names or dtype.subdtype:
            self.refuse(where, "not a dtype of weights", SchemaError, expected="float16, 32 or 64", found=shown(dtype))
        if not dataset.id.get_type().equal(h5py.h5t.py_create(dtype)):
            self.refuse(where, "numbers that are not IEEE", SchemaError, found=shown(dtype))
        offset, nbytes = dataset.id.get_offset(), dataset.size * dtype.itemsize
        if dataset.id.get_storage_size() != nbytes or offset is None or offset + nbytes > self.identity[2]:
            self.refuse(
                where, "its bytes are not in the file", expected=f"{nbytes} bytes for {dtype} {dataset.shape}",
                found=f"{dataset.id.get_storage_size()} at {offset} of {self.identity[2]}",
            )  # fmt: skip
        single = _SINGLE.fullmatch(where)
        name = plain_name(single["weight"]) if single else where
        return StoredArray(
            name,
            dtype.newbyteorder("="),
            tuple(dataset.shape),
            self.path,
            self.identity,
            ((offset, nbytes),),
            swapped=not dtype.isnative,
        )

    # ---- the lists that Keras keeps

    def require_listed(self) -> None:
        """Make sure that the file's own lists name as many layers and weights as there are.

        Names of variable length lie in a heap, and libhdf5 loops for ever over one that is damaged (a fuzzer found
        it). So those are counted only; names of fixed length, which older Keras wrote, are compared as well.
        """
        if not any(_SINGLE.fullmatch(where) for where in self.places):
            self.compare(self.file, "layer_names", "", [*self.places])
            return
        self.compare(self.file, "layer_names", "", [name for name in self.file if name != "top_level_model_weights"])
        for layer in dict.fromkeys(where.split("/")[0] for where in self.places):
            weights = [where.removeprefix(f"{layer}/") for where in self.places if where.startswith(f"{layer}/")]
            self.compare(self.file[layer], "weight_names", layer, weights)

    def compare(self, group: Any, key: str, where: str, there: list[str]) -> None:
        """Compare a list of names with what is there."""
        count, listed_names = self.names(group, key, where)
        problems = []
        if listed_names is not None:
            problems = [f"{shown(n)} is listed twice" for n in sorted(set(listed_names)) if listed_names.count(n) > 1]
            problems += [f"{shown(n)} is listed and missing" for n in listed_names if n not in there]
            problems += [f"{shown(n)} is not listed" for n in there if n not in listed_names]
        elif count != len(there):
            problems = [f"{key} lists {count} names, {len(there)} are there"]
        if problems:
            raise SchemaError(
                f"the lists of names and the datasets disagree: {listed(problems)}", file=self.path, where=where or None
            )

    def names(self, group: Any, key: str, where: str) -> tuple[int, list[str] | None]:
        """How many names a list has, and the names where they can be read without danger.

        Keras cuts a list of more than 64 kB into key0, key1, ...
        """
        keys = [key] if key in group.attrs else list(self.numbered(group, key))
        if not keys:
            self.refuse(where or key, f"has no {key}", SchemaError, expected="a file that Keras wrote")
        count = 0
        found: list[str] | None = []
        for one in keys:
            attribute = group.attrs.get_id(one)
            if len(attribute.shape) != 1 or attribute.shape[0] > MOST_OBJECTS:
                self.refuse(where or key, f"{one} breaks its rule", expected="a list of names", found=attribute.shape)
            count += attribute.shape[0]
            if found is None or attribute.dtype.kind != "S" or attribute.get_storage_size() > 2**20:
                found = None
            else:
                found += [value.decode("utf-8", "backslashreplace") for value in group.attrs[one].tolist()]
        return count, found

    def numbered(self, group: Any, key: str) -> Iterator[str]:
        number = 0
        while f"{key}{number}" in group.attrs:
            yield f"{key}{number}"
            number += 1

    def refuse_overlaps(self) -> None:
        """Refuse datasets that share bytes."""
        last = (0, 0, "")
        for offset, nbytes, where in sorted((*array.extents[0], where) for where, array in self.places.items()):
            if nbytes and offset < sum(last[:2]):
                self.refuse(where, "shares bytes with another dataset", found=shown(last[2]))
            if nbytes:
                last = (offset, nbytes, where)


# ---- writing


class _Sink(io.RawIOBase):
    """The file of the stage as h5py writes it, so that its bytes go through the same calls as all others.

    A failure is kept, and what comes after it is dropped: HDF5 would try again whenever one of its objects is let go
    of, and print a traceback each time. An interrupt is kept too: HDF5 calls on with the exception pending, under
    which Python may not even find an attribute, so that Ctrl-C could end as an AttributeError.
    """

    def __init__(self, file: OutputFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0
        self.failure: BaseException | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.nbytes}
        self._at = starts[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._try(self._file.write_at, self._at, view)
        self._at += len(view)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        data = self._try(self._file.read_at, self._at, len(buffer)) or b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        if size > self._file.nbytes:
            self._try(self._file.write_at, size - 1, b"\0")
        return size

    def _try(self, function: Callable[..., _T], *arguments: Any) -> _T | None:
        if self.failure is None:
            try:
                return function(*arguments)
            except BaseException as error:  # `H5Writer` raises it again when HDF5 has returned
                self.failure = error
        return None


class H5Writer:
    """Writes one file of a TensorFlow checkpoint; see `foreign_writer.WeightsWriter`.

    A single file has Keras's two levels, layer and weight, with the model's own name between; the files of a sharded
    checkpoint have the plain names. h5py lays the file out itself, so its data is compared through our reader.
    """

    def __init__(self, output: OutputDirectory, name: str, entries: Sequence[Entry], head: Head) -> None:
        self._h5py = import_h5py()
        self._stage_file = output.create(name)
        self._sink = _Sink(self._stage_file)
        self._prefix = model_prefix(head)
        self._sharded = name != H5_FILE
        self._layers: dict[str, list[str]] = {}
        self._sums: dict[str, str] = {}
        self._file = self._do(self._h5py.File, self._sink, "w")
        output.on_leaving(self._file.close)  # else its objects write, or crash, whenever Python lets go of them

    def add(self, entry: Entry, blocks: Iterable[memoryview]) -> None:
        """Write the next array."""
        if entry.dtype.name == "bfloat16":
            raise SchemaError("HDF5 has no bfloat16", where=entry.name, hint="Choose float32, or float16 if it fits")
        layer = entry.name.split("/")[0]
        self._layers.setdefault(layer, []).append(self._prefix + entry.name)
        path = entry.name if self._sharded else f"{layer}/{self._prefix}{entry.name}"
        dataset = self._do(self._file.create_dataset, path, entry.shape, entry.dtype)
        sums = ColumnSums()
        at = 0
        for block in blocks:
            sums.update(block)
            rows = np.frombuffer(block, entry.dtype).reshape(-1, *entry.shape[1:])
            self._do(dataset.__setitem__, slice(at, at + len(rows)), rows)
            at += len(rows)
        self._sums[entry.name] = sums.hexdigest()

    def finish(self) -> FileRecord:
        """Close the file, force it to the disk, and compare what it gives back."""
        self._do(self._write_lists)
        self._do(self._file.close)
        file = self._stage_file
        [whole] = file.read_back([file.nbytes], hashlib.sha256)
        for array in read_h5(file.path):
            values = array.read(array.dtype).reshape(-1).view(np.uint8).data
            if _sum_of(values) != self._sums.pop(array.name):
                raise WriteError("what was read back differs from what was written", file=file.path, where=array.name)
        if self._sums:
            raise WriteError("an array was not written", file=file.path, where=next(iter(self._sums)))
        return FileRecord(file.nbytes, whole, file.nbytes)

    def _do(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """What h5py does, unless something could not be written, whatever h5py made of that."""
        try:
            done = function(*arguments)
        except BaseException:
            if self._sink.failure is None:
                raise
        if self._sink.failure is not None:
            raise self._sink.failure
        return done

    def _write_lists(self) -> None:
        text = self._h5py.string_dtype()
        if self._sharded:
            names = [name.removeprefix(self._prefix) for weights in self._layers.values() for name in weights]
            self._file.attrs["layer_names"] = np.array(names, dtype=text)
            return
        self._file.attrs["layer_names"] = np.array([*self._layers], dtype=text)
        self._file.attrs["backend"] = "tensorflow"
        for layer, weights in self._layers.items():
            self._file[layer].attrs["weight_names"] = np.array(weights, dtype=text)
        self._file.create_group("top_level_model_weights").attrs["weight_names"] = np.array([], dtype="S1")


def _sum_of(data: memoryview) -> str:
    sums = ColumnSums()
    sums.update(data)
    return sums.hexdigest()
