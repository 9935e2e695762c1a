"""Weights under a wrapper's names, in a training checkpoint, under a variant's file names, in two equal sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from weight_changes import (
    INDEX,
    WEIGHTS,
    Arrays,
    arrays,
    as_bin,
    as_format,
    renamed,
    sharded,
    store,
    with_more,
    write_legacy,
)

from lawful import Oddity

PREFIXES = (
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "pretrained_model.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "_forward_module.model.",
    "net.",
)
VALUE_HEAD = {"v_head.summary.weight": np.ones((1, 4), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}


def put_before(prefix: str, tensors: Arrays) -> Arrays:
    return {prefix + name: array for name, array in tensors.items()}


def nested(key: str) -> Callable[[Arrays], Any]:
    return lambda tensors: {"epoch": 3, "lr": 0.5, key: tensors, "optimizer": {"state": {0: None}, "groups": [1, 2.0]}}


def moved(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name) and None


def total(value: object) -> Callable[[Path], None]:
    def change(index: dict[str, Any]) -> None:
        size = index["metadata"]["total_size"]
        index["metadata"]["total_size"] = value(size) if callable(value) else value

    return lambda folder: sharded(folder, change)


def both(to: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder.parent / "kept")
        as_format(to)(folder)
        shutil.move(folder.parent / "kept", folder / WEIGHTS)

    return make


def single_and_shards(folder: Path) -> None:
    tensors = arrays(folder)
    sharded(folder)
    store(folder, tensors)


def without(name: str) -> Callable[[Path], None]:
    """The folder without a row that is zeros in the good one too."""

    def make(folder: Path) -> None:
        tensors = arrays(folder)
        del tensors[name]
        store(folder, tensors)

    return make


def variant_shards(folder: Path) -> None:
    sharded(folder, infix=".fp16")
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")


def legacy(folder: Path) -> None:
    as_bin(lambda tensors: tensors, write=write_legacy)(folder)


def moments(tensors: Arrays) -> dict[str, Any]:
    """What an optimizer keeps beside a model: tensors under numbers, and its settings."""
    state = {n: {"step": np.ones(1, np.float32), "exp_avg": 2 * a} for n, a in enumerate(tensors.values())}
    return {"state": state, "param_groups": [{"lr": 0.5, "betas": [0.9, 0.95], "params": [*range(len(tensors))]}]}


TRAINERS: dict[str, Callable[[Arrays], Any]] = {
    "an optimizer behind the model": lambda t: {"epoch": 3, "model": t, "optimizer": moments(t)},
    "an optimizer before the model": lambda t: {"optimizer": moments(t), "state_dict": t},
    "an optimizer among the tensors": lambda t: {**t, "optimizer": moments(t)},
    "optimizers in a list": lambda t: {"optimizer_states": [moments(t), moments(t)], "module": t, "lr": None},
    "a random generator's state at the top": lambda t: {"rng": np.ones(8, np.float32), "model": t, "optimizer": {}},
    "an optimizer with tensors under words": lambda t: {
        "model": t, "optimizer": {"loss_scaler": {"scale": np.ones(1, np.float32)}, "fp32": [*t.values()]},
    },
}  # fmt: skip


ODDITIES = [
    *(Oddity(f"{p} before all names", renamed(lambda n, p=p: p + n), "wrapper") for p in PREFIXES),
    Oddity("an adapter's config beside whole weights",
           lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "adapter_config.json"),
    Oddity("only the base is compiled",
           renamed(lambda n: n.replace("transformer.", "transformer._orig_mod.")), "_orig_mod"),
    Oddity("FSDP's module in each block",
           renamed(lambda n: n.replace(".attn.", "._fsdp_wrapped_module.attn.")), "_fsdp_wrapped_module"),
    Oddity("activation checkpointing in each block",
           renamed(lambda n: n.replace(".mlp.", ".mlp._checkpoint_wrapped_module.")), "_checkpoint_wrapped_module"),
    *(Oddity(f"{p} in a .bin", as_bin(lambda t, p=p: put_before(p, t)), "wrapper", direct=False) for p in PREFIXES[:5]),
    *(
        Oddity(f"a .bin nested in {key}", as_bin(nested(key)), key, direct=False)
        for key in ("state_dict", "model", "module", "model_state_dict")
    ),
    Oddity("a .bin nested twice, with a prefix", as_bin(lambda t: {"a": {"b": put_before("module.", t)}, "step": 1}),
           "a.b", direct=False),
    Oddity("a number among the tensors", as_bin(lambda t: {**t, "epoch": 3}), "epoch", direct=False),
    Oddity("a value head", with_more(VALUE_HEAD), "v_head"),
    Oddity("a value head under wrappers", with_more({f"module.{n}": a for n, a in VALUE_HEAD.items()},
           lambda n: "module.pretrained_model." + n), "v_head"),
    Oddity("trlx's heads", with_more({"ilql_heads.q_heads.0.0.weight": np.ones((2, 2), np.float32),
           "frozen_head.decoder_blocks.0.ln_1.weight": np.ones(2, np.float32)},
           lambda n: "base_model." + n), "2 tensors"),
    Oddity("a value head in a .bin", as_bin(lambda t: {**t, **VALUE_HEAD}), "2 tensors", direct=False),
    Oddity("a .bin of before 1.6", legacy, "before 1.6", direct=False),
    *(
        Oddity(f"{what} in a .bin of before 1.6", as_bin(TRAINERS[what], write=write_legacy), "optimizer", direct=False)
        for what in ("an optimizer before the model", "a random generator's state at the top")
    ),
    Oddity("old buffers under a wrapper", with_more({"module.transformer.h.0.attn.masked_bias": np.ones(1, np.float32)},
           lambda n: "module." + n), "wrapper"),
    Oddity("an fp16 variant's name", moved("model.fp16.safetensors"), "variant"),
    Oddity("a variant chosen", moved("model.fp16.safetensors"), arguments={"weights": "model.fp16.safetensors"}),
    Oddity("a variant's shards", variant_shards, "variant"),
    Oddity("a variant's .bin", as_bin(lambda t: t, "pytorch_model.fp16.bin"), "variant", direct=False),
    Oddity("a total_size counted wrongly", total(lambda n: n // 2), "metadata.total_size"),
    Oddity("a total_size of 0", total(0), "metadata.total_size"),
    Oddity("a total_size that is text", total(str), "metadata.total_size"),
    Oddity("a total_size that is a float", total(lambda n: n + 0.5), "metadata.total_size"),
    Oddity("a total_size that is true", total(True), "metadata.total_size"),
    Oddity("no total_size", total(None)),
    Oddity("a file and shards that are equal", single_and_shards, "several weight sets"),
    Oddity("a .bin beside it that is equal", both("bin"), "pytorch_model.bin"),
    Oddity("a flax_model.msgpack beside it that is equal", both("flax"), "flax_model.msgpack"),
    Oddity("a weights file in place of the folder", lambda folder: None, inside=WEIGHTS),
    Oddity("a shard in place of the folder", sharded, "shards", inside="model-00001-of-00002.safetensors"),
]  # fmt: skip
