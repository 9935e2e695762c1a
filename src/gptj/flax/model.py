"""GPT-J's blocks in Flax, top to bottom.

Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax; rotary position embedding, Su et
al. 2021, arXiv:2104.09864. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward. Parameter names and layouts are the schema's. Precision is written where it matters: rotation,
scores, softmax, layer norms and logits are float32 at least whatever the parameters' dtype, and float32 products
are float32 products on every device.

The modules are pure: values are checked by the model classes around them, on the host. Under a caller's own jit no
value can be seen, and what would have been refused (a token id or a position that there is none of, a cache that is
full) gives NaN, never a wrong number.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gptj.calls.outputs import BaseModelOutputWithPast, KVCache
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.flax.arguments import (
    CacheBuilder,
    UpdateCache,
    cache_length,
    causal_mask,
    choose_flags,
    collect_taps,
    compute,
    convert_arguments,
    key_length,
)
from gptj.flax.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    RotaryTable,
    at_least_float32,
    multiply,
    rotate_pairs,
)
from gptj.flax.weights import Params, PretrainedModel
from gptj.generation.typed import ReturnDict, typed_call


def make_attention_inputs(
    config: GPTJConfig,
    x: Array,
    past_length: Any,
    length: int,
    position_ids: Array | None,
    attention_mask: Array | None,
) -> tuple[Array, tuple[Array, Array], Array]:
    """Slots (t,), rotation and mask of the queries: the same for every block's attention.

    Args:
        x: the embeddings (b, t, m).
        past_length, length: tokens in the cache, and keys that each query is compared with.
    """
    b, t, _ = x.shape
    slots = past_length + jnp.arange(t)
    positions = jnp.broadcast_to(slots[None] if position_ids is None else position_ids, (b, t))
    return slots, RotaryTable(config, x.dtype)(positions), causal_mask(attention_mask, slots, length)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and no biases."""

    config: GPTJConfig
    param_dtype: Any = jnp.float32
    parts: int = 1

    def setup(self) -> None:
        """Declare the four projections and the dropouts."""
        config = self.config
        linear = functools.partial(
            Linear, use_bias=False, deviation=config.initializer_range, param_dtype=self.param_dtype
        )
        self.k_proj = linear(config.n_embd, config.n_embd)
        self.v_proj = linear(config.n_embd, config.n_embd)
        self.q_proj = linear(config.n_embd, config.n_embd)
        self.out_proj = linear(config.n_embd, config.n_embd, parts=self.parts)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        attention_mask: Array,
        update_cache: UpdateCache,
        head_mask: Array | None,
        output_attentions: bool,
        train: bool,
        *,
        taps: TapCollector | None = None,
    ) -> tuple[Array, Array | None]:
        """The attention's contribution (b, t, m), and where `output_attentions` asks, its weights (b, h, t, s).

        `update_cache` takes the new keys and values, and returns those to attend over; `taps` is given what is between.
        """
        q, k, v = (self._heads(project(x, train=train)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if taps is not None:
            taps(q=q, k=k, v=v)
        q, k = rotate_pairs(q, *rotation), rotate_pairs(k, *rotation)
        if taps is not None:
            taps(q_rotated=q, k_rotated=k)
        k, v = update_cache(k, v)
        mixed, weights = self._attend(q, k, v, attention_mask, head_mask, train, taps=taps)
        mixed = mixed.swapaxes(1, 2).reshape(x.shape)
        x = self.out_proj(mixed, train=train)
        x = x if self.parts > 1 else self.resid_dropout(x, deterministic=not train)
        if taps is not None:
            taps(mixed=mixed, out_proj=x)
        return x, weights if output_attentions else None

    def _heads(self, x: Array) -> Array:
        b, t, _ = x.shape
        return x.reshape(b, t, self.config.n_head, self.config.head_dim).swapaxes(1, 2)  # b t m -> b h t d

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array,
        head_mask: Array | None,
        train: bool,
        *,
        taps: TapCollector | None,
    ) -> tuple[Array, Array]:
        scores = multiply(at_least_float32(q), at_least_float32(k), (3, 3), (0, 1)) / math.sqrt(self.config.head_dim)
        if taps is not None:
            taps(scores=scores, visible=jnp.broadcast_to(mask, (len(q), 1, *scores.shape[2:])))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = jnp.where(mask, nn.softmax(scores, axis=-1), 0)  # a row whose mask is all Out attends to nothing
        weights = self.attn_dropout(weights.astype(v.dtype), deterministic=not train)
        if head_mask is not None:
            weights = weights * head_mask.astype(weights.dtype)[:, None, None]
        if taps is not None:
            taps(weights=weights)
        return multiply(weights, v, (3, 2), (0, 1)).astype(v.dtype), weights


class MLP(nn.Module):
    """The feed-forward layer."""

    config: GPTJConfig
    param_dtype: Any = jnp.float32
    parts: int = 1

    def setup(self) -> None:
        """Declare the two layers and the dropout."""
        config = self.config
        linear = functools.partial(Linear, deviation=config.initializer_range, param_dtype=self.param_dtype)
        self.fc_in = linear(config.n_embd, config.inner_width)
        self.fc_out = linear(config.inner_width, config.n_embd, parts=self.parts)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def __call__(self, x: Array, train: bool, taps: TapCollector | None = None) -> Array:
        """The layer's contribution, (b, t, m)."""
        x = self.fc_in(x, train=train)
        if taps is not None:
            taps(fc_in=x)
        # Differs: PyTorch's activations compute 16-bit numbers in float32 by themselves.
        x = ACTIVATIONS[self.config.activation_function](at_least_float32(x)).astype(x.dtype)
        if taps is not None:
            taps(activation=x)
        x = self.fc_out(x, train=train)
        x = x if self.parts > 1 else self.resid_dropout(x, deterministic=not train)
        if taps is not None:
            taps(fc_out=x)
        return x


class Block(nn.Module):
    """Attention and feed-forward side by side: both read the same normed input."""

    config: GPTJConfig
    param_dtype: Any = jnp.float32
    parts: int = 1

    def setup(self) -> None:
        """Declare the norm, the attention and the feed-forward layer."""
        self.ln_1 = LayerNorm(self.config.n_embd, self.config.layer_norm_epsilon, self.param_dtype)
        self.attn = Attention(self.config, self.param_dtype, self.parts)
        self.mlp = MLP(self.config, self.param_dtype, self.parts)

    def __call__(
        self, x: Array, *attention_arguments: Any, taps: TapCollector | None = None
    ) -> tuple[Array, Array | None]:
        """The stream after this block (b, t, m), and the attention weights or None."""
        h = self.ln_1(x)
        if taps is not None:
            taps(ln_1=h)
        attended, weights = self.attn(h, *attention_arguments, taps=taps)
        added, train = attended + self.mlp(h, attention_arguments[-1], taps), attention_arguments[-1]
        if self.parts > 1:  # the devices' parts of both, in one sum of one array
            added = self.mlp.resid_dropout(added.sum(0), deterministic=not train)
        x = added + x
        if taps is not None:
            taps(sum=x)
        return x, weights


class Blocks(nn.Module):
    """The blocks, whose names are their numbers. Differs: a list in a Flax module would name them h_0, h_1 ..."""

    config: GPTJConfig
    param_dtype: Any = jnp.float32
    parts: int = 1

    def setup(self) -> None:
        """Declare as many blocks as the config says."""
        for n in range(self.config.n_layer):
            setattr(self, str(n), Block(self.config, self.param_dtype, self.parts))

    def in_order(self) -> list[Block]:
        """Block 0, block 1 ..."""
        return [getattr(self, str(n)) for n in range(self.config.n_layer)]


class GPTJModule(nn.Module):
    """The bare model as a pure function of its parameters: token ids in, hidden states out.

    Args:
        config: the sizes.
        dtype: what is computed in; None means the embedding's dtype.
        param_dtype: of the parameters that `init` makes. (Those of a `GPTJModel` are made elsewhere.)
        gradient_checkpointing: in training, keep only what enters each block.
        parts: how many devices share each matrix (`tp`).
    """

    config: GPTJConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False
    parts: int = 1

    def setup(self) -> None:
        """Declare the embedding, the blocks and the last norm."""
        config = self.config
        self.wte = Embedding(config.vocab_size, config.n_embd, config.initializer_range, self.dtype, self.param_dtype)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = Blocks(config, self.param_dtype, self.parts)
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, self.param_dtype)

    def __call__(
        self,
        input_ids: Array | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        train: bool = False,
        taps: TapCollector | None = None,
    ) -> BaseModelOutputWithPast:
        """The hidden states of every token; see `GPTJModel.__call__`. With train, dropout needs an rng "dropout".

        `taps` is given what is between.
        """
        config, past = self.config, past_key_values
        recompute = self.gradient_checkpointing and train and past is None
        use_cache = (use_cache and not recompute) or past is not None  # a cache that was handed in comes back

        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds.astype(self.wte.computation_dtype)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = self.drop(x, deterministic=not train)
        if taps is not None:
            taps(embedding=x)

        t, past_length = x.shape[1], cache_length(past)
        length = key_length(past, past_length, t)
        slots, rotation, mask = make_attention_inputs(config, x, past_length, length, position_ids, attention_mask)
        if head_mask is not None:
            head_mask = jnp.broadcast_to(head_mask, (config.n_layer, config.n_head))

        cache = CacheBuilder(past, slots)
        hidden, attentions = [x], []
        for n, block in enumerate(self.h.in_order()):
            factors = None if head_mask is None else head_mask[n]
            arguments = (rotation, mask, cache.update_of(n, use_cache), factors, output_attentions, train)
            forward = functools.partial(_apply, arguments=arguments, taps=None if taps is None else taps.in_block(n))
            x, weights = (nn.remat(forward) if recompute else forward)(block, x)
            hidden.append(x)
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


def _apply(
    block: Block, x: Array, *, arguments: tuple[Any, ...], taps: TapCollector | None
) -> tuple[Array, Array | None]:
    return block(x, *arguments, taps=taps)


class GPTJModel(PretrainedModel):
    """The bare model: token ids in, hidden states out.

    Args:
        config, input_shape, seed, dtype, _do_init, param_dtype: see `PretrainedModel`.
    """

    head = "base"
    module_class = GPTJModule

    @typed_call
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        *,
        token_type_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast[Array] | tuple[Any, ...]:
        """The hidden states of every token.

        Differs: parameters, random numbers and training are arguments, since a Flax model has no state, and the order
        is that of transformers' page. A cache that is handed in always comes back, filled. Compiled once for each
        shape. Inside a caller's jit only shapes and dtypes are checked (see the module's own docstring).

        Args:
            input_ids: (b, t) token ids, or None where inputs_embeds is given.
            past_key_values: a `KVCache` from an earlier call or from `init_cache`.
            attention_mask: (b, cached + t) of 0 and 1; 1 In, 0 Out (padding). None: all In.
            token_type_ids: (b, t) ids whose wte embeddings are added.
            position_ids: (b, t) or (1, t). None: counted on from the cache's length.
            head_mask: (h,) or (n_layer, h) factors of each head's weights.
            inputs_embeds: (b, t, m) in place of input_ids.
            use_cache, output_attentions, output_hidden_states, return_dict: None means the config's.
            params: in place of the model's own.
            dropout_rng: a jax random key; needed where train is True and the config has dropout.
            train: whether dropout and gradient checkpointing are on.

        Raises:
            InputError: see `gptj.calls.inputs.check_call`.
        """
        arguments = convert_arguments(
            self.config,
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
        )
        flags = choose_flags(self.config, use_cache, output_attentions, output_hidden_states, train)
        return compute(self, arguments, flags, return_dict=return_dict, params=params, dropout_rng=dropout_rng)

    def _rotation_of(self, position_ids: Any) -> tuple[Array, Array]:
        return RotaryTable(self.config, self.dtype)(jnp.asarray(position_ids))

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> None:
        params = given["params"]
        given = {name: value for name, value in given.items() if name != "params"}
        collect_taps(self, collector, convert_arguments(self.config, **given), None, params)


PretrainedModel.base_class = GPTJModel
