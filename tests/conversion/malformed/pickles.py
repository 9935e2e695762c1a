"""Pickles of state dicts with numbers beyond reason, names that are no text, and containers without end."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from gptj_conversion.hf.torch_pickle import read_state_dict

from malformed import Malformed

TITLE = "pickles of state dicts"

HEAD = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n)R"


def read(folder: Path) -> object:
    return read_state_dict((folder / "data.pkl").read_bytes(), file=folder / "x.bin", where="data.pkl")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<I", len(data)) + data


def tensor(**parts: bytes) -> bytes:
    """One tensor of four floats, with parts replaced."""
    part = {
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n", "word": text("storage"), "kind": b"ctorch\nFloatStorage\n",
        "key": text("0"), "device": text("cpu"), "numel": b"K\4", "offset": b"K\0", "shape": b"(K\4t",
        "strides": b"(K\1t", "grad": b"\x89", "hooks": ORDERED, **parts,
    }  # fmt: skip
    storage = b"(" + part["word"] + part["kind"] + part["key"] + part["device"] + part["numel"] + b"tQ"
    view = part["offset"] + part["shape"] + part["strides"] + part["grad"] + part["hooks"]
    return part["function"] + b"(" + storage + view + b"tR"


def state(value: bytes, name: bytes = text("w")) -> bytes:
    return HEAD + b"}(" + name + value + b"u."


VALUES = {
    "2^63": long(2**63), "2^2030": long(2**2030), "an integer of 5,000 digits": long(10**5000),
    "-1": b"J\xff\xff\xff\xff",
    "-2^2030": long(-(2**2030)), "None": b"N", "True": b"\x88", "an empty list": b"]", "an empty dict": b"}",
    "an empty tuple": b")", "a list that holds itself": b"]q\1h\1a", "a dict that holds itself": b"}q\1X\1\0\0\0ah\1s",
    "text": text("x"), "a function": b"ccollections\nOrderedDict\n", "a tensor": tensor(),
}  # fmt: skip


def cases() -> Iterator[Malformed]:
    """Each part of a tensor replaced by each value that it cannot have, and containers in each place."""
    pickles: dict[str, bytes] = {}
    lawful = {("device", "text"), ("hooks", "an empty dict")}
    for part in ("function", "word", "kind", "key", "numel", "offset", "shape", "strides", "hooks"):
        for what, value in VALUES.items():
            if (part, what) not in lawful:
                pickles[f"{what} as a tensor's {part}"] = state(tensor(**{part: value}))
    for what, value in VALUES.items():
        if what not in ("a tensor",):
            pickles[f"{what} in place of a tensor"] = state(value)
            if what != "an empty dict":
                pickles[f"{what} in place of a state dict"] = HEAD + value + b"."
        if what != "text":
            pickles[f"{what} as a tensor's name"] = state(tensor(), value)
        for other, module in (("text", text("torch")), (what, value)):
            pickles[f"a global of {other} and {what}"] = HEAD + module + value + b"\x93."
        pickles[f"{what} as a storage's name"] = HEAD + value + b"Q."
        pickles[f"{what} as a function's arguments"] = HEAD + b"ctorch._utils\n_rebuild_tensor_v2\n" + value + b"R."
        pickles[f"{what} as an attribute's state"] = HEAD + b"}" + value + b"b."
    for opener, what in ((b"}", "dicts"), (b"]", "lists"), (b")", "tuples")):
        pickles[f"a million empty {what} in a list"] = HEAD + b"](" + (opener * 9000 + b"e(") * 111 + b"e."
        pickles[f"a million {what} as one stack"] = HEAD + opener * 1_000_000 + b"."
    pickles["a million tuples in tuples"] = HEAD + b")" + b"\x85" * 1_000_000 + b"."
    pickles["a million marks"] = HEAD + b"(" * 1_000_000 + b"."
    pickles["a text of 2^32 - 1 bytes"] = HEAD + b"X\xff\xff\xff\xff."
    pickles["an integer of 2^31 bytes"] = HEAD + b"\x8b\xff\xff\xff\x7f."
    names = b"".join(text(str(n)) + b"h\0" for n in range(1000))
    pickles["a dict that holds itself under a thousand names"] = HEAD + b"}q\0(" + names + b"u."
    pickles["a frame beyond the end"] = HEAD + b"\x95" + b"\xff" * 8
    pickles["a value that was never remembered"] = HEAD + b"j\xff\xff\xff\xff."
    whole = state(tensor())
    for length in range(0, len(whole), 7):
        pickles[f"cut after {length} bytes"] = whole[:length]
    for what, data in pickles.items():
        yield Malformed(what, lambda folder, data=data: (folder / "data.pkl").write_bytes(data), read, "x.bin")


CASES = list(cases())
