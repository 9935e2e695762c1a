"""Records and probes of parity that no backend would write, and places where none can be written."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptj.config import GPTJConfig
from gptj.errors import GPTJError
from gptj.parity import record as recorder
from gptj.parity.probe import Probe, make_probe
from gptj.parity.record import Record
from malformed import Malformed

TITLE = "records and probes of parity"
CONFIG = GPTJConfig(vocab_size=12, n_positions=16, n_embd=8, n_layer=2, n_head=2, rotary_dim=2)
ARRAYS, FACTS, PROBE = "record.npz", "record.json", "probe.npz"
Arrays = dict[str, Any]


def probe() -> Probe:
    return make_probe(CONFIG)


def record() -> Record:
    """A record whose numbers are nobody's, of the right shapes."""
    asked, random = probe(), np.random.default_rng(0)
    (b, t), (rows, n) = asked.input_ids.shape, asked.prompt_ids.shape
    of_logits = dict.fromkeys(("logits", "far_logits", "plain_logits", "cached_logits"), (b, t, 12))
    shapes = {**of_logits, "loss": (), "hidden_states": (3, b, t, 8), "attentions": (2, b, 2, t, t)}
    answers = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    answers["loss"] = np.float32(1.5)
    ids = np.concatenate([asked.prompt_ids, np.ones((rows, asked.new_tokens), np.int64)], 1)
    assert ids.shape[1] == n + asked.new_tokens
    return Record("pt", "float32", asked, {**answers, "greedy": ids, "sampled": ids}, {"versions": {"numpy": "2"}})


def arrays_of(name: str) -> Arrays:
    """The arrays of a right file of this name."""
    if name == PROBE:
        return dict(probe().as_arrays())
    right = record()
    return {**{f"probe.{key}": value for key, value in right.probe.as_arrays().items()}, **right.answers}


def written(folder: Path, name: str, arrays: Mapping[str, Any] | None = None) -> Path:
    """A right record and probe, one of whose files holds these arrays; its path."""
    record().save(folder / "r")
    probe().save(folder / "r" / PROBE)
    path = folder / "r" / name
    if arrays is not None:
        np.savez(path, allow_pickle=True, **arrays)
    return path


def with_array(name: str, key: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: written(folder, name, {**arrays_of(name), key: value})


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = written(folder, name)
        path.write_bytes(change(path.read_bytes()))

    return make


def with_path(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(written(folder, name))


def with_facts(**changes: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = written(folder, FACTS)
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return make


# ---- the doors


def load(folder: Path) -> object:
    return Record.load(folder / "r")


def load_of_model(folder: Path) -> object:
    return Record.load(folder / "r", config=CONFIG)


def load_probe(folder: Path) -> object:
    return Probe.load(folder / "r" / PROBE)


def ask(folder: Path) -> object:
    asked = Probe.load(folder / "r" / PROBE)
    asked.check(CONFIG)
    return asked


def command(folder: Path) -> object:
    """The backend's own process, but in this one: its status and last line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = recorder.main(["nowhere", "--backend", "pt", "--probe", str(folder / "r" / PROBE), "--out", "out"])
    assert status == 2
    raise GPTJError(said.getvalue())


DOORS = {ARRAYS: load, PROBE: load_probe, FACTS: load}


# ---- arrays of another kind


def _other_arrays(value: np.ndarray) -> dict[str, Any]:
    others = {
        "text": np.full(value.shape, "1.0"),
        "bytes": np.full(value.shape, b"1.0"),
        "objects": np.full(value.shape, None),
        "booleans": np.ones(value.shape, np.bool_),
        "complex": value.astype(np.complex128),
        "dates": np.ones(value.shape, "datetime64[s]"),
        "pairs": np.zeros(value.shape, [("a", "f4"), ("b", "f4")]),
        "one axis more": value[None],
        "two axes more": value[None, None],
    }
    if value.dtype.kind == "f":
        others |= {"whole numbers": np.ones(value.shape, np.int64), "float16": value.astype(np.float16)}
    else:
        others |= {"fractions": value.astype(np.float64), "unsigned": value.astype(np.uint8)}
    if value.ndim:
        others |= {"nothing": value[:0], "a row less": value[:-1], "a row more": np.concatenate([value, value[:1]]),
                   "a number": value.reshape(-1)[0], "one long row": value.reshape(-1)}  # fmt: skip
    return others


def _kinds(name: str, keys: tuple[str, ...]) -> Iterator[Malformed]:
    right = arrays_of(name)
    for key in keys:
        for what, value in _other_arrays(np.asarray(right[key])).items():
            if (what, key) != ("one axis more", "loss") or name == PROBE:
                yield Malformed(f"{name}: {key} is {what}", with_array(name, key, value), DOORS[name], name)


# ---- files of another kind


def _npy(header: bytes, *, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + bytes(64)


def _with_member(key: str, data: bytes, **options: Any) -> Callable[[Path], object]:
    """Replaces one member of the archive by these bytes, which need not be an array."""

    def change(path: Path) -> None:
        members = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, old in {**members, f"{key}.npy": data}.items():
                archive.writestr(name, old)

    return change


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in arrays_of(path.name):
            archive.writestr(f"{name}.npy", bytes(20_000_000))


def _compressed(path: Path) -> None:
    np.savez_compressed(path, **arrays_of(path.name))


def _flagged(bit: int) -> Callable[[bytes], bytes]:
    """Sets a flag in every header of the archive, as an encrypted one has it."""

    def change(data: bytes) -> bytes:
        out = bytearray(data)
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = data.find(mark)
            while at >= 0:
                out[at + offset] |= bit
                at = data.find(mark, at + 4)
        return bytes(out)

    return change


def _method(number: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        out = bytearray(data)
        for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            at = data.find(mark)
            while at >= 0:
                out[at + offset] = number
                at = data.find(mark, at + 4)
        return bytes(out)

    return change


def _flip(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _twice(path: Path) -> None:
    import warnings

    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"again")


def _comment(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"hello"


HEADERS = {
    "no literal": b"{'descr': <i8, ",
    "a text without its end": b"{'descr': '<i8, 'fortran_order': False}",
    "brackets without end": b"(" * 3000,
    "a call": b"{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': ()}",
    "a shape of billions": b"{'descr': '<i8', 'fortran_order': False, 'shape': (4000000000, 4000000000)}",
    "a negative shape": b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 2)}",
    "a shape that is true": b"{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}",
    "a shape of a thousand digits": b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"9" * 1000 + b",)}",
    "a thousand axes": b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"1," * 1000 + b")}",
    "no shape": b"{'descr': '<i8', 'fortran_order': False}",
    "a member more": b"{'descr': '<i8', 'fortran_order': False, 'shape': (), 'x': 1}",
    "columns first": b"{'descr': '<i8', 'fortran_order': True, 'shape': (2, 4)}",
    "an unknown dtype": b"{'descr': '<q9', 'fortran_order': False, 'shape': ()}",
    "a list as its dtype": b"{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': ()}",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (8,)}",
    "zeros": bytes(100),
    "nothing": b"",
}


def _files(name: str, key: str) -> Iterator[Malformed]:
    in_bytes: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "text": lambda data: b"nonsense",
        "cut in the middle": lambda data: data[: len(data) // 2],
        "cut by a byte": lambda data: data[:-1],
        "a byte longer": lambda data: data + b"x",
        "a byte changed": _flip,
        "encrypted": _flagged(1),
        "said to be deflated": _method(8),
        "said to be LZMA": _method(14),
        "a single array": lambda data: _npy(HEADERS["objects"]),
        "a pickle": lambda data: b"\x80\x04K\x01.",
        "an HTML page": lambda data: b"<!doctype html>",
    }
    on_paths: dict[str, Callable[[Path], object]] = {
        "a FIFO": _fifo,
        "a folder": _folder,
        "gone": Path.unlink,
        "compressed": _compressed,
        "a zip bomb": _bomb,
        "a member twice": _twice,
        "an archive with a comment": _comment,
        "a terabyte of nothing": lambda path: os.truncate(path, 2**40),
        "an array more": lambda path: _with_member("more", _npy(HEADERS["objects"]))(path),
        "a member that is no array": _with_member(key, b"hello"),
        "a member that leads outside": _with_member("../../x", b"hello"),
        "an array of version 9": _with_member(key, _npy(b"{}", version=b"\x09\x00")),
        **{f"an array whose header is {what}": _with_member(key, _npy(header)) for what, header in HEADERS.items()},
    }
    for what, change in in_bytes.items():
        yield Malformed(f"{name}: {what}", with_bytes(name, change), DOORS[name], name)
    for what, on_path in on_paths.items():
        yield Malformed(f"{name}: {what}", with_path(name, on_path), DOORS[name], name)


def _without(name: str) -> Iterator[Malformed]:
    for key in arrays_of(name):
        rest = {other: value for other, value in arrays_of(name).items() if other != key}
        make = functools.partial(written, name=name, arrays=rest)
        yield Malformed(f"{name}: no {key}", make, DOORS[name], key.removeprefix("probe."))


# ---- facts


FACTS_WRONG: dict[str, list[Any]] = {
    "backend": ["jax", "PT", "", None, 7, ["pt"], "pt,tf"],
    "dtype": ["int8", "float99", "", None, 32, ["float32"]],
    "versions": [[], "numpy", 7, {"numpy": 2}, None],
    "environment": [[], {"A": None}, 7],
}


def _texts() -> Iterator[Malformed]:
    texts = {
        "no JSON": "nonsense",
        "a list": "[]",
        "a key twice": '{"backend": "pt", "backend": "tf", "dtype": "float32"}',
        "NaN": '{"backend": "pt", "dtype": "float32", "seconds": NaN}',
        "nested without end": '{"a":' * 100_000,
        "an integer of 5,000 digits": '{"seconds": ' + "9" * 5000 + "}",
        "empty": "",
    }
    for what, text in texts.items():
        make = with_bytes(FACTS, lambda data, text=text: text.encode())
        yield Malformed(f"{FACTS}: {what}", make, load, FACTS)
    changes: dict[str, Callable[[Path], object]] = {
        "a FIFO": _fifo,
        "a folder": _folder,
        "gone": Path.unlink,
        "a gigabyte of nothing": lambda path: os.truncate(path, 2**30),
    }
    for what, change in changes.items():
        yield Malformed(f"{FACTS}: {what}", with_path(FACTS, change), load, FACTS)


# ---- what a model cannot be asked, or have answered


def _changed(key: str, value: int) -> np.ndarray:
    array = np.array(probe().as_arrays()[key])
    array[..., -1] = value
    return array


QUESTIONS: dict[str, list[Any]] = {
    "input_ids": [_changed("input_ids", value) for value in (-1, 12, 2**40)],
    "prompt_ids": [_changed("prompt_ids", value) for value in (-1, 12)],
    "position_ids": [_changed("position_ids", value) for value in (-1, 16, 2**40)],
    "far_position_ids": [_changed("far_position_ids", 16)],
    "attention_mask": [_changed("attention_mask", value) for value in (2, -1)],
    "prompt_mask": [_changed("prompt_mask", 2)],
    "labels": [_changed("labels", value) for value in (-5, 12)],
    "new_tokens": [np.int64(value) for value in (0, -1, 17, 2**62)],
    "prefill": [np.int64(value) for value in (0, -1, 16, 2**62)],
    "seed": [np.int64(-1)],
}
WORD_OF = {"far_position_ids": "position_ids", "prompt_mask": "attention_mask"}


def _answers_of_another_model() -> Iterator[Malformed]:
    right = record()
    b, t = right.probe.input_ids.shape
    others = {
        "logits": (b, t, 13),
        "cached_logits": (b, t, 11),
        "hidden_states": (4, b, t, 8),
        "attentions": (2, b, 4, t, t),
        "greedy": (2, t + 99),
        "sampled": (2, right.probe.prompt_ids.shape[1]),
    }
    for key, shape in others.items():
        value = np.zeros(shape, right.answers[key].dtype)
        yield Malformed(f"{key} of {shape}", with_array(ARRAYS, key, value), load_of_model, key)
    logits = {key: np.zeros((b, t, 13), np.float32) for key in right.answers if key.endswith("logits")}
    make = functools.partial(written, name=ARRAYS, arrays={**arrays_of(ARRAYS), **logits})
    yield Malformed("all logits of a larger vocabulary", make, load_of_model, "logits")


# ---- a place that cannot be written to


def _full(save: Callable[[Path], object]) -> Callable[[Path], object]:
    """A disk that takes 100 bytes of a file."""

    def door(folder: Path) -> object:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            return save(folder / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            if (folder / "out").is_dir():
                assert not [*(folder / "out").iterdir()]
                (folder / "out").rmdir()

    return door


def _file_at_place(folder: Path) -> None:
    (folder / "place").write_text("a file")


CASES = [
    *_kinds(ARRAYS, ("logits", "cached_logits", "hidden_states", "loss", "greedy", "probe.input_ids", "probe.seed")),
    *_kinds(PROBE, ("input_ids", "prompt_mask", "new_tokens")),
    *_files(ARRAYS, "logits"),
    *_files(PROBE, "input_ids"),
    *_without(ARRAYS),
    *_without(PROBE),
    *(
        Malformed(f"{FACTS}: {key} is {json.dumps(value)}", with_facts(**{key: value}), load, key)
        for key, values in FACTS_WRONG.items()
        for value in values
    ),
    *_texts(),
    *(
        Malformed(f"a probe's {key} that the model does not have, {number}", with_array(PROBE, key, value), ask,
                  WORD_OF.get(key, key))
        for key, values in QUESTIONS.items()
        for number, value in enumerate(values)
    ),
    *_answers_of_another_model(),
    Malformed("the backend's process, a probe that is a FIFO", with_path(PROBE, _fifo), command, PROBE),
    Malformed("the backend's process, a probe of text", with_array(PROBE, "seed", np.array("x")), command, "seed"),
    Malformed("a record, a full disk", lambda folder: None, _full(lambda out: record().save(out)), ARRAYS),
    Malformed("a probe, a full disk", lambda folder: None, _full(lambda out: probe().save(out)), "out"),
    Malformed("a record, where a file stands", _file_at_place, lambda folder: record().save(folder / "place"), "place"),
    Malformed("a probe, in no folder", lambda folder: None,
              lambda folder: probe().save(folder / "no" / "p.npz"), "p.npz"),
    Malformed("a record, in a folder that is a file", _file_at_place,
              lambda folder: record().save(folder / "place" / "r"), "place"),
]  # fmt: skip
