"""Manifests that were edited, and folders that hold more than their manifest covers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint_samples import CONFIG, write_sample
from gptj_conversion.convert import convert
from gptj_conversion.verify import verify

from gptj.checkpoint import verify_checkpoint
from gptj.pretrained import prepare
from malformed import Malformed

TITLE = "manifests"
MANIFEST, CONFIG_FILE, WEIGHTS = "manifest.json", "config.json", "model.safetensors"
OTHER_HASH = hashlib.sha256(b"").hexdigest()
Members = dict[str, Any]


def folder_of(folder: Path, to: str) -> Path:
    """A right folder in a format."""
    source = write_sample(folder / "in", CONFIG.replace(n_layer=1, n_head=4, n_embd=16, n_inner=None, vocab_size=12))
    if to == "safetensors":
        return source
    return convert(source, folder / "x", to=to, fingerprint=False, **({"shards": 2} if to == "mesh" else {}))


def whole_hash(members: Members) -> str:
    """The hash of all tensors, as the manifest has it."""
    rows = [[name, r["dtype"], list(r["shape"]), r["sha256"]] for name, r in members["tensors"].items()]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def edited(change: Callable[[Members], object], *, to: str = "safetensors") -> Callable[[Path], None]:
    """Makes a folder whose manifest was changed, by somebody who also sets the hash of the whole right."""

    def make(folder: Path) -> None:
        path = folder_of(folder, to) / MANIFEST
        members = json.loads(path.read_text())
        before = members.get("sha256")
        change(members)
        if members.get("sha256") == before:
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                members["sha256"] = whole_hash(members)
        path.write_text(json.dumps(members))

    return make


def changed(change: Callable[[Path], object], *, to: str = "safetensors") -> Callable[[Path], None]:
    """Makes a folder in which something was changed."""
    return lambda folder: change(folder_of(folder, to))


def place(folder: Path) -> Path:
    return folder / "x" if (folder / "x").exists() else folder / "in"


def door(folder: Path) -> object:
    return verify(place(folder))


def core_door(folder: Path) -> object:
    return verify_checkpoint(place(folder))


def load_door(folder: Path) -> object:
    return prepare("causal_lm", place(folder), verify=True)


def other_weights_door(folder: Path) -> object:
    return prepare("causal_lm", place(folder), weights="other.safetensors", verify=True)


# ---- each field with each kind of wrong value


def _weights(members: Members) -> Members:
    return members["files"][next(iter(next(iter(members["tensors"].values()))["files"]))]


def _config(members: Members) -> Members:
    return members["files"][CONFIG_FILE]


def _tensor(members: Members) -> Members:
    return next(record for record in members["tensors"].values() if len(record["shape"]) == 2)


def _values(members: Members) -> Members:
    return _tensor(members)["values"]


FIGURES = {"minimum": -1.0, "maximum": 1.0, "nan": 0, "inf": 0}
FIELDS: list[tuple[str, Callable[[Members], Members], dict[str, list[Any]]]] = [
    ("", lambda members: members, {
        "format": ["2", 1, 3, None, 2.0, True, [2]],
        "sha256": ["", "x", None, 7, OTHER_HASH, OTHER_HASH.upper(), OTHER_HASH[:-1]],
        "tool": [None, 7, ["gptj"]],
        "config_sha256": ["", None, 7, OTHER_HASH, OTHER_HASH + "0"],
        "files": [{}, [], None, "x", 7],
        "tensors": [{}, [], None, "x", 7],
        "provenance": [None, [], "x"],
        "fingerprint": [{}, [], "x", 7, {"token_ids": [1], "output": "logits", "places": [], "values": [], "norm": 1.0},
                        {"token_ids": [1], "output": "logits", "places": [0], "values": [], "norm": 1.0},
                        {"token_ids": [1], "output": "x", "places": [0], "values": [1.0], "norm": 1.0},
                        {"token_ids": [1], "output": "logits", "places": [0], "values": ["1"], "norm": 1.0},
                        {"token_ids": [-1], "output": "logits", "places": [0], "values": [1.0], "norm": 1.0},
                        {"token_ids": [1], "output": "logits", "places": [0], "values": [1.0], "norm": -1.0}],
        "weights_format": [None, 7, "onnx", "bin", "../x"],
        "extra": [1],
    }),
    ("the weights' ", _weights, {
        "nbytes": ["4096", -1, 0, 2**60, None, 1.5, True, 10**400],
        "hashed_bytes": ["4096", -1, 0, 1, 2**60, None, 64, 10**400],
        "sha256": ["", "x", None, 7, OTHER_HASH, OTHER_HASH.upper()],
        "extra": [1],
    }),
    ("config.json's ", _config, {
        "nbytes": ["1", -1, 0, 1, 2**60, None],
        "hashed_bytes": ["1", -1, 0, 1, None],
        "sha256": ["", None, OTHER_HASH, [OTHER_HASH]],
    }),
    ("a tensor's ", _tensor, {
        "files": ["model.safetensors", [], ["nowhere.safetensors"], ["../x"], [7], None,
                  [WEIGHTS, WEIGHTS], [WEIGHTS, CONFIG_FILE]],
        "dtype": ["float16", "float99", "F32", None, 7, ["float32"]],
        "shape": ["12", [-12, -16], [16, 12], [12.0, 16], None, [], [2**62, 2**62], [1] * 40, [True, 16]],
        "sha256": ["", None, 7, OTHER_HASH],
        "values": [None, [], {}, 7, FIGURES | {"nan": 1}, FIGURES | {"minimum": -99.0}, FIGURES | {"inf": "0"},
                   FIGURES | {"minimum": 2.0}, FIGURES | {"maximum": None}, FIGURES | {"more": 1}],
        "cast": [7, [], {}, {"source_dtype": "x", "overflowed": 0, "underflowed": 0, "largest_relative_rounding": 0.0},
                 {"source_dtype": "float32", "overflowed": -1, "underflowed": 0, "largest_relative_rounding": 0.0},
                 {"source_dtype": "float32", "overflowed": 0, "underflowed": 0, "largest_relative_rounding": "0"}],
        "origin": [7, "x", {}, {"files": "x", "rule": "copied"}, {"files": [7], "rule": "copied"},
                   {"files": ["x"], "rule": None}],
        "extra": [1],
    }),
]  # fmt: skip


def _set(of: Callable[[Members], Members], key: str, value: Any, members: Members) -> None:
    of(members)[key] = value


def _drop(of: Callable[[Members], Members], key: str, members: Members) -> None:
    del of(members)[key]


def _fields() -> Iterator[Malformed]:
    for whose, of, wrong in FIELDS:
        for key, values in wrong.items():
            for value in values:
                change = functools.partial(_set, of, key, value)
                named = "not what was written" if _is_a_difference(whose, key, value) else MANIFEST
                yield Malformed(f"{whose}{key} is {json.dumps(value)[:70]}", edited(change), door, named)
            if key not in ("extra", "fingerprint", "weights_format", "cast", "origin"):
                yield Malformed(f"no {whose}{key}", edited(functools.partial(_drop, of, key)), door, MANIFEST)


def _is_a_difference(whose: str, key: str, value: Any) -> bool:
    """Whether the value is lawful, so that what is refused is the folder that differs from it."""
    lawful: dict[str, list[Any]] = {
        "the weights' nbytes": [2**60],
        "the weights' sha256": [OTHER_HASH],
        "config.json's sha256": [OTHER_HASH],
        "a tensor's dtype": ["float16"],
        "a tensor's shape": [[16, 12], [], [2**62, 2**62]],
        "a tensor's sha256": [OTHER_HASH],
        "a tensor's values": [FIGURES | {"nan": 1}, FIGURES | {"minimum": -99.0}],
        "the weights' hashed_bytes": [1, 64, 0],
    }
    return value in lawful.get(f"{whose}{key}", []) and type(value) is not bool


# ---- names


NAMES = ["../x", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "C:x", "\ud800", "a\0b", "a\nb", MANIFEST, "nowhere.txt"]


def _rename_config(name: str, members: Members) -> None:
    members["files"][name] = members["files"].pop(CONFIG_FILE)


def _add_file(name: str, members: Members) -> None:
    members["files"][name] = {"nbytes": 0, "sha256": OTHER_HASH, "hashed_bytes": 0}


def _names() -> Iterator[Malformed]:
    for name in NAMES:
        word = "nowhere.txt" if name == "nowhere.txt" else MANIFEST
        yield Malformed(f"config.json is called {name!r}", edited(functools.partial(_rename_config, name)), door, word)
        for to in ("safetensors", "bin", "mesh"):
            # A TPU checkpoint has folders in it, so there a/b is only not there.
            named = "a/b" if (name, to) == ("a/b", "mesh") else word
            make = edited(functools.partial(_add_file, name), to=to)
            yield Malformed(f"{to}: a file more, called {name!r}", make, door, named)


# ---- texts and files


def _text(path: Path, text: str) -> None:
    (path / MANIFEST).write_text(text)


def _twice(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    at = text.index('"files": {') + len('"files": {')
    name = f'"{CONFIG_FILE}": {{"nbytes": 1, "sha256": "{OTHER_HASH}", "hashed_bytes": 1}},'
    (path / MANIFEST).write_text(f"{text[:at]}{name}{text[at:]}")


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    (path / MANIFEST).unlink()
    make(path / MANIFEST)


def _on_disk() -> Iterator[Malformed]:
    changes: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: _text(path, ""),
        "no JSON": lambda path: _text(path, "{"),
        "a list": lambda path: _text(path, "[]"),
        "NaN": lambda path: _text(path, '{"format": NaN}'),
        "an integer of 5,000 digits": lambda path: _text(path, '{"format": ' + "9" * 5000 + "}"),
        "nested without end": lambda path: _text(path, '{"a":' * 100_000),
        "a file twice": _twice,
        "a gigabyte of nothing": lambda path: os.truncate(path / MANIFEST, 2**30),
        "a FIFO": lambda path: _replace(path, os.mkfifo),
        "a folder": lambda path: _replace(path, Path.mkdir),
        "gone": lambda path: (path / MANIFEST).unlink(),
        "a link out of the folder": lambda path: _replace(path, lambda at: at.symlink_to("/etc/hostname")),
    }
    for what, change in changes.items():
        for to in ("safetensors", "flax"):
            yield Malformed(f"{to}: the manifest is {what}", changed(change, to=to), door, MANIFEST)


# ---- what no hash covers


def _uncover(name: str, members: Members) -> None:
    del members["files"][name]


def _edit_config(path: Path) -> None:
    members = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps(members | {"n_head": 2}))


def _uncovered_and_edited(path: Path) -> None:
    members = json.loads((path / MANIFEST).read_text())
    _uncover(CONFIG_FILE, members)
    (path / MANIFEST).write_text(json.dumps(members))
    _edit_config(path)


def _leave_out_a_tensor(members: Members) -> None:
    members["tensors"].popitem()


def _a_tensor_more(members: Members) -> None:
    members["tensors"]["transformer.h.9.ln_1.bias"] = _tensor(members)


def _swap(members: Members) -> None:
    one, other = (members["tensors"][f"transformer.h.0.attn.{kind}_proj.weight"] for kind in "kq")
    one["sha256"], other["sha256"] = other["sha256"], one["sha256"]


def _other_weights(path: Path) -> None:
    """The hashed weights under another name, and in their place some that were never hashed."""
    (path / WEIGHTS).rename(path / "other.safetensors")
    members = json.loads((path / MANIFEST).read_text().replace(WEIGHTS, "other.safetensors"))
    (path / MANIFEST).write_text(json.dumps(members))
    write_sample(path.parent / "y", _config_of(path), seed=9)
    (path.parent / "y" / WEIGHTS).rename(path / WEIGHTS)


def _unhashed_weights(path: Path) -> None:
    write_sample(path.parent / "y", _config_of(path), seed=9)
    (path.parent / "y" / WEIGHTS).rename(path / "other.safetensors")


def _config_of(path: Path) -> Any:
    from gptj.config import GPTJConfig

    return GPTJConfig.from_file(path)


def _add(name: str, path: Path) -> None:
    (path / name).write_text("{}")


def _coverage() -> Iterator[Malformed]:
    for where, way in (("verify", door), ("verify_checkpoint", core_door), ("from_pretrained", load_door)):
        yield Malformed(f"{where}: config.json is in no hash, and edited", changed(_uncovered_and_edited), way,
                        "config")  # fmt: skip
        yield Malformed(f"{where}: config.json is in no hash", edited(functools.partial(_uncover, CONFIG_FILE)),
                        way if where != "from_pretrained" else core_door, CONFIG_FILE, "said")  # fmt: skip
        for name in ("tokenizer.json", "generation_config.json", "vocab.txt"):
            if where != "from_pretrained":
                yield Malformed(f"{where}: {name} was added", changed(functools.partial(_add, name)), way, name, "said")
        for what, change in {
            "a tensor is left out": _leave_out_a_tensor,
            "a tensor that is not there": _a_tensor_more,
            "two hashes are swapped": _swap,
        }.items():
            yield Malformed(f"{where}: {what}", edited(change), way, "tensor")
        yield Malformed(f"{where}: other weights lie where they are read", changed(_other_weights), way,
                        "would be loaded")  # fmt: skip
    yield Malformed("from_pretrained: other weights are asked for", changed(_unhashed_weights), other_weights_door,
                    "other.safetensors")  # fmt: skip
    for to in ("bin", "flax", "tf"):
        yield Malformed(f"{to}: config.json is in no hash, and edited", changed(_uncovered_and_edited, to=to), door,
                        "config")  # fmt: skip
        yield Malformed(f"{to}: config.json is in no hash", edited(functools.partial(_uncover, CONFIG_FILE), to=to),
                        door, CONFIG_FILE, "said")  # fmt: skip
        yield Malformed(f"{to}: nothing of the weights is hashed", edited(_unhash, to=to), door, "hashed_bytes")
        for what, change in (("a tensor is left out", _leave_out_a_tensor), ("two hashes are swapped", _swap)):
            yield Malformed(f"{to}: {what}", edited(change, to=to), door, "tensor")
    for name in ("meta.json", "training_config.json", "step_0/shard_1/3.npz"):
        yield Malformed(f"mesh: {name} is in no hash", edited(functools.partial(_uncover, name), to="mesh"), door,
                        name, "said" if name.endswith("json") else "refused")  # fmt: skip


def _unhash(members: Members) -> None:
    _weights(members).update(hashed_bytes=0, sha256=OTHER_HASH)


CASES = [*_fields(), *_names(), *_on_disk(), *_coverage()]
