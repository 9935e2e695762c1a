"""A TensorFlow model as a SavedModel that steps over a cache, which runs without this library.

Differs: a SavedModel is TensorFlow's; torch.export and ONNX are PyTorch's (`pt/export.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from gptj.calls.outputs import KVCache

__all__ = ["cache_names", "write_saved_model"]


def cache_names(n_layer: int, of: str) -> list[str]:
    """The names of a cache's arrays: `past_key_values_0_key`, `past_key_values_0_value`, and so on."""
    return [f"{of}_{n}_{kind}" for n in range(n_layer) for kind in ("key", "value")]


def write_saved_model(model: Any, folder: Path) -> None:
    """Write a SavedModel with two endpoints into the folder: `serve`, and `step` over a cache.

    `serve` takes input_ids and attention_mask and gives the logits. `step` takes input_ids (b, t), attention_mask
    (b, past + t), position_ids (b, t) and the cache's arrays (b, h, past, d), and gives the logits (b, t, v) and the
    cache with the new tokens in it; all sizes may be any, past may be 0.

    Args:
        model: a GPTJForCausalLM that is not prepared for inference.
        folder: where to.
    """
    config = model.config
    ids = {name: tf.TensorSpec((None, None), tf.int64, name=name) for name in ("input_ids", "attention_mask")}
    past = cache_names(config.n_layer, "past_key_values")
    slots = (None, config.n_head, None, config.head_dim)
    arrays = {name: tf.TensorSpec(slots, model.compute_dtype, name=name) for name in past}
    positions = {"position_ids": tf.TensorSpec((None, None), tf.int64, name="position_ids")}

    def serve(given: dict[str, Any]) -> dict[str, tf.Tensor]:
        return {"logits": model(**given, use_cache=False, return_dict=True, training=False).logits}

    def step(given: dict[str, Any]) -> dict[str, tf.Tensor]:
        held = [given[name] for name in past]
        outputs = model(
            given["input_ids"],
            KVCache(tuple(held[::2]), tuple(held[1::2]), tf.shape(held[0])[2]),
            given["attention_mask"],
            position_ids=given["position_ids"],
            use_cache=True,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
            training=False,
        )
        kept = outputs.past_key_values
        pairs = (x for pair in zip(kept.keys, kept.values, strict=True) for x in pair)
        return {"logits": outputs.logits, **dict(zip(cache_names(config.n_layer, "present"), pairs, strict=True))}

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, [ids])
    archive.add_endpoint("step", step, [{**ids, **positions, **arrays}])
    archive.write_out(os.fspath(folder), verbose=False)
