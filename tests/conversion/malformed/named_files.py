"""The files that a folder has under fixed names, spoilt: a folder in its place, UTF-16, a link that lies."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from adapter_samples import write_sample_adapter
from lawful import good_folder
from tokenizer_samples import small
from weight_changes import WEIGHTS

from gptj.adapters import merge_folder, read_adapter
from gptj.checkpoint import open_checkpoint, verify_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.generation import GenerationConfig
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.pretrained import prepare
from gptj.serving.chat import ChatTemplate
from gptj.text.tokenizer import GPTJTokenizer
from malformed import Malformed

TITLE = "a folder's named files"
INDEX = "model.safetensors.index.json"


def model(folder: Path) -> None:
    good_folder(folder / "in")
    GenerationConfig(max_new_tokens=2).save_pretrained(folder / "in")


def noted(folder: Path) -> None:
    write_checkpoint(folder / "in", revealing_config(), revealing_fill(0))


def indexed(folder: Path) -> None:
    model(folder)
    names = open_checkpoint(folder / "in").tensors
    (folder / "in" / WEIGHTS).rename(folder / "in" / "model-00001-of-00001.safetensors")
    members = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "in" / INDEX).write_text(json.dumps(members))


def tokenizer(folder: Path) -> None:
    small().save_pretrained(folder / "in")
    (folder / "in" / "added_tokens.json").write_text("{}")
    (folder / "in" / "chat_template.jinja").write_text("hello")


def older(folder: Path) -> None:
    tokenizer(folder)
    (folder / "in" / "tokenizer.json").unlink()


def adapter(folder: Path) -> None:
    write_sample_adapter(folder / "in")


def mergeable(folder: Path) -> None:
    write_checkpoint(folder / "in", revealing_config(), revealing_fill(0))
    small().save_pretrained(folder / "in")
    write_sample_adapter(folder / "adapter")


def through_prepare(folder: Path) -> object:
    return prepare("causal_lm", folder / "in").generation_config


def through_merge(folder: Path) -> object:
    return merge_folder(folder / "in", folder / "adapter", folder / "out")


def fifo(path: Path, data: bytes) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path, bytes], None]:
    return lambda path, data: path.symlink_to(target)


def link_out(path: Path, data: bytes) -> None:
    outside = path.parent.parent / "elsewhere"
    outside.write_bytes(data)
    path.symlink_to(outside)


SPOILS: dict[str, Callable[[Path, bytes], object]] = {
    "a folder": lambda path, data: path.mkdir(),
    "empty": lambda path, data: path.write_bytes(b""),
    "UTF-16": lambda path, data: path.write_bytes(data.decode("latin-1").encode("utf-16")),
    "UTF-16 without its mark": lambda path, data: path.write_bytes(data.decode("latin-1").encode("utf-16-le")),
    "Latin-1": lambda path, data: path.write_bytes(b'{"na\xefve": 1}'),
    "zeros": lambda path, data: path.write_bytes(bytes(64)),
    "a link to nowhere": link_to("nowhere"),
    "a link to itself": lambda path, data: path.symlink_to(path.name),
    "a link to a device": link_to("/dev/zero"),
    "a FIFO": fifo,
    "a link out": link_out,
}

Door = Callable[[Path], object]
Outcome = Literal["refused", "said"]


def through_tokenizer(folder: Path) -> object:
    return GPTJTokenizer.from_pretrained(folder / "in")


FILES: tuple[tuple[str, Callable[[Path], None], Door, str, Outcome, Outcome], ...] = (
    ("config.json", model, through_prepare, "prepare", "refused", "refused"),
    ("config.json", model, lambda folder: GPTJConfig.from_pretrained(folder / "in"), "the config", "refused", "said"),
    ("generation_config.json", model, through_prepare, "prepare", "said", "said"),
    (
        "generation_config.json", model, lambda folder: GenerationConfig.from_pretrained(folder / "in"),
        "the settings", "refused", "said",
    ),
    ("manifest.json", noted, lambda folder: verify_checkpoint(folder / "in"), "verify", "refused", "refused"),
    (WEIGHTS, model, through_prepare, "prepare", "refused", "refused"),
    (INDEX, indexed, through_prepare, "prepare", "refused", "refused"),
    *(
        (name, tokenizer, through_tokenizer, "the tokenizer", "refused", "said")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    ),
    *(
        (name, older, through_tokenizer, "the older pair", "refused", "said")
        for name in ("vocab.json", "merges.txt")
    ),
    ("adapter_config.json", adapter, lambda folder: read_adapter(folder / "in"), "the adapter", "refused", "refused"),
    (
        "adapter_model.safetensors", adapter, lambda folder: read_adapter(folder / "in"),
        "the adapter", "refused", "refused",
    ),
)  # fmt: skip
"""A file, what makes a good folder, the door, what it is called, what comes of a spoilt file and of a link out."""


def spoilt(make: Callable[[Path], None], name: str, spoil: Callable[[Path, bytes], object]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        make(folder)
        path = folder / "in" / name
        data = path.read_bytes()
        path.unlink()
        spoil(path, data)

    return made


def rendered(folder: Path) -> object:
    return ChatTemplate.of_folder(folder / "in", small())


CASES = [
    *(
        Malformed(
            f"{name} is {what}, {called}", spoilt(make, name, spoil), door, name,
            out if what == "a link out" else outcome,
        )
        for (name, make, door, called, outcome, out), (what, spoil) in itertools.product(FILES, SPOILS.items())
    ),
    *(
        Malformed(
            f"chat_template.jinja is {what}", spoilt(tokenizer, "chat_template.jinja", spoil), rendered,
            "chat_template.jinja", "said" if what == "a link out" else "refused",
        )
        for what, spoil in SPOILS.items()
        if what not in ("empty", "zeros", "UTF-16 without its mark")
    ),
    *(
        Malformed(f"{name} is a link out, merged", spoilt(mergeable, name, link_out), through_merge, name)
        for name in ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
    ),
]  # fmt: skip
