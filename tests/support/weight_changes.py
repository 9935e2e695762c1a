"""Changes of a folder's weights: other names, other files, other nestings; by hand, without torch."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gptj_conversion.convert import convert
from gptj_conversion.hf.torch_bin import _text, _whole, _whole_tuple
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Arrays = dict[str, np.ndarray]


def arrays(folder: Path) -> Arrays:
    return load_file(folder / WEIGHTS)


def store(folder: Path, tensors: Mapping[str, np.ndarray], name: str = WEIGHTS, form: str = "pt") -> None:
    """Write a safetensors file in place of the folder's own."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / name, {"format": form})


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    """Other names for the tensors of the one safetensors file."""
    return lambda folder: store(folder, {rename(name): array for name, array in arrays(folder).items()})


def with_more(more: Mapping[str, np.ndarray], rename: Callable[[str], str] = str) -> Callable[[Path], None]:
    """More tensors beside the model's."""
    return lambda folder: store(folder, {rename(name): array for name, array in arrays(folder).items()} | {**more})


def sharded(folder: Path, change: Callable[[dict[str, Any]], object] = lambda index: None, infix: str = "") -> None:
    """Two shards and an index, which `change` may change, in place of the one file."""
    tensors = arrays(folder)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model{infix}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def pickled(tree: Any, storages: list[np.ndarray], shared: dict[int, int] | None = None) -> bytes:
    """The opcodes of a tree of dicts, plain values and arrays; each array becomes a storage."""
    if isinstance(tree, dict):
        return b"}(" + b"".join(_key(k) + pickled(v, storages) for k, v in tree.items()) + b"u"
    if isinstance(tree, np.ndarray):
        number = next((n for n, array in enumerate(storages) if array is tree), len(storages))
        if number == len(storages):
            storages.append(tree)
        strides = tuple(int(np.prod(tree.shape[n + 1 :])) for n in range(tree.ndim))
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(number)) + _text("cpu") + _whole(tree.size)
            + b"tQ" + _whole(0) + _whole_tuple(tree.shape) + _whole_tuple(strides)
            + b"\x89ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip
    if isinstance(tree, float):
        return b"G" + struct.pack(">d", tree)
    if isinstance(tree, list):
        return b"](" + b"".join(pickled(value, storages) for value in tree) + b"e"
    return b"N" if tree is None else _whole(tree) if isinstance(tree, int) else _text(tree)


def _key(key: str | int) -> bytes:
    return _whole(key) if isinstance(key, int) else _text(key)


def write_bin(path: Path, tree: Any, *, spoil: bytes | None = None) -> None:
    """A zip as torch.save makes it."""
    storages: list[np.ndarray] = []
    data = b"\x80\x02" + pickled(tree, storages) + b"."
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for number, array in enumerate(storages):
            file.writestr(f"archive/data/{number}", array.tobytes())


def write_legacy(path: Path, tree: Any, *, more: Sequence[np.ndarray] = (), sizes: Sequence[int] = ()) -> None:
    """Pickles and storages in a row, as torch.save made them before 1.6.

    `more` are storages that the tree does not name; `sizes` are lies about the last ones' numbers of elements.
    """
    storages: list[np.ndarray] = []
    magic = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    facts = b"}(" + _text("protocol_version") + _whole(1001) + _text("little_endian") + b"\x88u"
    body = pickled(tree, storages).replace(b"tQ", b"NtQ")
    storages += more
    counts = [array.size for array in storages]
    counts[len(counts) - len(sizes) :] = sizes
    keys = b"](" + b"".join(_text(str(number)) for number in range(len(storages))) + b"e"
    parts = [b"\x8a\x0a" + magic, b"M" + struct.pack("<H", 1001), facts, body, keys]
    data = b"".join(b"\x80\x02" + part + b"." for part in parts)
    data += b"".join(struct.pack("<q", n) + array.tobytes() for n, array in zip(counts, storages, strict=True))
    path.write_bytes(data)


def as_bin(
    tree: Callable[[Arrays], Any], name: str = "pytorch_model.bin", write: Any = write_bin
) -> Callable[[Path], None]:
    """A .bin of whatever tree is made of the arrays, in place of the safetensors file."""

    def make(folder: Path) -> None:
        tensors = arrays(folder)
        (folder / WEIGHTS).unlink()
        write(folder / name, tree(tensors))

    return make


def as_format(to: str) -> Callable[[Path], None]:
    """The folder in another format."""

    def make(folder: Path) -> None:
        out = folder.parent / f"{folder.name}-{to}"
        convert(folder, out, to=to, fingerprint=False)
        (folder / WEIGHTS).unlink()
        for path in out.iterdir():
            if path.name != "manifest.json":
                path.rename(folder / path.name)
        for path in out.iterdir():
            path.unlink()
        out.rmdir()

    return make
