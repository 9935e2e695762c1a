"""config.json whose fields are of another kind, contradict each other, are misspelt, or are another model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_samples import write_sample
from gptj_conversion.convert import convert

from gptj.checkpoint import open_checkpoint
from gptj.config import GPTJConfig
from malformed import Malformed

TITLE = "fields of config.json"


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Makes a model whose config.json was changed."""

    def make(folder: Path) -> None:
        write_sample(folder / "in")
        members = json.loads((folder / "in" / "config.json").read_text())
        change(members)
        (folder / "in" / "config.json").write_text(json.dumps(members))

    return make


def opened(folder: Path) -> object:
    return open_checkpoint(folder / "in")


def converted(folder: Path) -> object:
    return convert(folder / "in", folder / "out", fingerprint=False)


def read(folder: Path) -> object:
    return GPTJConfig.from_file(folder / "in")


def setting(field: str, value: Any) -> Callable[[Path], None]:
    return spoilt(lambda members: members.update({field: value}))


def misspelling(field: str, key: str) -> Callable[[Path], None]:
    return spoilt(lambda members: members.update({key: members.pop(field)}))


SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
OF_ANOTHER_KIND: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SIZES, (None, "12", 12.0, True, [12], {"a": 1}, -3)),
    "rotary_dim": ("4", 4.0, [4], -2, 3),
    "n_inner": ("4", 4.5, 0, -8, [8]),
    "activation_function": (None, 3, "geluu", ["gelu"], {"name": "gelu"}),
    "layer_norm_epsilon": (None, "1e-5", [1e-5], True, -1e-5, 0),
    "initializer_range": ("0.02", -0.02, [0.02]),
    "attn_pdrop": (None, "0", 1, 1.5, -0.1, [0.1]),
    "tie_word_embeddings": ("false", 1, 0, [False]),
    "use_cache": ("true", 2, []),
    "bos_token_id": ([1, 2], {"a": 1}, 0.5, True),
    "eos_token_id": ({"a": 1}, [[1]], 0.5, [1, 0.5], True),
    "pad_token_id": ([1, 2], {}, 0.5),
    "problem_type": ("text-generation", 3, ["regression"]),
    "id2label": ([], "x", {"a": "b"}),
    "label2id": ([1], {"a": "b"}, {"a": 0.5}),
    "num_labels": (0, -1, "3", 2.5, True),
}

MISSPELT = {
    "n_layer": ("n_layers", "n_lyaer", "nlayer", "n_Layer", "num_hidden_layer"),
    "n_embd": ("n_embed", "n_emdb", "hiden_size"),
    "n_head": ("n_heads", "n_haed", "num_attention_head"),
    "n_positions": ("n_position", "max_position_embedding"),
    "vocab_size": ("vocabsize", "vocab_sise", "vocab_sizes"),
    "rotary_dim": ("rotary_dims", "rotary-dim", "rotarydim"),
    "n_inner": ("n_iner", "ninner"),
    "activation_function": ("activation_fn", "activation_functions"),
    "layer_norm_epsilon": ("layer_norm_eps", "layernorm_epsilon"),
}

OF_OTHERS: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    ("another model_type", {"model_type": "llama"}, (), "model_type"),
    ("a model_type that is a number", {"model_type": 1}, (), "model_type"),
    ("a model_type that is a list", {"model_type": ["gptj"]}, (), "model_type"),
    ("another model's classes and no model_type", {"architectures": ["LlamaForCausalLM"]}, ("model_type",), "architec"),
    ("classes that are text and no model_type", {"architectures": "GPTJModel"}, ("model_type",), "architectures"),
    ("classes that are numbers and no model_type", {"architectures": [1]}, ("model_type",), "architectures"),
    ("code of the folder and no model_type", {"auto_map": {"AutoModel": "x.py"}}, ("model_type",), "auto_map"),
    ("n_embd contradicts hidden_size", {"hidden_size": 13}, (), "hidden_size"),
    ("n_layer contradicts num_hidden_layers", {"num_hidden_layers": 5}, (), "num_hidden_layers"),
    ("n_head contradicts num_attention_heads", {"num_attention_heads": "4"}, (), "num_attention_heads"),
    ("n_positions contradicts its alias", {"max_position_embeddings": 0}, (), "max_position_embeddings"),
    ("heads that do not divide the width", {"n_head": 5}, (), "n_embd"),
]


def without(changes: dict[str, Any], lacking: tuple[str, ...]) -> Callable[[Path], None]:
    return spoilt(lambda members: (members.update(changes), [members.pop(key) for key in lacking]))


_DOORS = (read, opened, converted)

CASES = [
    *(
        Malformed(f"{field} is {json.dumps(value)}", setting(field, value), _DOORS[number % 3], field)
        for field, values in OF_ANOTHER_KIND.items()
        for number, value in enumerate(values)
    ),
    *(
        Malformed(f"{field} is spelt {key}", misspelling(field, key), _DOORS[number % 3], key)
        for field, keys in MISSPELT.items()
        for number, key in enumerate(keys)
    ),
    *(
        Malformed(what, without(changes, lacking), _DOORS[number % 3], names)
        for number, (what, changes, lacking, names) in enumerate(OF_OTHERS)
    ),
]
