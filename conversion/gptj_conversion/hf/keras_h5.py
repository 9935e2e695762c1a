"""tf_model.h5: transformers' TFGPTJ weights in an HDF5 file, read and written with h5py alone.

HDF5 can point anywhere: to other files, to devices, through filters, at itself. So h5py is asked only where each
dataset lies, in a process of its own (`h5_survey`), and a dataset that is not one plain run of IEEE numbers inside this
very file is refused; the numbers are then read from the file itself. Names are checked against the lists that Keras
keeps beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gptj.config.schema import Head
from gptj.errors import BackendError, FormatError, SchemaError, WriteError, install_line, shown, warn_of
from gptj.reading.files import FileIdentity, file_identity, open_regular_file
from gptj.reading.manifest import FileRecord
from gptj.reading.weight_names import plain_variable
from gptj.writing.column_sums import ColumnSums
from gptj.writing.containers import Entry
from gptj.writing.output_directory import OutputDirectory
from gptj.writing.output_file import OutputFile
from gptj_conversion.common.stored_array import StoredArray
from gptj_conversion.hf.h5_process import H5Process

__all__ = ["H5_FILE", "H5_INDEX", "H5Writer", "model_prefix", "read_h5", "read_h5_files"]

H5_FILE = "tf_model.h5"
H5_INDEX = "tf_model.h5.index.json"
_T = TypeVar("_T")

BYTE_ORDER_SAMPLE = 2**16
"""Numbers that show in which byte order a dataset is."""

_MAGIC = b"\x89HDF\r\n\x1a\n"
_SINGLE = re.compile(r"[^/]+/(?P<weight>tfgptj_[a-z_0-9]+/.*)")


def model_prefix(head: str) -> str:
    """The name that transformers gives the model with this head: the first part of its variables' names."""
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


def read_h5(path: Path, *, process: H5Process | None = None) -> list[StoredArray]:
    """Every dataset of one file, by its variable's plain name.

    Args:
        path: the file.
        process: where libhdf5 reads it; None starts one for this file alone.

    Raises:
        BackendError: h5py is not installed.
        UnsafeFileError: the file points outside itself.
        FormatError: the file is malformed.
    """
    import_h5py()
    with open_regular_file(path) as stream:
        identity = file_identity(stream)
        if (head := stream.read(8)) != _MAGIC:
            raise FormatError("not an HDF5 file", file=path, expected=shown(_MAGIC), found=shown(head))
    if process is None:
        with H5Process() as own:
            found = own.survey(path)
    else:
        found = process.survey(path)
    arrays = [_stored_array(path, identity, where, place) for where, place in found.items()]
    _require_byte_orders(arrays)
    return arrays


def read_h5_files(paths: Iterable[Path]) -> list[StoredArray]:
    """Every dataset of several files, by one process of libhdf5; see `read_h5`."""
    with H5Process() as process:
        return [array for path in paths for array in read_h5(path, process=process)]


def _require_byte_orders(arrays: Sequence[StoredArray]) -> None:
    """Look at the numbers of datasets whose byte order is not the others'; a single bit of the file says so.

    Raises:
        FormatError: they make sense in the others' byte order only.
    """
    swapped = [array for array in arrays if array.swapped]
    odd = swapped if 2 * len(swapped) <= len(arrays) else [array for array in arrays if not array.swapped]
    for array in odd if len(swapped) < len(arrays) else []:
        count = min(math.prod(array.shape), BYTE_ORDER_SAMPLE)
        run = ((array.extents[0][0], count * array.dtype.itemsize),)
        values = dataclasses.replace(array, shape=(count,), extents=run).read(array.dtype)
        others = values.byteswap()
        are, would_be = _are_weights(values), _are_weights(others)
        if would_be and not are:
            raise FormatError(
                "its numbers make sense in the other byte order only, which the file's other datasets have",
                file=array.file, where=array.name, hint="The file is damaged; fetch it again",
            )  # fmt: skip
        if would_be == are and values.tobytes() != others.tobytes():
            warn_of("its byte order is not that of the file's other datasets", file=array.file, where=array.name)


def _are_weights(values: NDArray[Any]) -> bool:
    """Whether the numbers have the size of weights: in the wrong byte order, their exponents are anything."""
    sizes = np.abs(values[values != 0].astype(np.float64))
    return bool(np.isfinite(sizes).all() and (sizes > 1e-30).all() and (sizes < 1e4).all())


def _stored_array(path: Path, identity: FileIdentity, where: str, place: Mapping[str, Any]) -> StoredArray:
    single = _SINGLE.fullmatch(where)
    name = plain_variable(single["weight"]) if single else where
    layer, wanted = where.split("/")[0], name.split("/")[0]
    if single and layer != wanted:  # by whose name transformers looks for it, and else leaves it at random numbers
        raise SchemaError(
            "stands in another layer's group", file=path, where=shown(where)[1:-1], expected=shown(wanted),
            found=shown(layer),
        )  # fmt: skip
    return StoredArray(
        name,
        np.dtype(place["dtype"]),
        tuple(place["shape"]),
        path,
        identity,
        ((place["offset"], place["nbytes"]),),
        swapped=place["swapped"],
    )


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
    """Writes one file of a TensorFlow checkpoint; see `gptj.writing.containers.NamedContainer`.

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
        """Call a function of h5py; if the file could not be written, raise that error, whatever h5py made of it."""
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
