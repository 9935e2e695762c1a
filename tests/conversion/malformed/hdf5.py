"""HDF5 files whose structures lie, and whose lists name something else than what is there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gptj_conversion.convert import convert
from gptj_conversion.hf_tf import read_h5

from malformed import Malformed

TITLE = "HDF5 structures and lists"
FOREIGN = Path(__file__).parents[2] / "data" / "foreign"
SHARDED = FOREIGN / "tf_sharded" / "tf_model-00002-of-00002.h5"
SINGLE = FOREIGN / "tf" / "tf_model.h5"
WTE = "transformer/tfgptj_for_causal_lm/transformer/wte/weight:0"
UNDEFINED = 2**64 - 1


def read(folder: Path) -> object:
    return [array.read(array.dtype) for array in read_h5(folder / "tf_model.h5")]


def convert_folder(folder: Path) -> object:
    return convert(folder, folder / "out")


def patched(at: int, new: bytes, source: Path = SHARDED) -> Callable[[Path], object]:
    """Makes a file of which some bytes were overwritten."""

    def make(folder: Path) -> None:
        data = bytearray(source.read_bytes())
        data[at : at + len(new)] = new
        (folder / "tf_model.h5").write_bytes(data)

    return make


def changed(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Makes a model's folder whose weights were changed with h5py."""

    def make(folder: Path) -> None:
        (folder / "config.json").write_bytes((FOREIGN / "tf" / "config.json").read_bytes())
        (folder / "tf_model.h5").write_bytes(SINGLE.read_bytes())
        with h5py.File(folder / "tf_model.h5", "r+") as file:
            change(file)

    return make


def places(data: bytes, signature: bytes) -> list[int]:
    """Where a signature stands."""
    return [at for at in range(0, len(data), 8) if data[at : at + 4] == signature]


def structures() -> Iterator[Malformed]:
    """Fields of each kind of structure, overwritten with cycles, addresses beyond the end, and absurd counts."""
    data = SHARDED.read_bytes()

    def case(what: str, at: int, new: bytes, names: str = "tf_model.h5") -> Malformed:
        return Malformed(what, patched(at, new), read, names)

    for heap in places(data, b"HEAP"):
        size, free, segment = struct.unpack_from("<3Q", data, heap + 8)
        name = f"local heap at {heap}"
        if free != 1:
            own = segment + free
            yield case(f"{name}: a free block is its own successor", own, struct.pack("<Q", free), "circle")
            yield case(f"{name}: a free block outside", own, struct.pack("<Q", size), "tf_model.h5")
            yield case(f"{name}: a free block of no length", own + 8, bytes(8), "free block")
            yield case(f"{name}: a free block of 2^63 bytes", own + 8, struct.pack("<Q", 2**63), "free block")
        for value in (size + 1, 2**32, 2**63):
            yield case(f"{name}: the free list begins at {value}", heap + 16, struct.pack("<Q", value))
        for value in (0, 2**40, UNDEFINED):
            yield case(f"{name}: {value} bytes", heap + 8, struct.pack("<Q", value))
        for value in (len(data), UNDEFINED):
            yield case(f"{name}: its data at {value}", heap + 24, struct.pack("<Q", value))
    for tree in places(data, b"TREE"):
        for value, what in ((tree, "itself"), (len(data), "beyond the end"), (UNDEFINED, "nothing")):
            yield case(f"B-tree at {tree}: its child is {what}", tree + 32, struct.pack("<Q", value))
        yield case(f"B-tree at {tree}: its child is itself, a level lower", tree + 5, b"\1")
        yield case(f"B-tree at {tree}: 65535 children", tree + 6, b"\xff\xff")
        yield case(f"B-tree at {tree}: a tree of chunks", tree + 4, b"\1")
    for node in places(data, b"SNOD"):
        yield case(f"symbols at {node}: 65535 of them", node + 6, b"\xff\xff")
        yield case(f"symbols at {node}: the first is the root", node + 16, struct.pack("<Q", 96))
        yield case(f"symbols at {node}: the first lies beyond the end", node + 16, struct.pack("<Q", 2**60))
        yield case(f"symbols at {node}: a name outside the heap", node + 8, struct.pack("<Q", 2**40))
        yield case(f"symbols at {node}: the first is a soft link", node + 24, b"\2", "SoftLink")
    for heap in places(data, b"GCOL"):
        yield case(f"global heap at {heap}: 2^63 bytes", heap + 8, struct.pack("<Q", 2**63))
        yield case(f"global heap at {heap}: no bytes", heap + 8, bytes(8))
        yield case(f"global heap at {heap}: an object of 2^64 - 1 bytes", heap + 24, b"\xff" * 8)
        yield case(f"global heap at {heap}: its first object is free space", heap + 16, bytes(2))
    for version in (4, 255):
        yield case(f"superblock of version {version}", 8, bytes([version]), "superblock")
    yield case("addresses of 4 bytes", 13, b"\4", "superblock")
    yield case("the file's end lies beyond its end", 40, struct.pack("<Q", 2**40), "cut short")
    yield case("the root lies beyond the end", 64, struct.pack("<Q", 2**40))
    yield case("the root has 65535 messages", 98, b"\xff\xff", "messages")
    yield case("the root's messages take 4 GB", 104, b"\xff" * 4)


def data_in_structures(at: int) -> Callable[[Any], object]:
    """Changes where a dataset's bytes are said to lie to the place of a structure."""

    def change(file: Any) -> None:
        place = struct.pack("<Q", file[WTE].id.get_offset())
        path = Path(file.filename)
        file.close()
        path.write_bytes(path.read_bytes().replace(place, struct.pack("<Q", at), 1))

    return change


def rename(file: Any, old: str, new: str) -> None:
    file.move(old, new)


def numbers(file: Any, key: str = "layer_names") -> None:
    file.attrs[key] = [1, 2]


def references(file: Any) -> None:
    del file[WTE]
    file.create_dataset(WTE, data=np.array([file.ref] * 4, dtype=h5py.ref_dtype))


def regions(file: Any) -> None:
    place = file["lm_head/tfgptj_for_causal_lm/lm_head/bias:0"].regionref[0:1]
    file.create_dataset("lm_head/region", data=np.array([place] * 2, dtype=h5py.regionref_dtype))


def lists() -> Iterator[Malformed]:
    """Lists that are none, or name something else than what is there."""
    changes: dict[str, tuple[Callable[[Any], object], str]] = {
        "object references in place of weights": (references, "references"),
        "a dataset of region references": (regions, "region"),
        "layer_names are numbers": (numbers, "layer_names"),
        "weight_names are numbers": (lambda file: numbers(file["transformer"], "weight_names"), "weight_names"),
        "layer_names is one text": (lambda file: file.attrs.__setitem__("layer_names", "transformer"), "layer_names"),
        "layer_names is a number": (lambda file: file.attrs.__setitem__("layer_names", 3), "layer_names"),
        "layer_names has two axes": (
            lambda file: file.attrs.__setitem__("layer_names", np.array([[b"transformer", b"lm_head"]])), "layer_names",
        ),
        "layer_names are object references": (
            lambda file: file.attrs.__setitem__("layer_names", np.array([file.ref], h5py.ref_dtype)), "layer_names",
        ),
        "layer_names are lists of numbers": (
            lambda file: file.attrs.create("layer_names", None, (2,), h5py.vlen_dtype(np.int32)), "layer_names",
        ),
        "layer_names are compounds": (
            lambda file: file.attrs.__setitem__("layer_names", np.zeros(2, [("a", "<f4")])), "layer_names",
        ),
        "layer_names is empty": (
            lambda file: file.attrs.__setitem__("layer_names", h5py.Empty("S1")), "layer_names",
        ),
        "a misspelt layer group": (lambda file: rename(file, "lm_head", "lm_haed"), "lm_haed"),
        "a group and its list misspelt alike": (
            lambda file: [
                rename(file, "lm_head", "lm_haed"),
                file.attrs.__setitem__("layer_names", ["lm_haed", "transformer"]),
            ],
            "lm_haed",
        ),
        "a layer listed twice": (
            lambda file: file.attrs.__setitem__("layer_names", ["lm_head", "transformer", "lm_head"]), "lm_head",
        ),
        "a layer that is absent": (
            lambda file: file.attrs.__setitem__("layer_names", ["lm_head", "transformer", "ghost"]), "ghost",
        ),
        "a group that no list names": (
            lambda file: file.attrs.__setitem__("layer_names", ["transformer"]), "lm_head",
        ),
        "as many names as groups, one another": (
            lambda file: file.attrs.__setitem__("layer_names", ["ghost", "transformer"]), "ghost",
        ),
        "an empty group whose list names a weight": (
            lambda file: file["top_level_model_weights"].attrs.__setitem__("weight_names", ["ghost:0"]), "ghost:0",
        ),
        "weights that no list of the top level names": (
            lambda file: file["top_level_model_weights"].create_dataset("x", data=np.zeros(2, "f4")), "'x'",
        ),
        "a dataset in place of a layer": (lambda file: file.create_dataset("x", data=np.zeros(2, "f4")), "x"),
        "a committed datatype": (lambda file: file.__setitem__("x", np.dtype("f4")), "x"),
    }  # fmt: skip
    for at in (0, 96, 680, 800, 1072):
        changes[f"weights where the metadata at {at} is"] = (data_in_structures(at), "tf_model.h5")
    for what, (change, names) in changes.items():
        yield Malformed(what, changed(change), convert_folder, names)


CASES = [*structures(), *lists()]
