"""GPT-J's blocks in TensorFlow, top to bottom.

Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax; rotary position embedding, Su et
al. 2021, arXiv:2104.09864. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward. Parameter names and layouts are the schema's. Precision is written where it matters: rotation,
scores, softmax, layer norms and logits are float32 at least whatever the parameters' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gptj.calls import inputs
from gptj.calls.outputs import BaseModelOutputWithPast, KVCache, object_or_tuple
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.generation.typed import ReturnDict, same_as, typed_call
from gptj.tf.arguments import (
    CacheBuilder,
    UpdateCache,
    assert_claims,
    cache_length,
    causal_mask,
    fill_with_nan,
    key_length,
    list_claims,
    sizes,
)
from gptj.tf.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    RotaryTable,
    at_least_float32,
    dropout,
    rotate_pairs,
)
from gptj.tf.weights import PretrainedModel


class Attention(keras.layers.Layer):
    """Causal multi-head attention with rotary positions and no biases."""

    def __init__(self, config: GPTJConfig, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.k_proj = Linear(name="k_proj", dtype=dtype)
        self.v_proj = Linear(name="v_proj", dtype=dtype)
        self.q_proj = Linear(name="q_proj", dtype=dtype)
        self.out_proj = Linear(name="out_proj", dtype=dtype)
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.built = True

    def call(
        self,
        x: tf.Tensor,
        rotation: tuple[tf.Tensor, tf.Tensor],
        attention_mask: tf.Tensor,
        update_cache: UpdateCache,
        head_mask: tf.Tensor | None,
        seeds: tf.Tensor | None,
        *,
        taps: TapCollector | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The attention's contribution (b, t, m), and its weights (b, h, t, s).

        `attention_mask` is `causal_mask`'s (`mask` would be Keras' own); `update_cache` takes new keys and values, and
        returns those to attend over; `seeds` (2, 2) are of both dropouts, None where nothing is dropped; `taps` is
        given what is between.
        """
        first, last = (None, None) if seeds is None else (seeds[0], seeds[1])
        q, k, v = (self._heads(project(x, seed=first)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if taps is not None:
            taps(q=q, k=k, v=v)
        q, k = rotate_pairs(q, *rotation), rotate_pairs(k, *rotation)
        if taps is not None:
            taps(q_rotated=q, k_rotated=k)
        k, v = update_cache(k, v)
        mixed, weights = self._attend(q, k, v, attention_mask, head_mask, first, taps)
        mixed = tf.reshape(tf.transpose(mixed, (0, 2, 1, 3)), sizes(x))
        x = dropout(self.out_proj(mixed, seed=last), self.resid_pdrop, last)
        if taps is not None:
            taps(mixed=mixed, out_proj=x)
        return x, weights

    def _heads(self, x: tf.Tensor) -> tf.Tensor:
        b, t, _ = sizes(x)
        return tf.transpose(tf.reshape(x, (b, t, self.n_head, self.head_dim)), (0, 2, 1, 3))  # b t m -> b h t d

    def _attend(
        self,
        q: tf.Tensor,
        k: tf.Tensor,
        v: tf.Tensor,
        mask: tf.Tensor,
        head_mask: tf.Tensor | None,
        seed: tf.Tensor | None,
        taps: TapCollector | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        b, h, t, d = sizes(q)
        *rows, s, _ = sizes(k)  # (b, h), or (b * h,) in the compiled steps
        q = at_least_float32(tf.reshape(q, (*rows, t, d)))
        scores = tf.matmul(q, at_least_float32(k), transpose_b=True) / math.sqrt(self.head_dim)
        scores = tf.reshape(scores, (b, h, t, s))
        if taps is not None:
            taps(scores=scores, visible=tf.broadcast_to(mask, (b, 1, t, s)))
        scores = tf.where(mask, scores, scores.dtype.min)
        weights = tf.where(mask, tf.nn.softmax(scores), 0)  # a row whose mask is all Out attends to nothing
        weights = dropout(tf.cast(weights, v.dtype), self.attn_pdrop, seed)
        if head_mask is not None:
            weights *= tf.reshape(tf.cast(head_mask, weights.dtype), (-1, 1, 1))
        if taps is not None:
            taps(weights=weights)
        mixed = tf.matmul(tf.reshape(weights, (*rows, t, s)), v)
        return tf.reshape(mixed, (b, h, t, d)), weights


class MLP(keras.layers.Layer):
    """The feed-forward layer."""

    def __init__(self, config: GPTJConfig, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.fc_in = Linear(name="fc_in", dtype=dtype)
        self.fc_out = Linear(name="fc_out", dtype=dtype)
        self.activation = ACTIVATIONS[config.activation_function]
        self.resid_pdrop = config.resid_pdrop
        self.built = True

    def call(self, x: tf.Tensor, seed: tf.Tensor | None, taps: TapCollector | None = None) -> tf.Tensor:
        """The layer's contribution, (b, t, m)."""
        x = self.fc_in(x, seed=seed)
        if taps is not None:
            taps(fc_in=x)
        # Differs: PyTorch's fused activations compute in float32 and round once; written out, that takes two casts.
        x = tf.cast(self.activation(at_least_float32(x)), x.dtype)
        if taps is not None:
            taps(activation=x)
        x = dropout(self.fc_out(x, seed=seed), self.resid_pdrop, seed)
        if taps is not None:
            taps(fc_out=x)
        return x


class Block(keras.layers.Layer):
    """Attention and feed-forward side by side: both read the same normed input."""

    def __init__(self, config: GPTJConfig, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.ln_1 = LayerNorm(config.layer_norm_epsilon, name="ln_1", dtype=dtype)
        self.attn = Attention(config, name="attn", dtype=dtype)
        self.mlp = MLP(config, name="mlp", dtype=dtype)
        self.built = True

    def call(
        self,
        x: tf.Tensor,
        rotation: tuple[tf.Tensor, tf.Tensor],
        attention_mask: tf.Tensor,
        update_cache: UpdateCache,
        head_mask: tf.Tensor | None,
        seeds: tf.Tensor | None,
        taps: TapCollector | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The stream after this block (b, t, m), and the attention weights. `seeds` (3, 2) are of its dropouts."""
        h = self.ln_1(x)
        if taps is not None:
            taps(ln_1=h)
        attended, weights = self.attn(
            h,
            rotation=rotation,
            attention_mask=attention_mask,
            update_cache=update_cache,
            head_mask=head_mask,
            seeds=None if seeds is None else seeds[:2],
            taps=taps,
        )
        x = attended + self.mlp(h, seed=None if seeds is None else seeds[2], taps=taps) + x
        if taps is not None:
            taps(sum=x)
        return x, weights


@keras.saving.register_keras_serializable("gptj")
class GPTJModel(PretrainedModel):
    """The bare model: token ids in, hidden states out.

    Args:
        config: the sizes.
        dtype: of the parameters: float32, float64, bfloat16 or float16, as a name or the framework's own; or a Keras
            policy, mixed_bfloat16 or mixed_float16.
        param_dtype: what the parameters are kept in: the same, or the policy's.
        seed: of the start values, which are the same in all three backends, and of dropout.
        name: Keras' name of the model.
        _do_init: False leaves the model without parameters, for `from_pretrained` to fill.
    """

    head = "base"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        name: str | None = None,
        _do_init: bool = True,
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, seed=seed, name=name)
        policy = self.dtype_policy
        self.wte = Embedding(name="wte", dtype=policy)
        self.h = [Block(config, name=str(n), dtype=policy) for n in range(config.n_layer)]
        self.ln_f = LayerNorm(config.layer_norm_epsilon, name="ln_f", dtype=policy)
        self.rotary = RotaryTable(config, self.compute_dtype)
        self.gradient_checkpointing = False
        drops = config.embd_pdrop or config.attn_pdrop or config.resid_pdrop
        self.seed_generator = keras.random.SeedGenerator(seed) if drops else None
        if _do_init:
            self.initialise(dtype=self.dtype_policy, seed=seed)

    @typed_call
    def call(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        training: bool | None = False,
    ) -> BaseModelOutputWithPast[tf.Tensor] | tuple[Any, ...]:
        """The hidden states of every token.

        Args:
            input_ids: (b, t) token ids, or None where inputs_embeds is given; or a list or tuple of the arguments in
                this order, or a dict of them by name.
            past_key_values: a `KVCache` from an earlier call or from `init_cache`.
            attention_mask: (b, cached + t) of 0 and 1; 1 In, 0 Out (padding). None: all In.
            token_type_ids: (b, t) ids whose wte embeddings are added.
            position_ids: (b, t) or (1, t). None: counted on from the cache's length.
            head_mask: (h,) or (n_layer, h) factors of each head's weights.
            inputs_embeds: (b, t, m) in place of input_ids.
            use_cache, output_attentions, output_hidden_states, return_dict: None means the config's.
            training: whether to drop.

        Raises:
            InputError: see `gptj.calls.inputs.check_call`.
        """
        given = {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
        }
        flags = inputs.output_flags(self.config, use_cache, output_attentions, output_hidden_states)
        output = self._run(**given, flags=flags, training=training)
        return object_or_tuple(output, return_dict, default=self.config.return_dict)

    if TYPE_CHECKING:

        @same_as(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `call`."""

    def _run(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        *,
        flags: tuple[bool, bool, bool] = (False, False, False),
        training: bool | None = False,
        taps: TapCollector | None = None,
    ) -> BaseModelOutputWithPast[tf.Tensor]:
        """The outputs of a call whose arguments are checked; `taps` is given what is between."""
        config = self.config
        use_cache, output_attentions, output_hidden_states = flags
        recompute = bool(self.gradient_checkpointing and training)
        use_cache = use_cache and not recompute
        seeds = self._seeds(training)

        past, t = past_key_values, sizes(input_ids if inputs_embeds is None else inputs_embeds)[1]
        past_length = cache_length(past)
        claimed = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        # The host has checked a cut model's arguments, and a claim about rows on several devices would join them.
        cut = self.placement is not None
        claims = [] if cut else list_claims(config, t, **claimed, attention_mask=attention_mask, past=past)
        slots = past_length + tf.range(t)
        with tf.control_dependencies(assert_claims(claims)):
            x = self.wte(input_ids) if inputs_embeds is None else tf.cast(inputs_embeds, self.compute_dtype)
            if token_type_ids is not None:
                x += self.wte(token_type_ids)
            rotation = self.rotary(tf.expand_dims(slots, 0) if position_ids is None else position_ids)
        x = dropout(fill_with_nan(x, claims), config.embd_pdrop, None if seeds is None else seeds[0])
        if taps is not None:
            taps(embedding=x)

        mask = causal_mask(attention_mask, slots, key_length(past, past_length, t))
        factors = None if head_mask is None else tf.broadcast_to(head_mask, (config.n_layer, config.n_head))

        cache = CacheBuilder(past)
        hidden, attentions = [x], []
        for n, block in enumerate(self.h):
            run = recompute_for_gradient(block) if recompute else block
            x, weights = run(
                x,
                rotation=rotation,
                attention_mask=mask,
                update_cache=cache.update_of(n, use_cache),
                head_mask=None if factors is None else factors[n],
                seeds=None if seeds is None else seeds[1 + 3 * n : 4 + 3 * n],
                taps=None if taps is None else taps.in_block(n),
            )
            if output_hidden_states:
                hidden.append(x)
            if output_attentions:
                attentions.append(weights)
        x = hidden[-1] = self.ln_f(x)
        if taps is not None:
            taps(ln_f=x)

        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache.build(past_length + t) if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _rotation_of(self, position_ids: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self.rotary(tf.convert_to_tensor(position_ids))

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> tf.Tensor:
        """The hidden states (b, t, m); a hook."""
        settled = self._convert_arguments((), given)
        self._check(settled)
        return self._run(**settled, taps=collector).last_hidden_state

    def _seeds(self, training: bool | None) -> tf.Tensor | None:
        """A seed for each place that drops (1 + 3 * n_layer, 2): the embedding, then each block's three; or None."""
        if not training or self.seed_generator is None:
            return None
        return tf.random.split(self.seed_generator.next(), 1 + 3 * self.config.n_layer)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of fixed capacity: n_layer pairs of (b, h, max_length, d).

        Raises:
            InputError: max_length is more than n_positions, or a size is below 1.
        """
        inputs.check_cache_size(self.config, batch_size, max_length)
        shape = (batch_size, self.config.n_head, max_length, self.config.head_dim)
        keys, values = (tuple(tf.zeros(shape, self.compute_dtype) for _ in self.h) for _ in range(2))
        return KVCache(keys, values, 0, fixed=True)


def recompute_for_gradient(block: Block) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """`block` such that its gradient computes it again in place of keeping what is inside."""

    def run(x: tf.Tensor, **arguments: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.recompute_grad(lambda x: block(x, **arguments))(x)

    return run
