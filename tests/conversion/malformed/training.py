"""Training data, and checkpoints of a run, that are not what they should be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizer_samples import small

from gptj.finetune.checkpoints import Identity, RunFolder, write_moments
from gptj.finetune.curve import Row
from gptj.finetune.data import make_windows, read_documents
from gptj.finetune.loop import Progress
from gptj.finetune.settings import Settings
from malformed import Malformed

TITLE = "training data and checkpoints"

DIGITS = "9" * 5000
NOT_TEXT: dict[str, Any] = {
    "null": None, "a number": 1, "a fraction": 0.5, "true": True, "a list": ["a"], "an empty list": [],
    "an object": {"text": "a"}, "bytes as numbers": [97, 98],
}  # fmt: skip


# ---- data


def written(data: bytes | str, name: str = "data.jsonl") -> Callable[[Path], object]:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(raw)


def learn(folder: Path) -> object:
    [path] = folder.iterdir()
    return make_windows(path, read_documents(path), small(), length=16, pack=False)


def spoilt_lines() -> Iterator[tuple[str, str, str]]:
    """What is wrong with a line, the line, and a word of the error besides its number."""
    for said, value in NOT_TEXT.items():
        yield f"text is {said}", json.dumps({"text": value}), "text"
        yield f"prompt is {said}", json.dumps({"prompt": value, "completion": "a"}), "prompt"
        yield f"completion is {said}", json.dumps({"prompt": "a", "completion": value}), "completion"
    for name in ("Text", "texts", "content", "instruction", "input", "response", "completions", "prompts", "messages"):
        yield f"{name} in place of text", json.dumps({name: "a"}), name
    for name in ("prompt", "completion"):
        yield f"{name} alone", json.dumps({name: "a"}), "completion" if name == "prompt" else "prompt"
        yield f"{name} beside text", json.dumps({"text": "a", name: "b"}), "text"
    yield "all three", json.dumps({"text": "a", "prompt": "b", "completion": "c"}), "text"
    yield "an empty text", json.dumps({"text": ""}), "text"
    yield "an empty completion", json.dumps({"prompt": "a", "completion": ""}), "completion"
    yield "a longer prompt and completion than a window", json.dumps({"prompt": "a" * 99, "completion": "b"}), "window"
    for said, line in {
        "text without quotes": "a", "a list": '["a"]', "a text": '"a"', "a number": "1", "null": "null",
        "an object cut short": '{"text": "a', "two objects": '{"text": "a"}{"text": "b"}',
        "a comma behind": '{"text": "a"},',
        "single quotes": "{'text': 'a'}", "a comment": '{"text": "a"} // a',
        "a key twice": '{"text": "a", "text": "b"}',
        "NaN": '{"text": NaN}', "Infinity": '{"text": Infinity}', "a tab in a text": '{"text": "a\tb"}',
        "nesting": "[" * 50_000, "nested objects": '{"text":' * 50_000, "no value": '{"text": }', "no key": '{: "a"}',
        "an unknown escape": '{"text": "\\x"}', "half a character": '{"text": "\\ud800"}',
        "half a character behind": '{"text": "a\\udfff"}', "a long number": '{"text": "a", "n": ' + "9" * 5000 + "}",
        "a large number": '{"text": "a", "n": 1e999}',
    }.items():  # fmt: skip
        yield said, line, "line"


def data_cases() -> Iterator[Malformed]:
    for said, line in {
        "a comma behind the last member": '{"text": "a",}', "no end": '{"text": "a"',
        "a long number": '{"n": ' + DIGITS,
        "nested objects": '{"text":' * 50_000, "nesting": '{"text": "a", "n":' + "[" * 50_000,
        "a space first": ' { "a"',
        "no member": "{}", "a byte order mark first": '\ufeff{"text": "a",}', "an array": '[{"text": "a"}]',
        "an array over lines": '[\n  {"text": "a"},\n  {"text": "b"}\n]',
    }.items():  # fmt: skip
        for name in ("data", "data.dat"):
            yield Malformed(f"JSON lines in {name}: {said}", written(line + "\n", name), learn, "line 1")
    good = '{"text": "one line"}'
    for said, line, word in spoilt_lines():
        for place, lines in {
            "first": [line, good],
            "third": [good, "", line],
            "last, without an end": [good, line],
        }.items():
            number = 1 + lines.index(line)
            names = f"line {number}" if word == "line" else word
            yield Malformed(f"{said}, on the {place} line", written("\n".join(lines)), learn, names)
    for name in ("data.jsonl", "data.txt", "data"):
        for said, data in {
            "empty": b"",
            "spaces": b" \n\t\n",
            "a mark alone": "\ufeff".encode(),
            "line ends": b"\r\n" * 9,
        }.items():
            yield Malformed(f"{said}, {name}", written(data, name), learn, "nothing to learn")
        for said, data in {
            "a byte that is no UTF-8": b'{"text": "a"}\n{"text": "\xff"}', "UTF-16": '{"text": "a"}\n'.encode("utf-16"),
            "a NUL": b'{"text": "a"}\nb\0', "half a character at the end": b'{"text": "a"}\n\xe2\x82',
            "Latin-1": "{\"text\": \"a\"}\ncaf\u00e9".encode("latin-1"),
        }.items():  # fmt: skip
            yield Malformed(f"{said}, {name}", written(data, name), learn, "line")
    yield Malformed("an array of objects", written('[{"text": "a"}]'), learn, "array")
    yield Malformed("an array over lines", written('[\n{"text": "a"}\n]', "data.json"), learn, "array")
    yield Malformed("a folder", lambda folder: (folder / "data.jsonl").mkdir(), learn, "data.jsonl")
    yield Malformed("fields that are not learnt", written('{"text": "a b", "id": 1}'), learn, "id", "said")


# ---- checkpoints


SETTINGS = Settings(steps=4)
IDENTITY = Identity(
    backend="pt", settings=SETTINGS, steps=4, model={"config_sha256": "a"}, data={"windows": 2, "sha256": "b"},
    evaluation=None,
)  # fmt: skip
SHAPES = {"wte.weight": (3, 2), "ln_f.bias": (2,)}
ROWS = [Row(step=n, epoch=n, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=n, seconds=0.1 * n) for n in (1, 2)]


def checkpoint(folder: Path) -> Path:
    """A checkpoint after two of four updates."""
    moments = {f"{m}.{name}": np.ones(shape, np.float32) for name, shape in SHAPES.items() for m in ("first", "second")}
    with RunFolder(folder / "run", resume=False) as run:
        progress = Progress(step=2, updates=2, tokens=2, seconds=0.2)

        def write(place: Path) -> None:
            place.mkdir()
            write_moments(place, moments.items())

        return run.save(progress, IDENTITY, ROWS, write=write)


def resume(folder: Path) -> object:
    with RunFolder(folder / "run", resume=True) as run:
        saved = run.last()
        assert saved is not None
        IDENTITY.require_same(saved.stored, saved.folder)
        return saved.progress, saved.rows, saved.moments(SHAPES)


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Makes a checkpoint whose training.json was changed."""

    def make(folder: Path) -> None:
        path = checkpoint(folder) / "training.json"
        stored = json.loads(path.read_text())
        change(stored)
        path.write_text(json.dumps(stored))

    return make


def replaced(name: str, data: bytes | None) -> Callable[[Path], None]:
    """Makes a checkpoint of which a file is another, or missing."""

    def make(folder: Path) -> None:
        path = checkpoint(folder) / name
        path.unlink()
        if data is not None:
            path.write_bytes(data)

    return make


def cut(name: str, count: int) -> Callable[[Path], None]:
    """Makes a checkpoint of which a file lacks its last bytes."""

    def make(folder: Path) -> None:
        path = checkpoint(folder) / name
        path.write_bytes(path.read_bytes()[:-count])

    return make


def moments(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Makes a checkpoint whose moments are others."""

    def make(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        path = checkpoint(folder) / "optimizer.safetensors"
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)

    return make


def checkpoint_cases() -> Iterator[Malformed]:
    for name in ("step", "updates", "tokens", "seconds", "best_step", "best_loss"):
        odd: dict[str, Any] = {"text": "2", "negative": -1, "a list": [2], "true": True, "an object": {}}
        if name not in ("best_step", "best_loss"):
            odd["null"] = None
        if name in ("seconds", "best_loss"):
            del odd["negative"]
        for said, value in odd.items():
            yield Malformed(
                f"{name} is {said}",
                changed(lambda stored, name=name, value=value: stored["progress"].update({name: value})), resume,
                "progress",
            )  # fmt: skip
    for said, value in {"null": None, "text": "a", "a list": [1], "empty": {}, "a number": 2}.items():
        yield Malformed(
            f"progress is {said}",
            changed(lambda stored, value=value: stored.update(progress=value)),
            resume,
            "progress",
        )
        scale = value if said != "empty" else {"scale": 0, "good": 0}
        yield Malformed(
            f"the scale is {scale}",
            changed(lambda stored, scale=scale: stored["progress"].update(scale=scale)), resume, "progress",
        )  # fmt: skip
    for step in (0, 1, 3, 10**9):
        yield Malformed(
            f"the place of update {step}",
            changed(lambda stored, step=step: stored["progress"].update(step=step)), resume, "progress",
        )  # fmt: skip
    yield Malformed("an unknown field", changed(lambda stored: stored["progress"].update(place=1)), resume, "progress")
    for value in (None, 0, 2, "1", [1]):
        yield Malformed(
            f"format {value!r}", changed(lambda stored, value=value: stored.update(format=value)), resume, "format"
        )
    for field in dataclasses.fields(Settings):
        if field.name == "save_every":
            continue
        option = "--" + field.name.replace("_", "-")
        yield Malformed(
            f"another {field.name}", changed(lambda stored, name=field.name: stored["settings"].update({name: "x"})),
            resume, option,
        )  # fmt: skip
        yield Malformed(
            f"no {field.name}",
            changed(lambda stored, name=field.name: stored["settings"].update({name: ["gone"]})), resume, option,
        )  # fmt: skip
    for name, option in {"backend": "--backend", "model": "DIR", "data": "DATA", "evaluation": "--eval"}.items():
        for said, value in {"another": {"sha256": "c"}, "a number": 1, "text": "x"}.items():
            yield Malformed(
                f"{name} is {said}",
                changed(lambda stored, name=name, value=value: stored.update({name: value})), resume, option,
            )  # fmt: skip
    for value in (None, "x", 3, []):
        yield Malformed(
            f"settings {value!r}", changed(lambda stored, value=value: stored.update(settings=value)), resume, "--"
        )
    for name in ("training.json", "optimizer.safetensors", "loss.csv"):
        for said, data in {"missing": None, "empty": b"", "noise": b"\x00\xff" * 40, "text": b"hello\n"}.items():
            yield Malformed(f"{name} is {said}", replaced(name, data), resume, name)
        for count in (2, 20):
            yield Malformed(f"{name} lacks {count} bytes", cut(name, count), resume, name)
    yield Malformed("the curve of one update more", replaced("loss.csv", b"step\n"), resume, "loss.csv")
    for said, change in {
        "one is missing": lambda arrays: arrays.pop("first.ln_f.bias"),
        "one is too many": lambda arrays: arrays.update({"first.other": np.ones(2, np.float32)}),
        "of another shape": lambda arrays: arrays.update({"second.wte.weight": np.ones((2, 3), np.float32)}),
        "not a number": lambda arrays: arrays["first.ln_f.bias"].fill(np.nan),
        "infinite": lambda arrays: arrays["second.wte.weight"].fill(np.inf),
        "other names": lambda arrays: arrays.update({"exp_avg.ln_f.bias": arrays.pop("first.ln_f.bias")}),
    }.items():  # fmt: skip
        yield Malformed(f"moments: {said}", moments(change), resume, "optimizer.safetensors")


CASES = [*data_cases(), *checkpoint_cases()]
