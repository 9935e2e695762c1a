"""GPT-J's blocks in TensorFlow, top to bottom.

Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax; rotary position embedding, Su et
al. 2021, arXiv:2104.09864. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward. Parameter names and layouts are the schema's. Precision is written where it matters: rotation,
scores, softmax, layer norms and logits are float32 at least whatever the parameters' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from gptj import inputs
from gptj.config import GPTJConfig
from gptj.generation.typed import ReturnDict, same_as, typed_call
from gptj.outputs import BaseModelOutputWithPast, KVCache
from gptj.rotary import rotary_table
from gptj.tf.weights import PretrainedModel

Remember = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""Takes a layer's new keys and values (b, h, t, d) and gives all that its queries may look at (b, h, s, d)."""


def _gelu(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.math.erf(x / math.sqrt(2)))


def _gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


def at_least_float32(x: tf.Tensor) -> tf.Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def sizes(x: tf.Tensor) -> list[Any]:
    """The size of each axis: a number where it is known, else a scalar tensor."""
    known = x.shape.as_list()
    return [size if size is not None else tf.shape(x)[axis] for axis, size in enumerate(known)]


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor | None) -> tf.Tensor:
    """`x`, and with a seed each element zeroed with probability `rate` and the rest scaled to the same mean.

    Differs: a function of its seed, since a block that is computed twice for its gradient must drop the same
    elements twice; a Keras layer would draw anew.
    """
    if seed is None or rate == 0:
        return x
    return tf.nn.experimental.stateless_dropout(x, rate, seed)


class Linear(keras.layers.Layer):
    """x W' + bias, with W of the schema's layout: output axis first.

    Attributes:
        apart: in a program of XLA's, keep the product apart from the additions that follow it.
    """

    def __init__(self, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.weight: Any = None  # these are made, or not, when they are given their values
        self.bias: Any = None
        self.apart = False
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """(..., in) to (..., out)."""
        *before, width = sizes(x)
        weight = tf.cast(self.weight, x.dtype)
        # Turned about, since TensorFlow multiplies few rows by a transposed matrix some ten times slower on a CPU.
        y = tf.transpose(tf.matmul(weight, tf.reshape(x, (-1, width)), transpose_b=True))
        if self.apart:
            # Differs: XLA would fuse what is added into a matrix-vector product, and compute that on one thread.
            (y,) = xla.optimization_barrier(y)
        if self.bias is not None:
            y += tf.cast(self.bias, x.dtype)
        return tf.reshape(y, (*before, weight.shape[0]))


class Embedding(keras.layers.Layer):
    """Rows of a table, looked up by token id."""

    def __init__(self, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.weight: Any = None
        self.built = True

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        """(b, t) to (b, t, m)."""
        return tf.cast(rows_of(tf.convert_to_tensor(self.weight), ids), self.compute_dtype)


def rows_of(table: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """The rows of `table` (v, m) that `ids` (b, t) name, with a gradient that is a whole table.

    Differs: TensorFlow's own gradient is a list of rows, in which an id that occurs twice stands twice; Keras'
    optimizers square each on its own, so AdamW would take another step than it says.
    """

    @tf.custom_gradient
    def look_up(table: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def slope(upstream: tf.Tensor) -> tf.Tensor:
            rows, width = sizes(table)
            return tf.math.unsorted_segment_sum(tf.reshape(upstream, (-1, width)), tf.reshape(ids, (-1,)), rows)

        return tf.gather(table, ids), slope

    return look_up(table)


class LayerNorm(keras.layers.Layer):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis, in float32 at least.

    The variance takes two passes: E[x^2] - E[x]^2 loses every digit where the mean is large.
    """

    def __init__(self, epsilon: float, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.epsilon = epsilon
        self.weight: Any = None
        self.bias: Any = None
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The same shape and dtype."""
        wide = at_least_float32(x)
        centred = wide - tf.reduce_mean(wide, -1, keepdims=True)
        variance = tf.reduce_mean(centred * centred, -1, keepdims=True)
        normal = centred / tf.sqrt(variance + self.epsilon)
        return tf.cast(normal * tf.cast(self.weight, wide.dtype) + tf.cast(self.bias, wide.dtype), x.dtype)


class RotaryTable:
    """The sine and cosine of every position, looked up by position ids: float64 for a float64 model, else float32."""

    def __init__(self, config: GPTJConfig, dtype: str) -> None:
        sin, cos = rotary_table(config.n_positions, config.rotary_width, "float64" if dtype == "float64" else "float32")
        with tf.init_scope():
            self.sin, self.cos = tf.constant(sin), tf.constant(cos)
        self.nbytes = int(sin.nbytes + cos.nbytes)

    def __call__(self, position_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Sine and cosine of each position, (b or 1, t, pairs)."""
        return tf.gather(self.sin, position_ids), tf.gather(self.cos, position_ids)


def rotate_pairs(x: tf.Tensor, sin: tf.Tensor, cos: tf.Tensor) -> tf.Tensor:
    """`x` (b, h, t, d) with its first 2 * pairs dimensions turned, pair by interleaved pair.

    (x0, x1) at angle a becomes (x0 cos a - x1 sin a, x1 cos a + x0 sin a), in the table's precision.
    """
    pairs = sin.shape[-1]
    sin, cos = sin[:, None], cos[:, None]  # b 1 t pairs
    *before, _ = sizes(x)
    turned = tf.reshape(tf.cast(x[..., : 2 * pairs], sin.dtype), (*before, pairs, 2))
    x0, x1 = tf.unstack(turned, axis=-1)
    turned = tf.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), axis=-1)
    return tf.concat((tf.cast(tf.reshape(turned, (*before, 2 * pairs)), x.dtype), x[..., 2 * pairs :]), axis=-1)


def visible(attention_mask: tf.Tensor | None, slots: tf.Tensor, length: Any) -> tf.Tensor:
    """Which keys each query sees, (b or 1, 1, t, s): those at or before its own slot that the mask has In.

    Args:
        attention_mask: (b, up to s) of 0 and 1, or None for all 1.
        slots: (t,) the slot of each query among the keys.
        length: s.
    """
    causal = tf.range(length) <= slots[:, None]
    if attention_mask is None:
        return causal[None, None]
    keys = tf.cast(attention_mask, tf.bool)[:, :length]  # a mask may be as long as a fixed cache
    keys = tf.pad(keys, ((0, 0), (0, length - sizes(keys)[1])))
    return causal & keys[:, None, None]


class Memory:
    """Joins each layer's new keys and values to those that a cache holds, and becomes the next cache.

    Args:
        past: the cache, or None.
    """

    def __init__(self, past: KVCache | None) -> None:
        self.past = past
        self.keys: list[tf.Tensor] = []
        self.values: list[tf.Tensor] = []

    def of(self, layer: int, keep: bool) -> Remember:
        """The function that the layer's attention calls; with `keep` the result is part of the next cache."""

        def remember(k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            past = self.past
            if past is None:
                whole = k, v
            elif past.fixed:
                whole = self._write(past.keys[layer], k), self._write(past.values[layer], v)
                k, v = (self._filled(x, k) for x in whole)
            else:
                whole = k, v = tf.concat((past.keys[layer], k), 2), tf.concat((past.values[layer], v), 2)
            if keep:
                self.keys.append(whole[0])
                self.values.append(whole[1])
            return k, v

        return remember

    def _write(self, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        # Differs: a tensor cannot be written in place, so a fixed cache is a new one after each call; the compiled
        # steps of `generate` keep it in variables, which XLA does update in place.
        assert self.past is not None
        *rows, _, d = sizes(slots)  # (b, h), or (b * h,) in the compiled steps
        new = tf.reshape(new, (*rows, sizes(new)[2], d))
        return keras.ops.slice_update(slots, [*(0 for _ in rows), self.past.length, 0], new)

    def _filled(self, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        # Differs: in a compiled step the length is no number, so the queries get all slots, and a mask hides the empty.
        assert self.past is not None
        return slots[..., : self.past.length + new.shape[2], :] if isinstance(self.past.length, int) else slots

    def cache(self, length: Any) -> KVCache:
        """The cache after this call, `length` tokens long."""
        return KVCache(tuple(self.keys), tuple(self.values), length, self.past is not None and self.past.fixed)


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
        see: tf.Tensor,
        remember: Remember,
        head_mask: tf.Tensor | None,
        seeds: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The attention's contribution (b, t, m) and its weights (b, h, t, s).

        `see` is `visible`'s; `remember` gives all keys and values that the queries may look at; `seeds` (2, 2) are of
        the dropouts of the weights and of the result, None where nothing is dropped.
        """
        q = rotate_pairs(self._heads(self.q_proj(x)), *rotation)
        k = rotate_pairs(self._heads(self.k_proj(x)), *rotation)
        k, v = remember(k, self._heads(self.v_proj(x)))
        mixed, weights = self._attend(q, k, v, see, head_mask, None if seeds is None else seeds[0])
        mixed = self.out_proj(tf.reshape(tf.transpose(mixed, (0, 2, 1, 3)), sizes(x)))
        return dropout(mixed, self.resid_pdrop, None if seeds is None else seeds[1]), weights

    def _heads(self, x: tf.Tensor) -> tf.Tensor:
        b, t, _ = sizes(x)
        return tf.transpose(tf.reshape(x, (b, t, self.n_head, self.head_dim)), (0, 2, 1, 3))  # b t m -> b h t d

    def _attend(
        self,
        q: tf.Tensor,
        k: tf.Tensor,
        v: tf.Tensor,
        see: tf.Tensor,
        head_mask: tf.Tensor | None,
        seed: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        b, h, t, d = sizes(q)
        *rows, s, _ = sizes(k)  # (b, h), or (b * h,) in the compiled steps
        q = at_least_float32(tf.reshape(q, (*rows, t, d)))
        scores = tf.matmul(q, at_least_float32(k), transpose_b=True) / math.sqrt(self.head_dim)
        scores = tf.reshape(scores, (b, h, t, s))
        scores = tf.where(see, scores, scores.dtype.min)
        weights = tf.where(see, tf.nn.softmax(scores), 0)  # a row that sees nothing attends to nothing
        weights = dropout(tf.cast(weights, v.dtype), self.attn_pdrop, seed)
        if head_mask is not None:
            weights *= tf.cast(head_mask, weights.dtype)[:, None, None]
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

    def call(self, x: tf.Tensor, seed: tf.Tensor | None) -> tf.Tensor:
        """The layer's contribution, (b, t, m)."""
        # Differs: PyTorch's fused activations compute in float32 and round once; written out, that takes two casts.
        inner = tf.cast(self.activation(at_least_float32(self.fc_in(x))), x.dtype)
        return dropout(self.fc_out(inner), self.resid_pdrop, seed)


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
        see: tf.Tensor,
        remember: Remember,
        head_mask: tf.Tensor | None,
        seeds: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The stream after this block (b, t, m), and the attention weights. `seeds` (3, 2) are of its dropouts."""
        h = self.ln_1(x)
        attended, weights = self.attn(
            h,
            rotation=rotation,
            see=see,
            remember=remember,
            head_mask=head_mask,
            seeds=None if seeds is None else seeds[:2],
        )
        return attended + self.mlp(h, seed=None if seeds is None else seeds[2]) + x, weights


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
            InputError: see `gptj.inputs.check_call`.
        """
        config = self.config
        recompute = bool(self.gradient_checkpointing and training)
        remember = (config.use_cache if use_cache is None else use_cache) and not recompute
        weigh = config.output_attentions if output_attentions is None else output_attentions
        trace = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seeds = self._seeds(training)

        past, t = past_key_values, sizes(input_ids if inputs_embeds is None else inputs_embeds)[1]
        seen = filled_slots(past)
        claims = claims_of(
            config,
            t,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past=past,
        )
        slots = seen + tf.range(t)
        with tf.control_dependencies(assert_claims(claims)):
            x = self.wte(input_ids) if inputs_embeds is None else tf.cast(inputs_embeds, self.compute_dtype)
            if token_type_ids is not None:
                x += self.wte(token_type_ids)
            rotation = self.rotary(slots[None] if position_ids is None else position_ids)
        x = dropout(spoiled(x, claims), config.embd_pdrop, None if seeds is None else seeds[0])

        everything = past is not None and past.fixed and not isinstance(seen, int)
        see = visible(attention_mask, slots, sizes(past.keys[0])[-2] if everything else seen + t)
        factors = None if head_mask is None else tf.broadcast_to(head_mask, (config.n_layer, config.n_head))

        memory = Memory(past)
        hidden, attentions = [x], []
        for n, block in enumerate(self.h):
            run = recomputed(block) if recompute else block
            x, weights = run(
                x,
                rotation=rotation,
                see=see,
                remember=memory.of(n, remember),
                head_mask=None if factors is None else factors[n],
                seeds=None if seeds is None else seeds[1 + 3 * n : 4 + 3 * n],
            )
            if trace:
                hidden.append(x)
            if weigh:
                attentions.append(weights)
        x = hidden[-1] = self.ln_f(x)

        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=memory.cache(seen + t) if remember else None,
            hidden_states=tuple(hidden) if trace else None,
            attentions=tuple(attentions) if weigh else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    if TYPE_CHECKING:

        @same_as(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """What `call` gives."""

    def _assert_call(self, given: Mapping[str, Any]) -> None:
        """Make the graph raise where a call's arguments by name are wrong."""
        names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        assert_claims(claims_of(self.config, sizes(tokens)[1], **{name: given.get(name) for name in names}))

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


def filled_slots(past: KVCache | None) -> Any:
    """How many slots of the cache are filled: a number where it is known, else an int32 scalar."""
    if past is None:
        return 0
    if not past.fixed:
        return sizes(past.keys[0])[2]
    length = past.length
    if tf.is_tensor(length) and not tf.is_symbolic_tensor(length):
        return int(length)
    return tf.cast(length, tf.int32) if tf.is_tensor(length) else length


def recomputed(block: Block) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """`block` such that its gradient computes it again in place of keeping what is inside."""

    def run(x: tf.Tensor, **arguments: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.recompute_grad(lambda x: block(x, **arguments))(x)

    return run


Claim = tuple[str, Any, tf.Tensor, tf.Tensor]
"""What a sound call keeps: the rule in words, the highest value allowed, the values found, and where it holds."""


def claims_of(
    config: GPTJConfig,
    length: Any,
    *,
    input_ids: tf.Tensor | None = None,
    token_type_ids: tf.Tensor | None = None,
    position_ids: tf.Tensor | None = None,
    attention_mask: tf.Tensor | None = None,
    past: KVCache | None = None,
) -> list[Claim]:
    """What must hold of a call's values, `length` tokens a row; nothing where the host has seen them already."""
    if tf.executing_eagerly():
        return []
    found: list[tuple[str, Any, Any]] = [
        ("input_ids: no such token", config.vocab_size - 1, input_ids),
        ("token_type_ids: no such token", config.vocab_size - 1, token_type_ids),
        ("position_ids: no such position", config.n_positions - 1, position_ids),
    ]
    if attention_mask is not None and attention_mask.dtype != tf.bool:
        found.append(("attention_mask: not a mask", 1, attention_mask))
    seen = filled_slots(past)
    if position_ids is None:
        found.append(("input_ids: longer than the model's positions", config.n_positions, seen + length))
    if past is not None and past.fixed:
        found.append(("past_key_values: the cache is full", sizes(past.keys[0])[-2], seen + length))
    found = [(rule, most, tf.convert_to_tensor(value)) for rule, most, value in found if value is not None]
    return [(rule, most, value, _is_whole(value) & (value >= 0) & (value <= most)) for rule, most, value in found]


def _is_whole(value: tf.Tensor) -> tf.Tensor:
    """Where numbers are whole, bool in their shape: a float mask may hold others."""
    return value == tf.floor(value) if value.dtype.is_floating else tf.ones_like(value, tf.bool)


def assert_claims(claims: list[Claim]) -> list[Any]:
    """Operations that raise, with the first value that is wrong, where a claim does not hold.

    Differs: a graph has no values when it is traced, so this is no InputError but tf.errors.InvalidArgumentError.
    """
    assertions = []
    for rule, highest, found, holds in claims:
        # gather, since XLA would compile a slice anew for every value of its index
        first = tf.gather(tf.reshape(found, (-1,)), tf.argmax(tf.reshape(~holds, (-1,))))
        data = [f"{rule} (expected 0 to", highest, ", found", first, ")"]
        assertions.append(tf.debugging.Assert(tf.reduce_all(holds), data))
    return assertions


def spoiled(x: tf.Tensor, claims: list[Claim]) -> tf.Tensor:
    """`x` (b, t, m), but NaN where a claim about its token, or about all, does not hold.

    XLA drops assertions, and would take an id that is too high for the highest that there is.
    """
    for *_, found, holds in claims:
        of_tokens = len(found.shape) == 2 and found.shape[1] == x.shape[1]
        x = tf.where(holds[..., None] if of_tokens else tf.reduce_all(holds), x, tf.constant(math.nan, x.dtype))
    return x
