"""config.json with what trackers, wrappers, other models and other releases leave in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawful import Oddity


def members(**changes: Any) -> Callable[[Path], None]:
    """Changes members of config.json."""

    def make(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def without(*names: str) -> Callable[[Path], None]:
    """Takes members out of config.json."""

    def make(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))

    return make


def renamed(**names: str) -> Callable[[Path], None]:
    """Writes members of config.json under other names."""

    def make(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({names.get(k, k): v for k, v in json.loads(path.read_text()).items()}))

    return make


def marked(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}

ODDITIES = [
    Oddity("a byte order mark before config.json", marked),
    Oddity("no model_type but GPT-J's class", without("model_type")),
    Oddity("a null model_type", members(model_type=None)),
    Oddity("no architectures", without("architectures")),
    Oddity("sizes under their other names", renamed(**ALIASES)),
    Oddity("sizes under both names", members(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)),
    Oddity("nulls where transformers takes them",
           members(use_cache=None, tie_word_embeddings=None, output_attentions=None, return_dict=None,
                   initializer_range=None, pad_token_id=None, problem_type=None, id2label=None, auto_map=None)),
    Oddity("the keys of release 5",
           members(dtype="float32", rope_parameters=None, rope_scaling=None, layer_types=None, pad_token_id=None)),
    Oddity("the keys of release 4.11",
           members(gradient_checkpointing=False, model_max_length=2048, tokenizer_class="GPT2Tokenizer", rotary=True,
                   scale_attn_weights=True, summary_type="cls_index", summary_use_proj=True, jax=True,
                   task_specific_params={"text-generation": {"do_sample": True, "temperature": 1.0}})),
    Oddity("a tracker's keys", members(_wandb={"run": 1}, wandb_version="0.15", mlflow={"a": None}, _flax_model="x")),
    Oddity("generation's settings in config.json",
           members(do_sample=True, temperature=0.9, top_k=40, max_length=50, num_beams=4, early_stopping=True)),
    Oddity("mask_token_id and cls_token_id", members(mask_token_id=5, cls_token_id=6, unk_token_id=7), "mask_token_id"),
    Oddity("a token's text beside its id", members(eos_token="<|endoftext|>", bos_token="<|endoftext|>"), "eos_token"),
    Oddity("a token's text in place of its id", members(eos_token_id="<|endoftext|>"), "eos_token_id"),
    Oddity("pad_token_id -1", members(pad_token_id=-1), "pad_token_id"),
    Oddity("eos_token_id -1 among others", members(eos_token_id=[256, -1]), "eos_token_id"),
    Oddity("an id with a point", members(bos_token_id=256.0), "bos_token_id"),
    Oddity("50256 beside a small vocabulary", members(bos_token_id=50256, eos_token_id=50256, pad_token_id=50256)),
    Oddity("use_cache 1", members(use_cache=1), "use_cache"),
    Oddity("a misspelling beside the field itself", members(n_layers=3, n_heads=4), "n_layers"),
    Oddity("another library's name beside the field itself", members(layer_norm_eps=1e-5), "layer_norm_eps"),
    Oddity("code of its folder", members(auto_map={"AutoModel": "gptj.GPTJModel"}), "auto_map"),
    Oddity("trl's wrapper", members(architectures=["AutoModelForCausalLMWithValueHead"]), "architectures"),
    Oddity("trl's wrapper by GPT-J's name", members(architectures=["GPTJForCausalLMWithValueHead"])),
    Oddity("another model's class", members(architectures=["GPTNeoForCausalLM"]), "architectures"),
    Oddity("a class that is text", members(architectures="GPTJForCausalLM"), "architectures"),
    Oddity("num_labels beside two names", members(num_labels=3, id2label={"0": "a", "1": "b"}), "num_labels"),
    Oddity("labels of ids with gaps", members(num_labels=None, id2label={"0": "a", "5": "b"}, label2id=None),
           "id2label"),
    Oddity("the neutral keys of other models",
           members(quantization_config=None, rope_theta=10000.0, scale_attn_weights=True, is_encoder_decoder=False,
                   rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, pruned_heads={},
                   use_parallel_residual=True, sliding_window=None)),
    *(Oddity(f"{key} of another model", members(**{key: value}), key) for key, value in {
        "quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"},
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        "scale_attn_weights": False,
        "sliding_window": 128,
        "pruned_heads": {"0": [1]},
        "use_parallel_residual": False,
    }.items()),
    Oddity("no label at all", members(id2label={}, label2id={}), "id2label"),
]  # fmt: skip
