"""A .bin whose storages have another checksum, are shared, or are none; nestings without one model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gptj_conversion.convert import convert
from lawful import good_folder
from weight_changes import Arrays, arrays, as_bin, write_legacy

from malformed import Malformed

TITLE = "checksums and nestings of a .bin"
BIN = "pytorch_model.bin"


def door(folder: Path) -> object:
    return convert(folder / "in", folder / "out", fingerprint=False)


def made(tree: Callable[[Arrays], Any], spoil: Callable[[Path], object] = lambda path: None, **options: Any) -> Any:
    def make(folder: Path) -> None:
        model = good_folder(folder / "in")
        as_bin(tree, **options)(model)
        spoil(model / BIN)

    return make


def flipped(name: str, byte: int = 0) -> Callable[[Path], None]:
    """One bit of a tensor's data is another."""

    def make(folder: Path) -> None:
        model = good_folder(folder / "in")
        data = arrays(model)[name].tobytes()
        as_bin(lambda tensors: tensors)(model)
        raw = bytearray((model / BIN).read_bytes())
        raw[raw.index(data) + (byte % len(data))] ^= 1
        (model / BIN).write_bytes(raw)

    return make


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def shared(tensors: Arrays) -> Arrays:
    return {**tensors, "transformer.h.1.ln_1.weight": tensors["transformer.h.0.ln_1.weight"]}


NAMES = (
    "transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.attn.q_proj.weight",
    "transformer.h.0.attn.out_proj.weight", "transformer.h.0.mlp.fc_in.weight", "transformer.h.0.mlp.fc_in.bias",
    "transformer.h.1.mlp.fc_out.bias", "transformer.ln_f.weight", "lm_head.weight", "lm_head.bias",
)  # fmt: skip
STATE = np.ones(77, np.float32)
SIZE = b"J\x4d\0\0\0NtQ"


def trained(tensors: Arrays) -> dict[str, Any]:
    return {"model": tensors, "optimizer": {"state": {0: {"exp_avg": STATE, "again": STATE}}}}


# What is changed in the file, and how the counts before the storages lie.
TRAINED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("cut in its storages", edited(lambda raw: raw[:-30]), {}, BIN),
    ("a byte more", edited(lambda raw: raw + b"x"), {}, BIN),
    *((f"a count of {n}", bool, {"sizes": [n]}, "storage") for n in (-1, 0, 7, 2**62)),
    ("a storage that nothing names", bool, {"more": [STATE]}, "storage"),
    ("one storage of two sizes", edited(lambda raw: raw.replace(SIZE, b"J\x4c" + SIZE[2:], 1)), {}, "storage"),
    ("a storage larger than the file", edited(lambda raw: raw.replace(SIZE, b"J\0\0\0\x7f" + SIZE[5:])), {}, "storage"),
]
CASES = [
    *(Malformed(f"a bit of {name}, byte {at}", flipped(name, at), door, name) for name in NAMES for at in (0, -1)),
    Malformed("two layers on one storage", made(shared), door, "transformer.h.1.ln_1.weight", "said"),
    Malformed("two state dicts", made(lambda t: {"model": t, "ema": t}), door, "ema"),
    Malformed("no state dict", made(lambda t: {"step": 3}), door, BIN),
    Malformed("a nesting too deep", made(lambda t: {"a": {"b": {"c": {"d": {"e": {"f": t}}}}}}), door, BIN),
    Malformed("a nested half", made(lambda t: {"m": {"transformer.wte.weight": t["lm_head.weight"]}}), door, "ln_1"),
    Malformed("legacy, cut short", made(dict, edited(lambda raw: raw[:-1]), write=write_legacy), door, BIN),
    Malformed("legacy, cut in its pickles", made(dict, edited(lambda raw: raw[:90]), write=write_legacy), door, BIN),
    Malformed("legacy, a byte more", made(dict, edited(lambda raw: raw + b"x"), write=write_legacy), door, BIN),
    Malformed("legacy, another magic number", made(dict, edited(lambda raw: raw.replace(b"\x6c\xfc", b"\x6c\xfd", 1)),
              write=write_legacy), door, BIN),
    Malformed("legacy, another machine", made(dict, edited(lambda raw: raw.replace(b"\x88u.", b"\x89u.", 1)),
              write=write_legacy), door, "sys_info"),
    Malformed("legacy, another protocol", made(dict, edited(lambda raw: raw.replace(b"M\xe9\x03", b"M\xe8\x03", 1)),
              write=write_legacy), door, "sys_info"),
    *(
        Malformed(
            f"legacy with an optimizer, {what}", made(trained, change, write=partial(write_legacy, **lies)), door, names
        )
        for what, change, lies, names in TRAINED
    ),
    Malformed("legacy, two state dicts", made(lambda t: {"model": t, "ema": t}, write=write_legacy), door, "ema"),
]  # fmt: skip
