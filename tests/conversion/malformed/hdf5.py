"""HDF5 whose structure leads libhdf5 astray, and whose lists and datasets are not what Keras writes."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gptj_conversion.convert import convert
from gptj_conversion.hf.h5_process import H5Process
from gptj_conversion.hf.keras_h5 import read_h5

from malformed import Malformed

TITLE = "HDF5"
GOOD = Path(__file__).parents[2] / "data" / "foreign" / "tf"
FILE = "tf_model.h5"
LAYER, INNER = "transformer", "transformer/tfgptj_for_causal_lm"
WTE = f"{INNER}/transformer/wte/weight:0"


def door(folder: Path) -> object:
    return convert(folder / "in", folder / "out", fingerprint=False)


def spoilt(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Makes the good folder with the bytes of its weights changed."""

    def make(folder: Path) -> None:
        shutil.copytree(GOOD, folder / "in")
        (folder / "in" / FILE).write_bytes(change((GOOD / FILE).read_bytes()))

    return make


def edited(change: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    """Makes the good folder with its weights changed by h5py."""

    def make(folder: Path) -> None:
        shutil.copytree(GOOD, folder / "in")
        with h5py.File(folder / "in" / FILE, "r+") as file:
            change(file)

    return make


def put(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


def places(signature: bytes) -> list[tuple[int, int]]:
    """Number and place of some structures of a kind: the root's, a layer's, a block's, and the last that is read."""
    found = [match.start() for match in re.finditer(re.escape(signature), (GOOD / FILE).read_bytes())]
    return [(number, found[number]) for number in sorted({0, 1, 5, len(found) - 2} & {*range(len(found))})]


def with_endless_heap(data: bytes, number: int = 0) -> bytes:
    """A local heap's first free block becomes its own successor."""
    at = [match.start() for match in re.finditer(b"HEAP", data)][number]
    head, segment = struct.unpack_from("<QQ", data, at + 16)
    assert head != 1, "the heap is full"
    return put(segment + head, struct.pack("<Q", head))(data)


def structures() -> Iterator[Malformed]:
    """The same few lies in every heap, tree and node of the file."""
    data = (GOOD / FILE).read_bytes()
    q = lambda value: struct.pack("<Q", value)  # noqa: E731
    for number, at in places(b"HEAP"):
        head, segment = struct.unpack_from("<QQ", data, at + 16)
        if head != 1:
            yield case(f"heap {number}: a free block is its own successor", put(segment + head, q(head)))
            yield case(f"heap {number}: a free block of 2^60 bytes", put(segment + head + 8, q(2**60)))
        yield case(f"heap {number}: its data is itself", put(at + 24, q(at)))
        yield case(f"heap {number}: 2^62 bytes", put(at + 8, q(2**62)))
        yield case(f"heap {number}: the free list lies outside", put(at + 16, q(2**40)))
    for number, at in places(b"TREE"):
        yield case(f"tree {number}: its own child", put(at + 32, q(at)))
        yield case(f"tree {number}: 65,535 entries", put(at + 6, struct.pack("<H", 65535)))
        yield case(
            f"tree {number}: level 255, its own child", lambda d, at=at: put(at + 5, b"\xff")(put(at + 32, q(at))(d))
        )
        yield case(f"tree {number}: its child lies outside", put(at + 32, q(2**50)))
    for number, at in places(b"SNOD"):
        yield case(f"node {number}: 65,535 symbols", put(at + 6, struct.pack("<H", 65535)))
        header = struct.unpack_from("<Q", data, at + 16)[0]
        yield case(f"node {number}: an object that is the file's head", put(at + 16, q(0)))
        yield case(f"node {number}: an object header of no version", put(header, b"\x09"))
        yield case(f"node {number}: an object header of 2^31 bytes", put(header + 8, struct.pack("<I", 2**31)))
    for number, at in places(b"GCOL"):
        yield case(f"names {number}: a heap of no bytes", put(at + 8, q(0)))
        yield case(f"names {number}: a heap of 2^60 bytes", put(at + 8, q(2**60)))
        yield case(f"names {number}: an object of 2^40 bytes", put(at + 24, q(2**40)))


def case(what: str, change: Callable[[bytes], bytes]) -> Malformed:
    return Malformed(what, spoilt(change), door, FILE)


def with_list(path: str, key: str, values: Any, dtype: Any = None) -> Callable[[Path], None]:
    """Makes a file whose list of names at `path` is another."""
    return edited(lambda file: file[path].attrs.__setitem__(key, np.array(values, dtype=dtype)))


def moved(file: h5py.File, old: str, new: str) -> None:
    file.move(old, new)


def replaced(file: h5py.File, **options: Any) -> None:
    del file[WTE]
    file.create_dataset(WTE, **options)


def references(file: h5py.File) -> None:
    there = np.array([file[LAYER].ref] * 3, dtype=h5py.ref_dtype)
    replaced(file, data=there)


def reference_list(file: h5py.File) -> None:
    file.attrs["layer_names"] = np.array([file[name].ref for name in file], dtype=h5py.ref_dtype)


TWICE, GHOST = [b"transformer", b"transformer", b"lm_head"], [b"transformer", b"ghost", b"lm_head"]

LISTS = [
    Malformed("layer_names are numbers", with_list("/", "layer_names", [1, 2]), door, "layer_names"),
    Malformed("layer_names are floats", with_list("/", "layer_names", [1.0, 2.0, 3.0]), door, "layer_names"),
    Malformed("layer_names is one name", with_list("/", "layer_names", b"transformer", "S11"), door, "layer_names"),
    Malformed("layer_names has two axes", with_list("/", "layer_names", [[b"transformer"]]), door, "layer_names"),
    Malformed("layer_names are references", edited(reference_list), door, "layer_names"),
    Malformed("layer_names is empty", with_list("/", "layer_names", [], "S1"), door, "layer_names"),
    Malformed("a layer twice", with_list("/", "layer_names", TWICE), door, "twice"),
    Malformed("a layer that is absent", with_list("/", "layer_names", GHOST), door, "ghost"),
    Malformed("a layer misspelt", with_list("/", "layer_names", [b"transfomer", b"lm_head"]), door, "transfomer"),
    Malformed("a layer left out", with_list("/", "layer_names", [b"lm_head"]), door, "'transformer' is not listed"),
    Malformed("weight_names are numbers", with_list(LAYER, "weight_names", [1, 2]), door, "weight_names"),
    Malformed("weight_names is one number", with_list(LAYER, "weight_names", 7), door, "weight_names"),
    Malformed("weight_names of another layer", with_list("lm_head", "weight_names", [b"x:0"]), door, "lm_head"),
    Malformed("a layer's group misspelt", edited(lambda f: moved(f, LAYER, "transfomer")), door, "transfomer"),
    Malformed(
        "a model's group misspelt",
        edited(lambda f: moved(f, INNER, f"{LAYER}/tfgptj_for_casual_lm")),
        door,
        "weight_names",
    ),
    Malformed("a weight misspelt", edited(lambda f: moved(f, WTE, WTE.replace("wte", "wet"))), door, "wet"),
    Malformed("a group that no list names", edited(lambda f: f.create_group("spare")), door, "spare"),
    Malformed("a dataset that no list names", edited(lambda f: f.create_dataset("spare", data=[1.0])), door, "spare"),
    Malformed("a weight beside the listed", edited(lambda f: f.create_dataset(f"{LAYER}/x", data=[1.0])), door, "x"),
    Malformed(
        "a layer's group and its list misspelt alike",
        edited(lambda f: (moved(f, "lm_head", "lm_haed"), f.attrs.create("layer_names", [b"lm_haed", b"transformer"]))),
        door,
        "lm_haed",
    ),
    Malformed(
        "a list of the top level that names a weight",
        with_list("top_level_model_weights", "weight_names", [b"ghost:0"]),
        door,
        "ghost",
    ),
    Malformed("object references", edited(references), door, "object references"),
    Malformed("text", edited(lambda f: replaced(f, data=["a", "b"])), door, "wte"),
    Malformed("complex numbers", edited(lambda f: replaced(f, data=np.zeros((40, 12), "c8"))), door, "wte"),
    Malformed("bools", edited(lambda f: replaced(f, data=np.zeros((40, 12), bool))), door, "wte"),
    Malformed("no data", edited(lambda f: replaced(f, data=h5py.Empty("f4"))), door, "wte"),
    Malformed("one number", edited(lambda f: replaced(f, data=1.0)), door, "wte"),
    Malformed("33 axes", edited(lambda f: replaced(f, shape=(1,) * 32, dtype="f4")), door, "wte"),
]


def with_weights_at(address: int) -> Callable[[bytes], bytes]:
    """The address of wte's numbers, in its object header, becomes another."""
    with h5py.File(GOOD / FILE, "r") as file:
        old = struct.pack("<Q", file[WTE].id.get_offset())

    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, struct.pack("<Q", address))

    return change


PLACES = [case(f"weights at byte {address}", with_weights_at(address)) for address in (0, 8, 90, 680, 2000, 2**40)]


# ---- one changed field of one dataset, read by one process for all


@functools.cache
def shared_process() -> H5Process:
    process = H5Process()
    atexit.register(process.close)
    return process


def read_all(folder: Path) -> object:
    """A door: what `convert` opens and reads, with a process that outlives it."""
    return [array.read(array.dtype) for array in read_h5(folder / "in" / FILE, process=shared_process())]


def spoilt_file(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Makes a folder of the weights alone, with their bytes changed."""

    def make(folder: Path) -> None:
        (folder / "in").mkdir()
        (folder / "in" / FILE).write_bytes(change((GOOD / FILE).read_bytes()))

    return make


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset: its name, where its numbers lie, and where its header says so and says the byte order."""

    name: str
    begin: int
    nbytes: int
    address_at: int
    order_at: int


def datasets() -> list[Dataset]:
    data, found = (GOOD / FILE).read_bytes(), []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            begin, nbytes = item.id.get_offset(), item.id.get_storage_size()
            header = h5py.h5o.get_info(item.id).addr
            address_at = data.index(b"\x03\x01" + struct.pack("<QQ", begin, nbytes), header) + 2
            order_at = data.index(b"\x11\x20\x1f\x00\x04\x00\x00\x00", header) + 1
            found.append(Dataset(name.split("/", 2)[2], begin, nbytes, address_at, order_at))

    with h5py.File(GOOD / FILE, "r") as file:
        file.visititems(note)
    return found


def field_lies() -> Iterator[Malformed]:
    """Each dataset's numbers in each kind of structure, over a neighbour's, and in the other byte order."""
    data = (GOOD / FILE).read_bytes()
    kinds = {"tree": b"TREE", "heap": b"HEAP", "node": b"SNOD", "heap of texts": b"GCOL"}
    listed = datasets()
    for one in listed:
        places = {}
        for kind, signature in kinds.items():
            at = [match.start() for match in re.finditer(signature, data)][-1]
            places[kind] = min(at, len(data) - one.nbytes)
            places[f"end of a {kind}"] = at + 24
        places["names of a group"] = struct.unpack_from("<Q", data, data.rindex(b"HEAP") + 24)[0]
        places["header of itself"] = one.address_at - 64
        other = max((o for o in listed if o is not one), key=lambda o: o.nbytes)
        places["numbers of another"] = other.begin + 8
        for what, address in places.items():
            change = put(one.address_at, struct.pack("<Q", address))
            yield Malformed(f"{one.name} in the {what}", spoilt_file(change), read_all, FILE)
        swapped = put(one.order_at, b"\x21")
        yield Malformed(f"{one.name} in the other byte order", spoilt_file(swapped), read_all, one.name)
    for before, one in itertools.pairwise(sorted(listed, key=lambda o: o.begin)):
        end = before.begin + before.nbytes
        for by in (4, 8, 16):
            if end + by <= one.begin and not any(data[end : end + by]):
                change = put(before.address_at, struct.pack("<Q", before.begin + by))
                yield Malformed(f"{before.name} {by} bytes late", spoilt_file(change), read_all, before.name)
            if end + by <= one.begin and not any(data[one.begin - by : one.begin]):
                change = put(one.address_at, struct.pack("<Q", one.begin - by))
                yield Malformed(f"{one.name} {by} bytes early", spoilt_file(change), read_all, one.name)


CASES = [*structures(), *LISTS, *PLACES, *field_lies()]
