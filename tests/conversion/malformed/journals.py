"""Resume journals that were edited: the work is done anew from there, to the bytes of a run that nobody stopped."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_samples import array_of
from gptj_conversion.convert import convert

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import warn_of
from malformed import Malformed

TITLE = "resume journals"
CONFIG = GPTJConfig(vocab_size=24, n_positions=16, n_embd=16, n_layer=1, n_head=4, rotary_dim=2)
FORMATS: dict[str, dict[str, Any]] = {
    "safetensors": {"to": "safetensors", "max_shard_bytes": 4000},
    "bin": {"to": "bin", "max_shard_bytes": 4000},
    "flax": {"to": "flax", "max_shard_bytes": 4000},
    "tf": {"to": "tf", "max_shard_bytes": 4000},
    "mesh": {"to": "mesh", "shards": 2},
}
NOTE = "shard-1.journal"
Note = dict[str, Any]


def source(folder: Path, fill: Callable[..., Any] = array_of) -> Path:
    if not (folder / "in").exists():
        write_checkpoint(folder / "in", CONFIG, fill, allow_nonfinite=True)
    return folder / "in"


def stopped(folder: Path, name: str) -> Path:
    """What a conversion leaves that is interrupted when most of its files are finished: a copy of the first such."""
    shutil.copytree(_remains(name), folder, dirs_exist_ok=True)
    [stage] = folder.glob(".out.gptj-stage-*")
    return stage


@functools.cache
def _remains(name: str) -> Path:
    """A folder with the source, and with what an interrupted conversion left beside it."""
    folder = Path(tempfile.mkdtemp(prefix="gptj-journals-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    interrupt(folder, name)
    return folder


def interrupt(folder: Path, name: str, **options: Any) -> None:
    """Begin a conversion, and interrupt it when most of its files are finished."""
    told = itertools.count()

    def progress(tensor: str, nbytes: int) -> None:
        if next(told) == 13:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        convert(source(folder), folder / "out", progress=progress, resume=True, fingerprint=False,
                **{**FORMATS[name], **options})  # fmt: skip


def seal(note: Note) -> Note:
    """A note that says of itself that nobody edited it."""
    rest = {key: value for key, value in note.items() if key != "seal"}
    return {**rest, "seal": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def edited(name: str, change: Callable[[Note], object], *, sealed: bool = True) -> Callable[[Path], None]:
    """Makes the remains of a conversion whose first note was changed."""

    def make(folder: Path) -> None:
        path = stopped(folder, name) / NOTE
        note = json.loads(path.read_text())
        change(note)
        path.write_text(json.dumps(seal(note) if sealed else note))

    return make


def damaged(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Makes the remains of a conversion in whose stage something was changed."""
    return lambda folder: change(stopped(folder, name))


class _Heard(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn_of(record.getMessage())


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Turns what is logged into warnings, as the command line prints both."""
    handler, logger = _Heard(), logging.getLogger("gptj")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@functools.cache
def whole(name: str) -> dict[str, bytes]:
    """The files of a run that nobody stopped, which are the same for every case of a format."""
    with tempfile.TemporaryDirectory() as folder:
        return files(convert(source(Path(folder)), Path(folder) / "whole", fingerprint=False, **FORMATS[name]))


def resumed(folder: Path, name: str) -> None:
    with heard():
        out = convert(source(folder), folder / "out", resume=True, fingerprint=False, **FORMATS[name])
    assert files(out) == whole(name)
    assert not [path.name for path in folder.iterdir() if "gptj-" in path.name]


def door(name: str) -> Callable[[Path], object]:
    return functools.partial(resumed, name=name)


# ---- each field with each kind of wrong value


def _first_file(note: Note) -> Note:
    return next(iter(note["files"].values()))


def _first_tensor(note: Note) -> Note:
    return next(record for record in note["tensors"].values() if len(record["shape"]) == 2)


OTHER_HASH = hashlib.sha256(b"").hexdigest()
FIELDS: dict[str, tuple[Callable[[Note], Note], dict[str, list[Any]]]] = {
    "": (
        lambda note: note,
        {
            "first": ["0", -1, 7, None, True, 0.0],
            "stop": ["9", -1, 10**6, 0, None, []],
            "files": [{}, [], None, "x", {"../x": {"nbytes": 1, "sha256": OTHER_HASH, "hashed_bytes": 1}}],
            "tensors": [{}, [], None, "x", {"transformer.wte.weight": {}}],
            "order": [None, 7, "", OTHER_HASH],
        },
    ),
    "file": (
        _first_file,
        {
            "nbytes": ["4096", -1, -(2**40), 0, 2**60, None, 1.5, True],
            "hashed_bytes": ["4096", -1, 0, 2**60, None],
            "sha256": ["", "x", None, 7, OTHER_HASH, OTHER_HASH.upper()],
        },
    ),
    "tensor": (
        _first_tensor,
        {
            "dtype": ["float16", "float99", None, 7, ["float32"]],
            "shape": ["16", [-16, -24], [24, 15], [16.0, 24], None, [], [2**62, 2**62]],
            "sha256": ["", None, OTHER_HASH],
            "files": ["x", ["../x"], None, {}],
            "values": [None, {}, {"minimum": -9.0, "maximum": 9.0, "nan": 0, "inf": 0},
                       {"minimum": "a", "maximum": "b", "nan": 0, "inf": 0},
                       {"minimum": -1.0, "maximum": 1.0, "nan": -1, "inf": 0},
                       {"minimum": -1.0, "maximum": 1.0, "nan": 3, "inf": 0}],
            "cast": [7, {}, {"source_dtype": "float16", "overflowed": 0, "underflowed": 0,
                             "largest_relative_rounding": 0.0}],
            "origin": [None, 7, {"files": ["x"], "rule": "x"}, {"files": "x", "rule": "copied"}],
            "more": [1],
        },
    ),
}  # fmt: skip


FOUND_LATE = [("sha256", OTHER_HASH), ("values", {"minimum": -9.0, "maximum": 9.0, "nan": 0, "inf": 0})]


def _set(of: Callable[[Note], Note], key: str, value: Any, note: Note) -> None:
    of(note)[key] = value


def _fields(name: str) -> Iterator[Malformed]:
    for place, (of, wrong) in FIELDS.items():
        for key, values in wrong.items():
            for value in values:
                what = f"{name}: {place and place + ' '}{key} is {json.dumps(value)[:60]}"
                change = functools.partial(_set, of, key, value)
                named = "begun anew" if key == "order" else "journal"
                # Of a foreign format's tensor only the whole directory's reader can tell the hash and the values.
                known = name == "safetensors" or place != "tensor" or (key, value) not in FOUND_LATE
                yield Malformed(what, edited(name, change), door(name), named, "said" if known else "refused")


def _swap_hashes(note: Note) -> None:
    """Two tensors of equal shape change places in the note alone."""
    one, other = (note["tensors"][f"transformer.h.0.ln_1.{kind}"] for kind in ("weight", "bias"))
    one["sha256"], other["sha256"] = other["sha256"], one["sha256"]


def _drop_last(note: Note) -> None:
    note["tensors"].popitem()
    note["stop"] -= 1


def _transpose(note: Note) -> None:
    record = next(record for record in note["tensors"].values() if len(set(record["shape"])) == 2)
    record["shape"] = record["shape"][::-1]


def _weights(stage: Path) -> Path:
    note = json.loads((stage / NOTE).read_text())
    [first, *_] = note["files"]
    return stage / first


def _size(stage: Path) -> int:
    return _weights(stage).stat().st_size


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _on_disk(name: str) -> Iterator[Malformed]:
    changes: dict[str, Callable[[Path], object]] = {
        "the finished file is a FIFO": lambda stage: _fifo(_weights(stage)),
        "the finished file is a link": lambda stage: _link(_weights(stage)),
        "the finished file is a folder": lambda stage: _folder(_weights(stage)),
        "the finished file is cut": lambda stage: os.truncate(_weights(stage), 100),
        "the finished file has a byte more": lambda stage: os.truncate(_weights(stage), _size(stage) + 1),
        "the finished file has a flipped bit": lambda stage: _flip(_weights(stage), 70),
        "the finished file is gone": lambda stage: _weights(stage).unlink(),
        "the note is a FIFO": lambda stage: _fifo(stage / NOTE),
        "the note is a link": lambda stage: _link(stage / NOTE),
        "the note is a folder": lambda stage: _folder(stage / NOTE),
        "the note is empty": lambda stage: (stage / NOTE).write_bytes(b""),
        "the note is cut": lambda stage: os.truncate(stage / NOTE, 200),
        "the note is a list": lambda stage: (stage / NOTE).write_text("[]"),
        "the note is nested without end": lambda stage: (stage / NOTE).write_text('{"a":' * 100_000),
        "the note is 100 MB of spaces": lambda stage: os.truncate(stage / NOTE, 100_000_000),
    }  # fmt: skip
    for what, change in changes.items():
        yield Malformed(f"{name}: {what}", damaged(name, change), door(name), "journal", "said")


# ---- the rules of the one who goes on hold


def _with_nan(row: Any) -> np.ndarray:
    values = array_of(row)
    if row.name == "transformer.wte.weight":
        values[0, 0] = np.nan
    return values


def _stopped_with_nan(folder: Path, name: str) -> None:
    source(folder, _with_nan)
    interrupt(folder, name, allow_nonfinite=True)


def _resumed_strictly(folder: Path, name: str) -> None:
    convert(source(folder), folder / "out", resume=True, fingerprint=False, **FORMATS[name])


CASES = [
    *_fields("safetensors"),
    *_fields("bin"),
    *(case for name in ("safetensors", "bin", "mesh") for case in _on_disk(name)),
    *(
        Malformed(f"{name}: {what}", edited(name, change), door(name), "journal", "said")
        for name in ("safetensors", "bin", "flax", "tf")
        for what, change in (("the last tensor is left out", _drop_last), ("a shape is transposed", _transpose))
    ),
    Malformed("safetensors: two hashes are swapped", edited("safetensors", _swap_hashes), door("safetensors"),
              "journal", "said"),
    *(
        Malformed(f"{name}: {what} and nobody sealed it", edited(name, change, sealed=False), door(name), "journal",
                  "said")
        for name in FORMATS
        for what, change in (
            ("a tensor's hash lies", lambda note: _first_tensor(note).update(sha256=OTHER_HASH)),
            ("a cast that was none", lambda note: _first_tensor(note).update(cast=None, more=1)),
            ("a seal of another note", lambda note: note.update(seal=OTHER_HASH)),
        )
    ),
    *(
        Malformed(f"{name}: begun with allow_nonfinite, resumed without",
                  functools.partial(_stopped_with_nan, name=name), functools.partial(_resumed_strictly, name=name),
                  "transformer.wte.weight")
        for name in FORMATS
    ),
]  # fmt: skip
for _name in ("bin", "flax", "tf", "mesh"):
    CASES.append(
        Malformed(f"{_name}: a tensor's hash lies, and the note is sealed",
                  edited(_name, lambda note: _first_tensor(note).update(sha256=OTHER_HASH)), door(_name), "journal")
    )  # fmt: skip
