"""Folders of a TPU checkpoint whose arrays, leaves, shards, steps or configs lie."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gptj_conversion.convert import convert
from mesh_samples import STEP, write_mesh_sample, write_shard
from numpy.typing import NDArray

from malformed import Malformed, gptj

TITLE = "TPU folders"

Leaves = list[NDArray[Any]]
FILES = 16


def write(folder: Path, **options: Any) -> Path:
    """A good checkpoint in `folder / "model"`; returns its step folder."""
    sizes = {"layers": 1, "heads": 2, "head_dim": 2, "vocab_per_shard": 2, "shards": 2}
    return write_mesh_sample(folder / "model", **{**sizes, **options}).step_directory


def leaves_of(shard: Path) -> Leaves:
    found = []
    for number in range(FILES):
        with np.load(shard / f"{number}.npz") as arrays:
            found += [arrays[name] for name in arrays.files]
    return found


def rewritten(change: Callable[[Leaves, int], Leaves], **options: Any) -> Callable[[Path], None]:
    """Makes a checkpoint whose shards' leaves were changed; `change` is told the shard's number."""

    def make(folder: Path) -> None:
        for number, shard in enumerate(sorted(write(folder, **options).iterdir())):
            leaves = leaves_of(shard)
            shutil.rmtree(shard)
            write_shard(shard, change(leaves, number))

    return make


def npz(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Makes a checkpoint one of whose files was changed."""

    def make(folder: Path) -> None:
        file = write(folder) / "shard_1" / "3.npz"
        file.write_bytes(content(file.read_bytes()))

    return make


def zipped(members: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return buffer.getvalue()


def array_of(header: str, data: bytes = bytes(16), *, version: bytes = b"\x01\x00") -> bytes:
    """An .npz with one array, whose header is this text."""
    raw = header.encode("latin-1")
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(raw))
    return zipped({"arr_0.npy": b"\x93NUMPY" + version + length + raw + data})


def with_meta(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        (folder / "model" / "meta.json").write_text(text)

    return make


def with_config(**changes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        file = folder / "model.json"
        members = {key: value for key, value in {**json.loads(file.read_text()), **changes}.items() if value is not ...}
        file.write_text(json.dumps(members))

    return make


def with_text(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        (folder / "model.json").write_text(text)

    return make


def moved(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Makes a checkpoint in whose step folder something was moved, removed or added."""
    return lambda folder: change(write(folder)) and None


def mixed(folder: Path, **options: Any) -> None:
    """A second shard from another run."""
    step = write(folder)
    (folder / "other").mkdir()
    other = write(folder / "other", **options)
    shutil.rmtree(step / "shard_1")
    shutil.copytree(other / "shard_1", step / "shard_1")
    shutil.rmtree(folder / "other")


def with_state(leaves: Leaves, shard: int) -> Leaves:
    """Adam's state in the second shard alone."""
    return [np.int32(1), *leaves[:-1], *leaves[:-1], np.int32(1), *leaves] if shard else leaves


def replaced(index: int, leaf: Any, *, in_shard: int = 0) -> Callable[[Leaves, int], Leaves]:
    def change(leaves: Leaves, shard: int) -> Leaves:
        return [*leaves[:index], leaf, *leaves[index + 1 or len(leaves) :]] if shard == in_shard else leaves

    return change


def door(folder: Path) -> object:
    return convert(folder / "model", folder / "out", config=folder / "model.json")


def command(folder: Path) -> object:
    return gptj("convert", folder / "model", folder / "out", "--config", folder / "model.json")


def twins(good: bytes) -> bytes:
    """A member twice, as zipfile would write it without its warning."""
    buffer = io.BytesIO(zipped({"arr_0.npy": b"x", "arr_1.npy": b"y"}))
    return buffer.getvalue().replace(b"arr_1.npy", b"arr_0.npy")


HUGE = "9" * 3000
HEADERS = {
    "a shape of 3,000 digits": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({HUGE},)}}",
    "a negative shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}",
    "a shape of booleans": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4)}",
    "a shape of floats": "{'descr': '<f4', 'fortran_order': False, 'shape': (4.0,)}",
    "a shape that is a number": "{'descr': '<f4', 'fortran_order': False, 'shape': 4}",
    "a shape of 2^62 and 0": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 0)}}",
    "nine axes": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1, 1, 4)}",
    "more values than bytes": "{'descr': '<f4', 'fortran_order': False, 'shape': (5,)}",
    "fewer values than bytes": "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (4,)}",
    "texts": "{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}",
    "complex numbers": "{'descr': '<c8', 'fortran_order': False, 'shape': (2,)}",
    "dates": "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (2,)}",
    "a record": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,)}",
    "no dtype": "{'descr': '', 'fortran_order': False, 'shape': (4,)}",
    "a dtype of two byte orders": "{'descr': '<>f4', 'fortran_order': False, 'shape': (4,)}",
    "columns first": "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2)}",
    "an order that is a number": "{'descr': '<f4', 'fortran_order': 0, 'shape': (4,)}",
    "a key too many": "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), 'x': 1}",
    "a key too few": "{'descr': '<f4', 'shape': (4,)}",
    "a key that is a list": "{[]: 1, 'descr': '<f4', 'fortran_order': False, 'shape': (4,)}",
    "a set of lists": "{'descr': '<f4', 'fortran_order': False, 'shape': {[]}}",
    "a call": "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),)}",
    "an escape that Python warns of": r"{'descr': '\d4', 'fortran_order': False, 'shape': (4,)}",
    "a thousand brackets": "(" * 1000,
    "a list": "[1, 2]",
    "nothing": "",
    "a NUL": "{'descr': '<f4',\0 'fortran_order': False, 'shape': (4,)}",
}

FILES_OF = {
    "an empty file": lambda good: b"",
    "a file cut by half": lambda good: good[: len(good) // 2],
    "a file cut by one byte": lambda good: good[:-1],
    "a byte after its end": lambda good: good + b"x",
    "a page": lambda good: b"<!DOCTYPE html><html>",
    "a git-lfs pointer": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a single .npy": lambda good: b"\x93NUMPY" + good,
    "an archive of names": lambda good: zipped({"w.npy": b"", "b.npy": b""}),
    "an archive that lacks arr_0": lambda good: zipped({"arr_1.npy": b""}),
    "an array twice": twins,
    "a deflated array": lambda good: zipped({"arr_0.npy": bytes(5000)}, compression=zipfile.ZIP_DEFLATED),
    "a member that leads outside": lambda good: zipped({"../arr_0.npy": b""}),
    "a header of .npy version 3": lambda good: array_of("{}", version=b"\x03\x00"),
    "a header of .npy version 9": lambda good: array_of("{}", version=b"\x09\x00"),
    "a header that says it has 64 kB": lambda good: zipped({"arr_0.npy": b"\x93NUMPY\x01\x00\xff\xff" + bytes(90)}),
    "a header that says it has 4 GB": lambda good: zipped({"arr_0.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}"}),
    "a member that is no array": lambda good: zipped({"arr_0.npy": b"hello"}),
    "a changed byte of an array": lambda good: good.replace(b"\x00\xbf", b"\x01\xbf", 1).replace(b"?", b"@"),
}

LEAVES: dict[str, Callable[[Leaves, int], Leaves]] = {
    "one leaf too few": lambda leaves, shard: leaves[1:],
    "a leaf twice in the middle": lambda leaves, shard: [*leaves[:5], *leaves[4:]],
    "a leaf lost in the middle": lambda leaves, shard: [*leaves[:7], *leaves[8:]],
    "a leaf after the step": lambda leaves, shard: [*leaves, np.int32(0)],
    "no leaves": lambda leaves, shard: [],
    "the step alone": lambda leaves, shard: leaves[-1:],
    "no step": lambda leaves, shard: leaves[:-1],
    "the leaves backwards": lambda leaves, shard: leaves[::-1],
    "two leaves that changed places": lambda leaves, shard: [leaves[1], leaves[0], *leaves[2:]],
    "no embedding": lambda leaves, shard: leaves[2:],
    "no projection": lambda leaves, shard: [*leaves[:-5], leaves[-1]],
    "eleven leaves a layer, as with positions in each": lambda leaves, shard: [*leaves[:12], leaves[11], *leaves[12:]],
    "an embedding of positions, as pe fixed": lambda leaves, shard: [*leaves[:2], leaves[1], *leaves[2:]],
    "no offsets, as another norm": lambda leaves, shard: [*leaves[:10], *leaves[11:]],
    "a chain in one shard alone": with_state,
    "as many leaves of another chain in the other shard": lambda leaves, shard: (
        [*leaves[:-1], np.int32(1), *leaves] if shard else [np.int32(1), *leaves[:-1], *leaves]
    ),
    "the states of two widths": lambda leaves, shard: [np.ones(3 + shard, np.float32), *leaves],
    "one leaf fewer in the other shard": lambda leaves, shard: leaves[shard:],
    "a step of floats": replaced(-1, np.float32(7)),
    "a step with an axis": replaced(-1, np.ones(1, np.int32)),
    "another step in the other shard": replaced(-1, np.int32(STEP + 1), in_shard=1),
    "a leaf of whole numbers": replaced(2, np.ones((4, 2), np.int32)),
    "a leaf of booleans": replaced(2, np.ones((4, 2), np.bool_)),
    "a leaf of another dtype": replaced(3, np.ones((4, 2), np.float16), in_shard=1),
    "a leaf that is turned": replaced(2, np.ones((2, 4), np.float32)),
    "a leaf of a wider model": replaced(2, np.ones((8, 4), np.float32), in_shard=1),
    "an empty leaf": replaced(0, np.ones(0, np.float32)),
    "a leaf of three axes": replaced(1, np.ones((2, 4, 1), np.float32)),
}

METAS = {
    "a step that is not there": '{"step": 8}',
    "a step of -1": '{"step": -1}',
    "a step that is text": '{"step": "7"}',
    "a step that is a float": '{"step": 7.0}',
    "a step that is true": '{"step": true}',
    "a step that is null": '{"step": null}',
    "a step that is a list": '{"step": [7]}',
    "a step of 4,000 digits": '{"step": ' + "7" * 4000 + "}",
    "a step of 5,000 digits": '{"step": ' + "7" * 5000 + "}",
    "two steps": '{"step": 7, "step": 6}',
    "no step": "{}",
    "a list": "[7]",
    "nothing": "",
    "half an object": '{"step": 7',
    "NaN": '{"step": NaN}',
    "a thousand brackets": "[" * 100_000,
}

FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda step: shutil.rmtree(step / "shard_0"), "shard_0"),
    "a shard too many": (lambda step: shutil.copytree(step / "shard_1", step / "shard_2"), "shard_2"),
    "a shard is a file": (
        lambda step: (shutil.rmtree(step / "shard_1"), (step / "shard_1").write_text("")), "shard_1",
    ),
    "an .npz is missing": (lambda step: (step / "shard_1" / "15.npz").unlink(), "15.npz"),
    "an .npz too many": (lambda step: shutil.copy(step / "shard_1" / "1.npz", step / "shard_1" / "16.npz"), "16.npz"),
    "an .npz is a folder": (
        lambda step: ((step / "shard_1" / "1.npz").unlink(), (step / "shard_1" / "1.npz").mkdir()), "1.npz",
    ),
    "an .npz is a FIFO": (
        lambda step: ((step / "shard_1" / "1.npz").unlink(), os.mkfifo(step / "shard_1" / "1.npz")), "1.npz",
    ),
    "an .npz is a link to nothing": (
        lambda step: ((step / "shard_1" / "1.npz").unlink(), (step / "shard_1" / "1.npz").symlink_to("x")), "1.npz",
    ),
    "an .npz is a link to itself": (
        lambda step: ((step / "shard_1" / "1.npz").unlink(), (step / "shard_1" / "1.npz").symlink_to("1.npz")),
        "1.npz",
    ),
    "an .npz is a link outside": (
        lambda step: (
            (step / "shard_1" / "1.npz").rename(step.parent.parent / "x"),
            (step / "shard_1" / "1.npz").symlink_to(step.parent.parent / "x"),
        ),
        "1.npz",
    ),
    "two files changed places": (
        lambda step: (
            (step / "shard_1" / "0.npz").rename(step / "x"),
            (step / "shard_1" / "15.npz").rename(step / "shard_1" / "0.npz"),
            (step / "x").rename(step / "shard_1" / "15.npz"),
        ),
        "shard_1",
    ),
    "the v2 model's folders in place of shards": (
        lambda step: (
            shutil.rmtree(step / "shard_0"), shutil.rmtree(step / "shard_1"),
            (step / "params").mkdir(), (step / "opt_state").mkdir(),
        ),
        "v2",
    ),
    "the v2 model's meta.json in place of shards": (
        lambda step: (
            shutil.rmtree(step / "shard_0"), shutil.rmtree(step / "shard_1"),
            (step / "meta.json").write_text('{"param_order": [], "total_hosts": 1}'),
        ),
        "v2",
    ),
}  # fmt: skip

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "pe_rotary_dims null": ({"pe_rotary_dims": None}, "pe_rotary_dims"),
    "pe_rotary_dims 0": ({"pe_rotary_dims": 0}, "pe_rotary_dims"),
    "an odd pe_rotary_dims": ({"pe_rotary_dims": 1}, "pe_rotary_dims"),
    "a negative pe_rotary_dims": ({"pe_rotary_dims": -2}, "pe_rotary_dims"),
    "pe_rotary_dims text": ({"pe_rotary_dims": "2"}, "pe_rotary_dims"),
    "heads that do not divide the width": ({"n_heads": 3}, "n_heads"),
    "a head for two shards": ({"n_heads": 1}, "n_heads"),
    "no heads": ({"n_heads": 0}, "n_heads"),
    "heads beyond any number": ({"n_heads": 10**300}, "a number too large"),
    "heads of half": ({"n_heads": 2.5}, "n_heads"),
    "layers of another model": ({"layers": 2}, "layers"),
    "a width of another model": ({"d_model": 8}, "d_model"),
    "a vocabulary of another model": ({"n_vocab": 5}, "n_vocab"),
    "the shards of another model": ({"cores_per_replica": 8}, "cores_per_replica"),
    "no sequence": ({"seq": ...}, "seq"),
    "a sequence of no tokens": ({"seq": 0}, "seq"),
    "a norm of another model": ({"norm": "scalenorm"}, "norm"),
    "positions of another model": ({"pe": "t5"}, "pe"),
    "positions that are a list": ({"pe": ["rotary"]}, "pe"),
    "the fork's other model": ({"compat": "neo"}, "compat"),
    "a compat that is a list": ({"compat": ["j"]}, "compat"),
    "padding that the files lack": ({"n_vocab_padding": 4}, "n_vocab_padding"),
    "padding of less than nothing": ({"n_vocab_padding": -1}, "n_vocab_padding"),
    "padding that is text": ({"n_vocab_padding": "0"}, "n_vocab_padding"),
    "an activation that is a list": ({"activation": ["relu"]}, "activation"),
    "a share of the head that is infinite": ({"pe_rotary_pct": 1e300}, "pe_rotary_pct"),
    "a share of the head that is text": ({"pe_rotary_pct": "0.5"}, "pe_rotary_pct"),
    "attention layers that are a number": ({"attention_layers": 1}, "attention_layers"),
    "an end token that is text": ({"eos_token_id": "x"}, "eos_token_id"),
    "a misspelt pe_rotary_dims": ({"pe_rotary_dims": ..., "pe_rotary_dim": 2}, "pe_rotary_dims"),
    "another program's rotary_dim": ({"pe_rotary_dims": ..., "rotary_dim": 2}, "pe_rotary_dims"),
    "a misspelt n_vocab_padding": ({"n_vocab_pading": 4}, "n_vocab_padding"),
    "a misspelt activation": ({"activaton": "relu"}, "activation"),
    "a misspelt n_heads": ({"n_heads": ..., "n_head": 2}, "n_heads"),
}

TEXTS = {
    "nothing": "",
    "a list": "[]",
    "an empty object": "{}",
    "half an object": '{"layers": 1',
    "another object": '{"max_new_tokens": 3}',
    "layers twice": '{"layers": 1, "layers": 2}',
    "YAML": "layers: 1",
}


def older(folder: Path) -> None:
    """The newest of two steps lacks a file, and no meta.json says which counts."""
    step = write(folder)
    shutil.copytree(step, step.parent / "step_9")
    (step.parent / "step_9" / "shard_0" / "2.npz").unlink()


def older_than(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Makes two steps, the newest of them spoilt, and no meta.json that says which counts."""

    def make(folder: Path) -> None:
        step = write(folder)
        spoil(shutil.copytree(step, step.parent / "step_9"))

    return make


def of_other_run(step: Path) -> None:
    leaves = leaves_of(step / "shard_1")
    shutil.rmtree(step / "shard_1")
    write_shard(step / "shard_1", [*leaves[:-1], np.int32(STEP + 1)])


NEWEST = {
    "lacks its last shard": lambda step: shutil.rmtree(step / "shard_1"),
    "lacks its first shard": lambda step: shutil.rmtree(step / "shard_0"),
    "has no shard": lambda step: [shutil.rmtree(shard) for shard in step.iterdir()],
    "has a shard of another step": of_other_run,
    "has a leaf too many": lambda step: shutil.copy(step / "shard_1" / "0.npz", step / "shard_1" / "13.npz"),
    "has a file that is cut": lambda step: (step / "shard_1" / "3.npz").write_bytes(b"PK"),
}
"""Ways in which the newest step is not whole, or not of one run."""


def renamed(folder: Path) -> None:
    step = write(folder)
    step.rename(step.parent / "step_5")


CASES = [
    *(
        Malformed(f"an .npz whose array has {what}", npz(lambda good, text=text: array_of(text)), door, "3.npz")
        for what, text in HEADERS.items()
    ),
    *(Malformed(f"an .npz that is {what}", npz(change), door, "3.npz") for what, change in FILES_OF.items()),
    Malformed("an .npz that is an archive of nothing", npz(lambda good: zipped({})), door, "shard_1"),
    *(Malformed(f"leaves: {what}", rewritten(change), door, "shard_") for what, change in LEAVES.items()),
    Malformed("shards of a deeper model", lambda folder: mixed(folder, layers=2), door, "shard_1"),
    Malformed("shards of a wider model", lambda folder: mixed(folder, head_dim=4), door, "shard_1"),
    Malformed("shards of 16 and 32 bits", lambda folder: mixed(folder, dtype=np.float16), door, "shard_1"),
    Malformed("shards with and without Adam", lambda folder: mixed(folder, layout="full"), door, "shard_1"),
    Malformed("shards of another vocabulary", lambda folder: mixed(folder, vocab_per_shard=3), door, "shard_1"),
    *(Malformed(f"meta.json: {what}", with_meta(text), door, "meta.json") for what, text in METAS.items()),
    *(Malformed(what, moved(change), door, names) for what, (change, names) in FOLDERS.items()),
    *(
        Malformed(f"a training config with {what}", with_config(**changes), door, names)
        for what, (changes, names) in CONFIGS.items()
    ),
    *(
        Malformed(f"a training config that is {what}", with_text(text), door, "model.json")
        for what, text in TEXTS.items()
    ),
    Malformed("an older step than the newest", older, door, "step_9", outcome="said"),
    *(
        Malformed(f"an older step than the newest, which {what}", older_than(spoil), door, "step_9", outcome="said")
        for what, spoil in NEWEST.items()
    ),
    Malformed("a folder of another step than inside", renamed, command, "step_5", outcome="said"),
    Malformed(
        "the state of another optimizer", rewritten(lambda leaves, shard: [*leaves[:-1], *leaves]), door,
        "optimizer", outcome="said",
    ),
    Malformed(
        "a leaf before all others", rewritten(lambda leaves, shard: [leaves[3], *leaves]), door, "optimizer",
        outcome="said",
    ),
    Malformed("rows of padding", with_config(n_vocab=3, n_vocab_padding=1), command, "n_vocab_padding", outcome="said"),
]  # fmt: skip
