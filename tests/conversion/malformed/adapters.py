"""Folders of LoRA adapters that are none, or are another model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from adapter_samples import KINDS, sample_values, write_sample_adapter, write_tensors
from checkpoint_samples import write_sample

from gptj.adapters import AdapterConfig, adapter_rows, merge_folder, read_adapter
from gptj.parity.revealing import revealing_config
from malformed import Malformed

TITLE = "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."

Arrays = dict[str, np.ndarray]


def door(folder: Path) -> object:
    """Every number of the adapter, as a model takes it."""
    return [*read_adapter(folder / "in").arrays(revealing_config())]


def merging(folder: Path) -> object:
    """The command that merges it."""
    return merge_folder(folder / "base", folder / "in", folder / "out")


def with_fields(**fields: Any) -> Callable[[Path], object]:
    """Makes a good adapter but for these fields of its config; ... takes one away."""

    def change(members: dict[str, Any]) -> None:
        for name, value in fields.items():
            members.pop(name, None)
            if value is not ...:
                members[name] = value

    return lambda folder: write_sample_adapter(folder / "in", change=change)


def with_text(name: str, text: bytes | None) -> Callable[[Path], object]:
    """Makes a good adapter but for one file, None for none."""

    def make(folder: Path) -> None:
        write_sample_adapter(folder / "in")
        path = folder / "in" / name
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text)

    return make


def sample_arrays() -> Arrays:
    """The tensors of a good adapter by their stored names."""
    rows = adapter_rows(AdapterConfig(**KINDS["all"]), revealing_config())
    return {PREFIX + spec.name: sample_values(spec.name, spec.shape) for row in rows for spec in (row.a, row.b)}


def with_tensors(change: Callable[[Arrays], object]) -> Callable[[Path], object]:
    """Makes a good adapter but for its tensors."""

    def make(folder: Path) -> None:
        write_sample_adapter(folder / "in")
        arrays = sample_arrays()
        change(arrays)
        write_tensors(folder / "in" / WEIGHTS, arrays)

    return make


A, B = (f"{PREFIX}h.1.attn.q_proj.lora_{part}.weight" for part in "AB")


def replaced(name: str, array: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], object]:
    """Puts another array in the place of one."""
    return lambda arrays: arrays.update({name: array(arrays[name])})


def renamed(old: str, new: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({new: arrays.pop(old)})


def added(name: str, *shape: int) -> Callable[[Arrays], object]:
    """Puts one array more beside the others."""
    return lambda arrays: arrays.update({name: np.ones(shape, np.float32)})


def poked(name: str, value: float) -> Callable[[Arrays], object]:
    """Puts one value into an array."""

    def change(arrays: Arrays) -> None:
        arrays[name][0, 0] = value

    return change


def of_another_base(folder: Path, **sizes: Any) -> None:
    write_sample_adapter(folder / "in", config=revealing_config(**sizes))


def with_base(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Makes the base beside the adapter."""

    def both(folder: Path) -> None:
        write_sample(folder / "base", revealing_config())
        make(folder)

    return both


_WRONG_FIELDS: dict[str, list[Any]] = {
    "r": [..., None, 0, -1, 2.5, "8", True, [8]],
    "lora_alpha": [..., None, 0, "16", True, [16], {}],
    "lora_dropout": [-0.1, 1, 1.5, "0.1", None, True],
    "target_modules": [[], [1], 7, {"q_proj": 1}, "", "(", ["q_prj"], ["lm_head"], ["wte"], ".*nothing", [""]],
    "use_rslora": ["true", 1, None],
    "rank_pattern": [[], "q_proj", {"q_proj": 0}, {"q_proj": "4"}, {"(": 4}, {"q_proj": None}],
    "alpha_pattern": [[], {"q_proj": 0}, {"q_proj": "4"}, {"(": 4}],
    "exclude_modules": [7, [1], "(", {"q_proj": 1}],
    "layers_to_transform": [[3], 99, -1, "0", [0.5], [True], {}],
    "layers_pattern": ["layers", ["blocks"], 7],
    "bias": ["all", "lora_only", None, True],
    "peft_type": ["LOHA", "IA3", "ADALORA", "PROMPT_TUNING", None, ..., 7, "lora "],
    "task_type": [7, ["CAUSAL_LM"]],
    "base_model_name_or_path": [7],
    "modules_to_save": [["lm_head"], ["score"], "wte"],
    "use_dora": [True],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "lora_bias": [True],
    "trainable_token_indices": [[1, 2]],
    "target_parameters": [["h.0.attn.q_proj.weight"]],
    "layer_replication": [[[0, 2], [1, 3]]],
    "alora_invocation_tokens": [[1]],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1}],
    "monteclora_config": [{"samples": 2}],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "no such", 7],
    "a_field_of_tomorrow": [True, 1, "on", {"k": 1}],
}
"""Values that a field may not have; ... is none at all."""

_AGES = [
    "(.*)*(.*)*(.*)*!",
    "(h+)+!",
    r"((h|t|r|a|n|s|f|o|m|e|\.|\d|_)+)+!",
    "(.|..)*!",
    "(.|.)+!",
    "(.?){40}!",
    "(.{1,40}){1,40}!",
    "(?=(.+)+!).*",
    "(?:(?:.*)?.*)+!",
    ".*.*.*.*.*.*.*.*.*!",
    ".?" * 30 + "!",
    "a" * 20_000,
]
"""Regular expressions of which most take a matcher that goes back longer than anyone waits."""

_OTHER_BASES: dict[str, dict[str, Any]] = {
    "narrower": {"n_embd": 32},
    "with another inner width": {"n_inner": 96},
    "with more blocks": {"n_layer": 4},
    "with fewer blocks": {"n_layer": 2},
}

_TENSORS: list[tuple[str, Callable[[Arrays], object], str]] = [
    ("a matrix is missing", lambda arrays: arrays.pop(B), "lora_B"),
    ("all matrices are missing", lambda arrays: arrays.clear(), "missing"),
    ("A lies the other way round", replaced(A, lambda a: a.T), "lora_A"),
    ("B lies the other way round", replaced(B, lambda a: a.T), "lora_B"),
    ("A and B are swapped", lambda arrays: arrays.update({A: arrays[B], B: arrays[A]}), "lora_A"),
    ("a rank that is not the config's", replaced(A, lambda a: np.concatenate([a, a])), "lora_A"),
    ("a matrix is flat", replaced(A, lambda a: a.reshape(-1)), "lora_A"),
    ("a matrix has an axis too many", replaced(A, lambda a: a[None]), "lora_A"),
    ("a matrix is empty", replaced(A, lambda a: a[:0]), "lora_A"),
    ("a scalar", replaced(A, lambda a: a[0, 0].reshape(())), "lora_A"),
    ("NaN in A", poked(A, np.nan), "q_proj.lora_A"),
    ("infinity in B", poked(B, np.inf), "q_proj.lora_B"),
    ("minus infinity in B", poked(B, -np.inf), "q_proj.lora_B"),
    ("NaN in bfloat16", replaced(A, lambda a: (a * np.nan).astype(ml_dtypes.bfloat16)), "q_proj.lora_A"),
    ("whole numbers", replaced(A, lambda a: (100 * a).astype(np.int32)), "lora_A"),
    ("bytes, as of a quantized adapter", replaced(A, lambda a: (100 * a).astype(np.int8)), "lora_A"),
    ("a matrix of a block that there is none of", renamed(A, A.replace("h.1.", "h.9.")), "h.9."),
    ("a matrix under the adapter's name", renamed(A, A.replace(".weight", ".default.weight")), "default"),
    ("a magnitude of DoRA's", added(A.replace("A.weight", "magnitude_vector"), 48), "magnitude"),
    ("a bias of B", added(B.replace("weight", "bias"), 48), "lora_B.bias"),
    ("a matrix of the base", added(PREFIX + "h.0.attn.q_proj.weight", 48, 48), "q_proj.weight"),
    ("a saved module", added("base_model.model.lm_head.weight", 9, 9), "lm_head"),
    ("an adapter of the embedding", added(PREFIX + "wte.lora_embedding_A", 9, 9), "wte"),
    ("an adapter of the head", added("base_model.model.lm_head.lora_A.weight", 9, 9), "lm_head"),
    ("mlx_lm's names", renamed(A, "model.layers.1.self_attn.q_proj.lora_a"), "lora_a"),
    ("a name twice, with the prefix and without", added(A.removeprefix("base_model.model."), 3, 48), "lora_A"),
]  # fmt: skip


def _mlx(folder: Path) -> None:
    (folder / "in").mkdir()
    facts = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}
    (folder / "in" / CONFIG).write_text(json.dumps(facts))
    write_tensors(folder / "in" / "adapters.safetensors", {"layers.0.q_proj.lora_a": np.ones((4, 2), np.float32)})


def _mlx_config(folder: Path) -> None:
    _mlx(folder)
    (folder / "in" / "adapters.safetensors").rename(folder / "in" / WEIGHTS)


def _pickled(folder: Path) -> None:
    write_sample_adapter(folder / "in")
    (folder / "in" / WEIGHTS).rename(folder / "in" / "adapter_model.bin")


def _folder(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        write_sample_adapter(folder / "in")
        (folder / "in" / name).unlink()
        (folder / "in" / name).mkdir()

    return make


_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no folder", lambda folder: None, "in"),
    ("an empty folder", lambda folder: (folder / "in").mkdir(), CONFIG),
    ("a file in the folder's place", lambda folder: (folder / "in").write_text("x"), "in"),
    ("a model's folder", lambda folder: write_sample(folder / "in"), CONFIG),
    ("no config", with_text(CONFIG, None), CONFIG),
    ("no weights", with_text(WEIGHTS, None), WEIGHTS),
    ("pickled weights", _pickled, "adapter_model.bin"),
    ("an adapter of mlx_lm's", _mlx, "mlx_lm"),
    ("a config of mlx_lm's", _mlx_config, "fine_tune_type"),
    ("a folder in the config's place", _folder(CONFIG), CONFIG),
    ("a folder in the weights' place", _folder(WEIGHTS), WEIGHTS),
    *((f"the config is {what}", with_text(CONFIG, text), CONFIG) for what, text in (
        ("empty", b""), ("no JSON", b"{"), ("a list", b"[]"), ("a number", b"7"), ("not UTF-8", b'{"r": "\xff"}'),
        ("with a key twice", b'{"r": 8, "r": 4}'), ("with NaN", b'{"lora_alpha": NaN}'), ("null", b"null"),
        ("nested deeply", b"[" * 100_000), ("of a million bytes", b" " * 1_000_001),
        ("with a number too large", b'{"lora_alpha": 1e999}'),
    )),
    *((f"the weights are {what}", with_text(WEIGHTS, text), WEIGHTS) for what, text in (
        ("empty", b""), ("too short", b"\0" * 7), ("text", b"hello, world"), ("a pickle", b"\x80\x02}q\0."),
        ("a header too long", b"\xff" * 8 + b"{}"), ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n"),
    )),
]  # fmt: skip


def _truncated(folder: Path) -> None:
    write_sample_adapter(folder / "in")
    path = folder / "in" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])


def _name_of(field: str, value: Any) -> str:
    return f"{field} is {'missing' if value is ... else json.dumps(value)}"


ODD = [*KINDS["all"]["target_modules"], "gate_proj"]

CASES = [
    *(Malformed(what, make, door, names) for what, make, names in _FILES),
    Malformed("the weights are cut off", _truncated, door, WEIGHTS),
    *(
        Malformed(_name_of(field, value), with_fields(**{field: value}), door, field)
        for field, values in _WRONG_FIELDS.items()
        for value in values
    ),
    *(Malformed(what, with_tensors(change), door, names) for what, change, names in _TENSORS),
    *(
        Malformed(f"of a base {what}", lambda folder, sizes=sizes: of_another_base(folder, **sizes), door, WEIGHTS)
        for what, sizes in _OTHER_BASES.items()
    ),
    *(
        Malformed(f"another {field} than the weights", with_fields(**{field: value}), door, WEIGHTS)
        for field, value in (
            ("r", 4),
            ("target_modules", ["q_proj"]),
            ("rank_pattern", {"fc_in": 7}),
            ("layers_to_transform", [1]),
            ("exclude_modules", ["fc_in"]),
        )
    ),
    *(
        Malformed(f"{field} that takes ages: {age[:40]}", with_fields(**{field: value}), door, field)
        for age in _AGES
        for field, value in (("target_modules", age), ("exclude_modules", age), ("rank_pattern", {age: 3}))
    ),
    *(
        Malformed(f"{field} of 50,000 names", with_fields(**{field: {f"h{n}": 1 for n in range(50_000)}}), door, field)
        for field in ("rank_pattern", "alpha_pattern")
    ),
    *(
        Malformed(f"{field}: {value}", with_fields(**{field: value if one else {"q_proj": value}}), door, field)
        for field, one in (("lora_alpha", True), ("alpha_pattern", False))
        for value in (1e308, -1e308, 1e-320, 1e-30, 10**100)
    ),
    Malformed("one target of several means nothing", with_fields(target_modules=ODD), door, "gate_proj", "said"),
    Malformed("fan_in_fan_out", with_fields(fan_in_fan_out=True), door, "fan_in_fan_out", "said"),
    Malformed("a field of tomorrow that says nothing", with_fields(tomorrow=None), door, "tomorrow", "said"),
    *(
        Malformed(f"merged: {what}", with_base(make), merging, names)
        for what, make, names in (
            ("no adapter", lambda folder: None, "in"),
            ("another rank", with_fields(r=4), WEIGHTS),
            ("NaN", with_tensors(poked(A, np.nan)), "q_proj.lora_A"),
            ("another base", lambda folder: of_another_base(folder, n_embd=32), WEIGHTS),
        )
    ),
]  # fmt: skip
