"""The fast path of decoding in TensorFlow: the compiled programs of `gptj.tf.generate` under every call.

A decoded token reads every weight once, so its time is that of reading memory. The programs read the parameters where
the file was mapped; another layout would have to be copied first, and was not faster: GPT-J's four matrices into a
block and two out of it, stacked to one and one, took the same time a token. So a prepared model keeps its parameters.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import tensorflow as tf

from gptj.calls.outputs import CausalLMOutputWithPast, KVCache
from gptj.calls.prepared import check_quantize, give_up
from gptj.config import GPTJConfig
from gptj.tf.weights import to_numpy


class InferenceMixin:
    """Faster decoding, a base class of the models with a language-model head."""

    def prepare_for_inference(self, *, quantize: str | None = None) -> Self:
        """The model itself, such that `model(...)`, `generate` and `stream` run compiled programs from then on.

        The parameters stay where and what they are. Those of 16 bits are multiplied in float32 where there is no GPU:
        then nothing is rounded but they. Training, saving and resizing are over, and say so.

        Args:
            quantize: None; a token by 8-bit weights takes XLA 1.8 times as long as by float32 ones on a CPU (measured).

        Raises:
            InputError: another `quantize`, or a model prepared already.
        """
        # Differs: nothing is packed anew and no other precision is had; the programs read what the file's map holds.
        model: Any = self
        model._refuse_prepared("prepare_for_inference")
        model._refuse_cut("prepare_for_inference")
        check_quantize(quantize, ())
        model._require_values("prepare_for_inference")
        for part in (model, model.transformer):
            part.trainable = False
            part._is_prepared = True
            give_up(part, {act: act for act in _GIVEN_UP})
        return self

    def _compute_prepared(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None,
        position_ids: tf.Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> CausalLMOutputWithPast:
        """A call without a past, in the programs under `generate`; the arguments are those of `GPTJModel.call`."""
        model: Any = self
        config: GPTJConfig = model.config
        b, t = input_ids.shape
        positions = np.arange(t)[None] if position_ids is None else to_numpy(position_ids)
        mask = np.ones((b, t), bool) if attention_mask is None else to_numpy(attention_mask).astype(bool)
        asked = {
            "attentions": config.output_attentions if output_attentions is None else output_attentions,
            "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        }
        decoder = model._decoder(b, t)
        logits, hidden, weights = decoder.compute(
            to_numpy(input_ids),
            np.broadcast_to(positions, (b, t)),
            mask,
            0,
            last_only=False,
            want=frozenset(name for name, wanted in asked.items() if wanted),
        )
        past = None
        if config.use_cache if use_cache is None else use_cache:
            shape = b, config.n_head, -1, config.head_dim
            keys, values = (
                tuple(tf.reshape(slots, shape)[:, :, :t] for slots in side) for side in (decoder.keys, decoder.values)
            )
            past = KVCache(keys, values, t)
        return CausalLMOutputWithPast(
            logits=logits[:, :t],
            past_key_values=past,
            hidden_states=None if hidden is None else tuple(x[:, :t] for x in hidden),
            attentions=None if weights is None else tuple(x[:, :, :t, :t] for x in weights),
        )


_GIVEN_UP = ("fit", "load_weights", "save", "save_weights", "set_weights", "train_on_batch")
"""Methods of Keras' own that a prepared model has no longer."""
