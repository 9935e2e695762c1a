"""The fast path of decoding: the weights as they lie in the file, products in the order that reads them fastest.

A decoded token reads every weight once, so its time is that of reading memory. XLA reads the file's own layout, output
axis first, at memory's pace for one row. For a few rows it first packs a copy of the weights at every call, unless
the product is written weights first and its result is made to lie that way; then it packs only the rows (measured on a
CPU for 8 rows: 1.9 times as fast). So nothing is fused, transposed or held twice: a mapped file stays where it is.

Each block is a call of one compiled function, which Python steps through. So what is compiled for a new shape is one
block and not n_layer of them, and that is what the first token waits for. A call of a tiny block takes 70
microseconds in all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from gptj.calls.outputs import CausalLMOutputWithPast, KVCache
from gptj.calls.prepared import check_quantize
from gptj.config import GPTJConfig
from gptj.flax.adapters import LowRank
from gptj.flax.arguments import CacheBuilder, UpdateCache, cache_length
from gptj.flax.layers import Embedding, LayerNorm, Linear, multiply
from gptj.flax.model import Attention, Block, make_attention_inputs
from gptj.flax.weights import Params, flat, nested
from gptj.generation.decoder import built_alike

FEW_ROWS = range(2, 65)
"""The numbers of rows for which the product is written weights first: as many as it was measured to be faster for."""

NARROW_ROWS = range(1, 65)
"""The numbers of rows in float32 that are multiplied by bfloat16 as it lies: as many as casting it takes longer for."""


def computed_in(dtype: np.dtype[Any], devices: Iterable[jax.Device]) -> np.dtype[Any]:
    """The dtype of the steps of a model that computes in `dtype` on these devices: on CPUs float32 at least.

    Differs: XLA on a CPU multiplies 16-bit numbers far slower, so what is computed there is not rounded to them.
    """
    widens = dtype.itemsize < 4 and all(device.platform == "cpu" for device in devices)
    return np.dtype(np.float32) if widens else dtype


@jax.custom_jvp
def multiply_narrow(rows: Array, weight: Array) -> Array:
    """Float32 rows (n, i) by weights (o, i) in bfloat16, which are read as they are: (n, o) in float32.

    A number in float32 is the sum of three in bfloat16, and the products of those with the weights are exact in what
    sums them. Cast, the weights would be written and read once more for every token: that takes ten times as long for
    one row, and six times for eight (measured on a CPU with products of bfloat16).
    """
    pieces, rest = [], rows
    for _ in range(3):
        pieces.append(rest.astype(weight.dtype))
        rest -= pieces[-1].astype(rows.dtype)
    first, *smaller = jnp.split(multiply(jnp.concatenate(pieces), weight, (1, 1)), 3)
    return first + (smaller[0] + smaller[1])


multiply_narrow.defjvps(lambda tangent, _, rows, weight: multiply(tangent, weight.astype(rows.dtype), (1, 1)), None)


def few_rows(call: Callable[..., Array], arguments: Any, keywords: Any, context: Any) -> Array:
    """`Linear.__call__` for a few rows: (W x')' in place of x W', or weights of 16 bits as they are; the same sums."""
    linear = context.module
    if not isinstance(linear, Linear) or linear.parts > 1:
        return call(*arguments, **keywords)
    x, tied = (*arguments, None)[:2]
    weight = linear.get_variable("params", "weight") if tied is None else tied
    rows = x.reshape(-1, x.shape[-1])
    is_narrow = (x.dtype, weight.dtype) == (jnp.float32, jnp.bfloat16)
    if len(rows) not in (NARROW_ROWS if is_narrow else FEW_ROWS):
        return call(*arguments, **keywords)
    if is_narrow:
        y = multiply_narrow(rows, weight)
    else:
        # The barrier is what makes the product lie as it is written: XLA would swap it to save the small transpose.
        y = lax.optimization_barrier(multiply(weight.astype(x.dtype), rows, (1, 1))).T
    y = y.reshape(*x.shape[:-1], -1)
    if linear.use_bias:
        y += linear.get_variable("params", "bias").astype(y.dtype)
    return LowRank(linear)(x, y.astype(x.dtype))


def batch_in_heads(call: Callable[..., Any], arguments: Any, keywords: Any, context: Any) -> Any:
    """`Attention._attend` over keys and values (1, b h, s, d): its other arguments are brought into that shape too."""
    if not isinstance(context.module, Attention) or context.method_name != "_attend":
        return call(*arguments, **keywords)
    q, k, v, mask, factors, train = arguments
    b, h, t, d = q.shape
    mask = jnp.broadcast_to(mask, (b, h, *mask.shape[2:])).reshape(1, b * h, *mask.shape[2:])
    factors = factors if factors is None else jnp.tile(factors, b)
    mixed, weights = call(q.reshape(1, b * h, t, d), k, v, mask, factors, train, **keywords)
    return mixed.reshape(b, h, t, d), weights.reshape(b, h, t, -1)


class Slots:
    """`CacheBuilder` over one layer of a decoder's own cache: keys and values (b h, s, d), where new ones always fit.

    Differs: batch and heads are one axis. As two, which XLA's products merge, it would write them twice, once for the
    product and once for the next call, each time into a copy of the whole (seen in the compiled step).

    Args:
        past: the layer's cache.
        start: the first new token's slot.
        prompt_only: nothing is in the cache yet, so that the new tokens attend over each other only.
    """

    def __init__(self, past: KVCache, start: Array, prompt_only: bool) -> None:
        self.past, self.start, self.prompt_only = past, start, prompt_only

    def update_of(self, layer: int, use_cache: bool) -> UpdateCache:
        """The function that the layer's attention calls; the result is part of the next cache."""

        def update_cache(k: Array, v: Array) -> tuple[Array, Array]:
            b, h, t, d = k.shape
            written = [
                lax.dynamic_update_slice_in_dim(old, new.reshape(b * h, t, d), self.start, axis=1)
                for old, new in ((self.past.keys[layer], k), (self.past.values[layer], v))
            ]
            self.keys, self.values = ((x,) for x in written)
            return (k, v) if self.prompt_only else (written[0][None], written[1][None])

        return update_cache

    def build(self, length: Any) -> KVCache:
        """The cache after this call, `length` tokens long."""
        return KVCache(self.keys, self.values, length, fixed=True)


@functools.lru_cache(maxsize=64)
def compiled_entrance(config: GPTJConfig, length: int, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """The way from token ids to what the blocks take: the embeddings, and slots, rotation and mask of the queries.

    Args:
        config: the sizes.
        length: keys that each query is compared with, of which its mask may keep some.
        dtype: what is computed in.
    """

    def run(
        weight: Array,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        token_type_ids: Array | None,
        position_ids: Array | None,
        mask: Array | None,
        past_length: Array,
    ) -> Any:
        embedding = Embedding(config.vocab_size, config.n_embd, dtype=dtype)
        embed = functools.partial(embedding.apply, {"params": {"weight": weight}})
        x = embed(input_ids) if inputs_embeds is None else inputs_embeds.astype(dtype)
        if token_type_ids is not None:
            x = x + embed(token_type_ids)
        mask = mask if mask is None else mask[:, :length]
        return x, make_attention_inputs(config, x, past_length, length, position_ids, mask)

    return jax.jit(run)


@functools.lru_cache(maxsize=64)
def compiled_block(
    config: GPTJConfig, decoder_cache: bool, prompt_only: bool, use_cache: bool, output_attentions: bool, parts: int
) -> Callable[..., Any]:
    """One block, compiled once for each shape and used for all of them.

    Args:
        config: the sizes.
        decoder_cache: the cache is a decoder's own (see `Slots`), which is used up and written in place.
        prompt_only: the new tokens are the first in it, so that they attend over each other only.
        use_cache: the cache after this call is asked for.
        output_attentions: the attention weights are asked for.
        parts: how many devices share each matrix.
    """

    def run(
        params: Params, added: Params, past: Any, x: Array, attention_inputs: Any, head_mask: Array | None
    ) -> tuple[Array, KVCache | None, Array | None]:
        slots, rotation, mask = attention_inputs
        cache = Slots(past, slots[0], prompt_only) if decoder_cache else CacheBuilder(past, slots)
        arguments = (x, rotation, mask, cache.update_of(0, use_cache), head_mask, output_attentions, False)
        with contextlib.ExitStack() as rules:
            rules.enter_context(nn.intercept_methods(few_rows))
            if decoder_cache and not prompt_only:
                rules.enter_context(nn.intercept_methods(batch_in_heads))
            x, weights = Block(config, parts=parts).apply({"params": params, **added}, *arguments)
        return x, cache.build(None) if use_cache else None, weights

    return jax.jit(run, donate_argnums=2 if decoder_cache else ())


@functools.lru_cache(maxsize=64)
def compiled_exit(module: nn.Module) -> Callable[..., tuple[Array, Array, Array | None]]:
    """The way from the last block's stream to the normed hidden states, the logits and with labels the loss."""

    def run(params: Params, x: Array, labels: Array | None, only: Array | None) -> Any:
        norm = LayerNorm(module.config.n_embd, module.config.layer_norm_epsilon)
        x = norm.apply({"params": params["transformer"]["ln_f"]}, x)
        with nn.intercept_methods(few_rows):
            return x, *module.apply({"params": params}, x, labels, only, method="next_tokens")

    return jax.jit(run)


class FastPath:
    """A GPTJForCausalLMModule in evaluation mode, a block at a time.

    Args:
        module: the module.
        params: its parameters, which stay what and where they are.
        adapter: the collections of the adapter at work; see `AdapterMixin.adapter_variables`.
    """

    def __init__(self, module: Any, params: Params, adapter: Params) -> None:
        self.config = built_alike(module.config)
        self.module = module.clone(config=self.config)
        base = params["transformer"]
        self.embedding: Array = base["wte"]["weight"]
        kept = self.embedding.dtype if module.dtype is None else module.dtype
        self.dtype = computed_in(np.dtype(kept), self.embedding.devices())
        self.blocks = [base["h"][str(n)] for n in range(self.config.n_layer)]
        outer = {"ln_f": base["ln_f"]} | ({"wte": base["wte"]} if self.config.tie_word_embeddings else {})
        self.exit = {"transformer": outer, "lm_head": params["lm_head"]}
        self.added = self._beside(adapter)

    def adapted(self, adapter: Params) -> FastPath:
        """The same with an adapter, or with no collections with none; this one, which decoders hold, stays as it is."""
        path = copy.copy(self)
        path.added = self._beside(adapter)
        return path

    def _beside(self, adapter: Params) -> list[Params]:
        """The adapter's collections of each block."""
        trees = {kind: tree["transformer"]["h"] for kind, tree in adapter.items()}
        numbers = map(str, range(self.config.n_layer))
        return [{kind: tree[n] for kind, tree in trees.items() if n in tree} for n in numbers]

    def __call__(
        self,
        arguments: Mapping[str, Any],
        *,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        only: Any = None,
        decoder_cache: bool = False,
    ) -> CausalLMOutputWithPast:
        """The module's outputs for the checked arguments of a call.

        Args:
            arguments: by the names of `GPTJForCausalLM.__call__`.
            use_cache, output_attentions, output_hidden_states: what is asked for.
            only: a place: give the logits (b, v) of it alone.
            decoder_cache: the cache is one of `init_cache`, and used up.
        """
        ids, embeds, past = arguments["input_ids"], arguments["inputs_embeds"], arguments["past_key_values"]
        t = (ids if embeds is None else embeds).shape[1]
        fixed = past is not None and past.fixed
        past_length = cache_length(past)
        prompt_only = decoder_cache and int(past_length) == 0
        length = t if prompt_only or past is None else past.keys[0].shape[-2] if fixed else past_length + t
        x, attention_inputs = compiled_entrance(self.config, length, self.dtype)(
            self.embedding,
            ids,
            embeds,
            arguments["token_type_ids"],
            arguments["position_ids"],
            arguments["attention_mask"],
            np.int32(past_length) if isinstance(past_length, int) else past_length,
        )
        factors = self._head_masks(arguments["head_mask"])
        block = compiled_block(self.config, decoder_cache, prompt_only, use_cache, output_attentions, self.module.parts)
        hidden, attentions, keys, values = [x], [], [], []
        for n, (params, added) in enumerate(zip(self.blocks, self.added, strict=True)):
            layer = None if past is None else KVCache((past.keys[n],), (past.values[n],), None, fixed)
            x, layer, weights = block(params, added, layer, x, attention_inputs, factors[n])
            if output_hidden_states:
                hidden.append(x)
            if layer is not None:
                keys += layer.keys
                values += layer.values
            attentions.append(weights)
        x, logits, loss = compiled_exit(self.module)(self.exit, x, arguments.get("labels"), only)
        hidden[-1] = x
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=KVCache(tuple(keys), tuple(values), past_length + t, fixed) if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def last_states(self, ids: Array) -> Array:
        """The last block's stream (b, t, m) after token ids (b, t), each row from position 0."""
        enter = compiled_entrance(self.config, ids.shape[1], self.dtype)
        x, attention_inputs = enter(self.embedding, ids, None, None, None, None, np.int32(0))
        block = compiled_block(self.config, False, False, False, False, self.module.parts)
        for params, added in zip(self.blocks, self.added, strict=True):
            x, _, _ = block(params, added, None, x, attention_inputs, None)
        return x

    def logits_at(self, states: Array, rows: Array, columns: Array) -> Array:
        """The logits (n, v) of these places of `last_states`."""
        return compiled_exit(self.module)(self.exit, states[rows, columns][None], None, None)[1][0]

    def init_cache(self, batch: int, slots: int, sharding: Any = None) -> KVCache:
        """An empty cache for `step`: n_layer pairs of (b h, slots, d), cut as `sharding` says."""
        config = self.config
        shape = batch * config.n_head, slots, config.head_dim
        keys, values = (tuple(jnp.zeros(shape, self.dtype, device=sharding) for _ in self.blocks) for _ in range(2))
        return KVCache(keys, values, 0, fixed=True)

    def step(
        self,
        cache: KVCache,
        ids: Array,
        positions: Array,
        mask: Array,
        last: Array,
        *,
        last_only: bool,
        want: frozenset[str],
    ) -> tuple[KVCache, dict[str, Any]]:
        """The next tokens through the cache, which is used up, and what they give: logits, where asked more.

        Compiled once for each rounded shape.
        """
        arguments = {
            "input_ids": ids,
            "past_key_values": cache,
            "attention_mask": mask,
            "token_type_ids": None,
            "position_ids": positions,
            "head_mask": None,
            "inputs_embeds": None,
        }
        outputs = self(
            arguments,
            use_cache=True,
            output_attentions="attentions" in want,
            output_hidden_states="hidden_states" in want,
            only=last if last_only else None,
            decoder_cache=True,
        )
        kept = outputs.past_key_values
        assert kept is not None  # use_cache is True
        return kept, {name: getattr(outputs, name) for name in ("logits", "hidden_states", "attentions")}

    def _head_masks(self, head_mask: Any) -> Any:
        config = self.config
        if head_mask is None:
            return [None] * config.n_layer
        return jnp.broadcast_to(head_mask, (config.n_layer, config.n_head))


class InferenceMixin:
    """Faster decoding, a base class of the models with a language-model head."""

    fast_path: Any

    def prepare_for_inference(self, *, quantize: str | None = None) -> Self:
        """The model itself, which takes the fast path from then on: `model(...)`, `generate` and `stream`.

        Differs: nothing is packed; the parameters are cast once to what is computed in, or stay as they are.

        On a CPU, what is computed in is float32 at least, and a 16-bit model takes twice its memory: `generate` leaves
        its parameters as they are, which takes longer for several rows and for prompts, and for float16. Training and
        all that changes or writes parameters is over.

        Args:
            quantize: None; XLA has no fast product of narrower weights on a CPU.

        Raises:
            InputError: another `quantize`, or a model prepared already.
        """
        model: Any = self
        model._refuse_prepared("prepare_for_inference")
        model._refuse_cut("prepare_for_inference")
        check_quantize(quantize, ())
        model._require_values("prepare_for_inference")
        dtype = computed_in(model.dtype, [model.device])
        arrays, model._params = flat(model.params), None
        for name in arrays:  # one at a time, so that no more than one is there twice
            arrays[name] = jax.block_until_ready(jnp.asarray(arrays[name], dtype))
        model._params = nested(arrays.items())
        model.module = model.module.clone(dtype=None, param_dtype=dtype, gradient_checkpointing=False)
        model.fast_path, model._is_prepared = FastPath(model.module, model._params, model.adapter_variables()), True
        return self
