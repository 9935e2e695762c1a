"""The two steps under generation, prefill and one token, over a preallocated cache; the loop is `gptj.generation`'s.

XLA compiles both, once for each shape: a prompt's length and the cache's capacity are rounded up, so that few shapes
are met. What pads them is masked, and overwritten when its slot is taken; no result
changes.
"""

from __future__ import annotations

import functools
import operator
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from gptj import generation
from gptj.adapters import TARGETS
from gptj.calls.outputs import KVCache
from gptj.config import GPTJConfig
from gptj.config.schema import BASE_PREFIX, schema
from gptj.generation import PARTS, Columns, Selected, Step, scoring
from gptj.generation.decoder import Ids, Mask, built_alike, round_up_slots
from gptj.tf.adapters import LowRank, add_low_rank
from gptj.tf.arguments import CacheBuilder, causal_mask, host
from gptj.tf.layers import LayerNorm, Linear, at_least_float32
from gptj.tf.model import Block
from gptj.tf.parallel import run_over_mesh, whole
from gptj.tf.parallel_generate import ParallelDecoder
from gptj.tf.processes import share_number
from gptj.tf.weights import to_numpy


class Decoder(generation.Decoder):
    """A GPTJForCausalLM with a cache of its own, fed by the loop of `gptj.generation`.

    Args:
        model: the model.
        batch: rows.
        capacity: the most tokens a row will have.
    """

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        super().__init__(model.config, batch, capacity)
        self.model = model
        self.compiled = CompiledModel.of(model)
        self.slots = round_up_slots(model.config, capacity)
        # Differs: the cache is variables of rank 3. XLA updates those in place; a fourth axis makes it copy the whole
        # cache at every step (measured: 184 ms a step, against 52).
        shape = (batch * model.config.n_head, self.slots, model.config.head_dim)
        self.keys, self.values = (
            tuple(tf.Variable(tf.zeros(shape, self.compiled.dtype)) for _ in range(model.config.n_layer))
            for _ in range(2)
        )

    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        columns = token_ids.shape[1]
        logits, hidden_states, attentions = self.compute(
            token_ids, position_ids, mask, offset, last_only=last_only, want=want
        )
        held = self.model._held(logits, columns)
        return Step.of(held, hidden_states, attentions, fetch=to_numpy, columns=columns, length=offset + columns)

    def compute(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...] | None, tuple[tf.Tensor, ...] | None]:
        """`_run`'s logits, hidden states and attentions as tensors, with the columns and slots that pad the shape."""
        columns = token_ids.shape[1]
        token_ids, position_ids, mask = self._pad(token_ids, position_ids, mask, offset)
        width = token_ids.shape[1]
        run = self.compiled.function(
            (self.batch, width, self.slots),
            fresh=offset == 0 and width > 1,
            last_only=last_only,
            weigh="attentions" in want,
            trace="hidden_states" in want,
        )
        result: tuple[tf.Tensor, tuple[tf.Tensor, ...] | None, tuple[tf.Tensor, ...] | None] = run(
            self.keys,
            self.values,
            tf.constant(token_ids),
            tf.constant(position_ids),
            tf.constant(mask),
            tf.constant(offset),
            tf.constant(columns - 1),
        )
        return result

    def _gather(self, rows: NDArray[np.int64]) -> None:
        h = self.config.n_head
        every_head = (rows[:, None] * h + np.arange(h)).reshape(-1)
        self.keys, self.values = (
            tuple(tf.Variable(tf.gather(variable, every_head)) for variable in side)
            for side in (self.keys, self.values)
        )

    def _read(self, row: int, start: int, count: int) -> Columns:
        h = self.config.n_head
        heads, part = slice(row * h, (row + 1) * h), slice(start, start + count)
        keys, values = (tuple(tf.identity(x[heads, part]) for x in side) for side in (self.keys, self.values))
        return Columns(keys, values, 0, count)

    def _write(self, row: int, start: int, columns: Columns) -> None:
        h = self.config.n_head
        heads, place = slice(row * h, (row + 1) * h), slice(start, start + columns.count)
        part = slice(columns.first, columns.first + columns.count)
        for side, new in ((self.keys, columns.keys), (self.values, columns.values)):
            for slots, its in zip(side, new, strict=True):
                slots[heads, place].assign(its[:, part])

    def _filled(self, length: int) -> KVCache:
        shape = (self.batch, self.config.n_head, length, self.config.head_dim)
        keys, values = (
            tuple(tf.cast(tf.reshape(x[:, :length], shape), self.model.compute_dtype) for x in side)
            for side in (self.keys, self.values)
        )
        return KVCache(keys, values, length)


class CompiledModel:
    """A model's next logits over a cache in variables: programs of XLA's in a graph of TensorFlow's.

    The blocks differ in their parameters alone, so one program with the parameters as arguments serves them all: XLA
    compiles one block where it would compile the model, and the graph runs it once a layer (measured with 16 layers
    on 2 virtual cores: 1.0 s to a prompt's first logits in place of 2.7, 0.5 s to the first step's in place of 2.3).
    It serves other models that are built alike too, and all adapters that add to the same matrices.

    Attributes:
        config: the sizes.
        dtype: what is computed in. The parameters keep theirs: each is cast in the program that multiplies by it.
        weights: the variables that the graphs hold; a model that has got others gets other graphs.
        functions: graphs and programs, by shape and by what they return.
        names: of a block's parameters.
        added: for each block, the adapter at work beside each of its matrices that it adds to.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, built_alike(model.config)
        self.dtype = tf.as_dtype(model.compute_dtype)
        if self.dtype.size == 2 and not tf.config.list_physical_devices("GPU"):
            # Differs: XLA on a CPU multiplies several rows of 16 bits many times slower; one row it casts as it reads.
            self.dtype = tf.float32
        self.weights = list(model.weights)
        self.functions: dict[tuple[Any, ...], Any] = {}
        first = BASE_PREFIX + "h.0."
        rows = (row.name for row in schema(model.config, model.head))
        self.names = [name.removeprefix(first) for name in rows if name.startswith(first)]
        self.added = [_adapter_at_work(block) for block in model.transformer.h]

    @classmethod
    def of(cls, model: Any) -> CompiledModel:
        """The model's own with the adapter at work, kept with it from one decoder to the next."""
        weights = model.weights
        kept: dict[str | None, CompiledModel] = {
            adapter: compiled
            for adapter, compiled in getattr(model, "_compiled", {}).items()
            if len(compiled.weights) == len(weights)
            and all(a is b for a, b in zip(compiled.weights, weights, strict=True))
        }
        active = model.active_adapter
        if active not in kept:
            kept[active] = cls(model)
        model._compiled = kept
        return kept[active]

    def function(self, shape: tuple[int, ...], **options: Any) -> Any:
        """The graph for (b, t, s) of these sizes; `_run` says what it takes and gives.

        One for each shape, and no lambda, since TensorFlow warns of a function, or of lambdas of one line, that meet
        many.
        """
        key = ("_run", *shape, *options.items())
        if key not in self.functions:
            self.functions[key] = tf.function(functools.partial(self._run, **options), autograph=False)
        return self.functions[key]

    def _program(self, compiled: Callable[..., Any], shape: tuple[int, ...], **options: Any) -> Any:
        """The program of `compiled_block` or `compiled_head`, listed."""
        key = (compiled.__name__, *shape, *options.items())
        if key not in self.functions:
            self.functions[key] = compiled(self.config, self.model.dtype_policy.name, shape, **options)
        return self.functions[key]

    def _run(
        self,
        keys: tuple[tf.Variable, ...],
        values: tuple[tf.Variable, ...],
        token_ids: tf.Tensor,
        position_ids: tf.Tensor,
        mask: tf.Tensor,
        offset: tf.Tensor,
        last: tf.Tensor,
        *,
        fresh: bool,
        last_only: bool,
        weigh: bool,
        trace: bool,
    ) -> tuple[Any, ...]:
        base, (b, t), slots = self.model.transformer, token_ids.shape, keys[0].shape[1]
        run_head = self._program(compiled_head, (b, t), last_only=last_only)
        start, s = (0, t) if fresh else (offset, slots)  # nothing is in the slots behind a fresh prompt
        mask = causal_mask(mask[:, :s], start + tf.range(t), s)
        rotation = base.rotary(position_ids)
        hidden, attentions = [tf.cast(base.wte(token_ids), self.dtype)], []
        for layer, beside, *slots_of_layer in zip(base.h, self.added, keys, values, strict=True):
            adapted = tuple((name, one.a.shape[0]) for name, one in beside.items())
            run_block = self._program(compiled_block, (b, t, slots), adapted=adapted, fresh=fresh, weigh=weigh)
            added = {name: one.values() for name, one in beside.items()}
            parameters = _values(layer, self.names)
            x, weights = run_block(parameters, added, *slots_of_layer, hidden[-1], rotation, mask, offset)
            hidden.append(x)
            attentions.append(weights)
        logits, hidden[-1] = run_head(*self._head_parameters(), hidden[-1], last)
        return logits, tuple(hidden) if trace else None, tuple(attentions) if weigh else None

    def _head_parameters(self) -> Iterator[dict[str, tf.Variable]]:
        """Those of the last norm and of lm_head."""
        for layer in (self.model.transformer.ln_f, self.model.lm_head):
            yield _values(layer, ("weight", "bias"))


@functools.lru_cache(maxsize=256)
def compiled_block(
    config: GPTJConfig, policy: str, shape: tuple[int, int, int], *, adapted: Any, fresh: bool, weigh: bool
) -> Callable[..., tuple[tf.Tensor, tf.Tensor | None]]:
    """One block over its layer's cache, which it writes to; a fresh one is empty.

    The program takes the block's parameters and the adapter's beside them, by name.

    Args:
        config, policy: of the model.
        shape: batch, new tokens and slots (b, t, s), of which each has a program.
        adapted: what the adapter at work adds to, and its ranks there.
        fresh: nothing is in the cache yet.
        weigh: the attention weights are asked for.
    """
    with tf.init_scope():
        block = Block(config, name="block", dtype=policy)
    for target in TARGETS:
        operator.attrgetter(target)(block).apart = True

    def run(
        parameters: dict[str, tf.Variable],
        added: dict[str, tuple[Any, ...]],
        keys: tf.Variable,
        values: tf.Variable,
        x: tf.Tensor,
        rotation: tuple[tf.Tensor, tf.Tensor],
        mask: tf.Tensor,
        offset: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        _give(block, parameters)
        for name in TARGETS:
            a_b_scale = added.get(name)
            operator.attrgetter(name)(block).lora = a_b_scale and functools.partial(_add, a_b_scale)
        cache = CacheBuilder(KVCache((keys,), (values,), 0 if fresh else offset, fixed=True))
        x, weights = block(
            x, rotation=rotation, attention_mask=mask, update_cache=cache.update_of(0, True), head_mask=None, seeds=None
        )
        keys.assign(cache.keys[0])
        values.assign(cache.values[0])
        return x, weights if weigh else None

    return tf.function(run, jit_compile=True, autograph=False)


@functools.lru_cache(maxsize=256)
def compiled_head(
    config: GPTJConfig, policy: str, shape: tuple[int, int], *, last_only: bool
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """The logits, of the column `last` or of all, and what they are computed from: a program for each (b, t)."""
    with tf.init_scope():
        norm = LayerNorm(config.layer_norm_epsilon, name="ln_f", dtype=policy)
        head = Linear(name="lm_head", dtype=policy)
    head.apart = True

    def run(
        of_norm: dict[str, tf.Variable], of_head: dict[str, tf.Variable], x: tf.Tensor, last: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        _give(norm, of_norm)
        _give(head, of_head)
        x = norm(x)
        return at_least_float32(head(tf.gather(x, last, axis=1) if last_only else x)), x

    return tf.function(run, jit_compile=True, autograph=False)


def _give(layer: Any, parameters: dict[str, tf.Variable]) -> None:
    """Let a layer compute with these parameters, by their names in it, while a program is traced."""
    for name, parameter in parameters.items():
        *owner, leaf = name.rsplit(".", 1)
        setattr(operator.attrgetter(*owner)(layer) if owner else layer, leaf, tf.convert_to_tensor(parameter))


def _values(layer: Any, names: Iterable[str]) -> dict[str, tf.Variable]:
    """The parameters of these names in a layer."""
    return {name: operator.attrgetter(name)(layer).value for name in names}


def _adapter_at_work(block: Block) -> dict[str, LowRank]:
    """The adapter at work beside each matrix of a block that it adds to."""
    linears = ((target, operator.attrgetter(target)(block)) for target in TARGETS)
    found = {target: linear.lora.at_work for target, linear in linears if linear.lora is not None}
    return {target: added for target, added in found.items() if added is not None}


def _add(a_b_scale: tuple[Any, ...], x: tf.Tensor, y: tf.Tensor, seed: None) -> tf.Tensor:
    return add_low_rank(x, y, *a_b_scale)


@functools.lru_cache(maxsize=64)
def compiled_best(shape: tuple[int, ...], count: int, weigh: bool) -> Callable[..., tuple[tf.Tensor, ...]]:
    """The selection of the best logits for `Logits.best`, a graph for each shape (b, v, m)."""
    excess = -shape[1] % PARTS

    def run(logits: tf.Tensor, named: tf.Tensor, temperature: tf.Tensor) -> tuple[tf.Tensor, ...]:
        values, ids = tf.math.top_k(logits, count)
        asked = tf.gather(logits, named, batch_dims=1)
        finite = tf.reduce_all(tf.math.is_finite(logits), 1)
        if not weigh:
            return values, ids, finite, asked
        weights = tf.exp((logits - values[:, :1]) / temperature)
        parts = tf.pad(tf.where(logits > values[:, -1:], tf.zeros_like(weights), weights), ((0, 0), (0, excess)))
        return values, ids, finite, asked, tf.reduce_sum(tf.reshape(parts, (shape[0], PARTS, -1)), 2)

    return tf.function(run, autograph=False)


class Logits(generation.HeldLogits):
    """A step's logits on a device."""

    def best(self, count: int, named: NDArray[np.int64], temperature: float | None) -> Selected:
        """The `count` best of each row of (b, v), and the logits of `named` (b, m)."""
        logits: tf.Tensor = self._array
        divisor = tf.constant(1 if temperature is None else temperature, logits.dtype)
        run = compiled_best((*logits.shape, named.shape[1]), count, temperature is not None)
        return Selected(*map(to_numpy, run(logits, tf.constant(named), divisor)))

    def _fetched(self, array: tf.Tensor) -> NDArray[Any]:
        return to_numpy(array)

    def _rows(self, rows: NDArray[np.int64]) -> tf.Tensor:
        return tf.gather(self._array, rows)

    def _position(self, n: int) -> tf.Tensor:
        return self._array[:, n]


def on_host(logits: tf.Tensor) -> bool:
    """Whether they lie in the host's memory, where NumPy reads them without a copy."""
    return "CPU" in logits.device


class GenerationMixin(generation.Generates[tf.Tensor], scoring.Scores):
    """`generate`, `stream` and `score` for a TensorFlow model."""

    def _decoder(self, batch: int, capacity: int) -> Decoder | ParallelDecoder:
        # Differs: XLA compiles nothing over DTensors, so a cut model has a decoder of its own.
        if self.placement is not None:  # type: ignore[attr-defined]
            return ParallelDecoder(self, batch, capacity)
        return Decoder(self, batch, capacity)

    def _agree_on(self, seed: Any) -> Any:
        if self.placement is None or seed is not None:  # type: ignore[attr-defined]
            return seed
        return share_number(secrets.randbits(62))

    def _is_traced(self) -> bool:
        return not tf.executing_eagerly()

    def _host(self, array: Any) -> NDArray[Any]:
        values = host(array)
        if values is None:
            raise generation.inside_a_graph()
        return values

    def _evaluate(self, **arguments: Any) -> Any:
        return self(**arguments, training=False)  # type: ignore[operator]

    def _embed(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        model: Any = self
        embeddings, ids = model.get_input_embeddings(), tf.constant(token_ids)
        if model.placement is not None:
            return to_numpy(whole(run_over_mesh(model, "embed", embeddings.call, ids), model.placement))
        return to_numpy(embeddings(ids))

    def _last_states(self, token_ids: NDArray[np.int64]) -> tf.Tensor:
        model: Any = self
        run = model.transformer.call if model.placement is None else model.transformer
        excess = 0 if model.placement is None else -len(token_ids) % model.placement.mesh.dp
        states: tf.Tensor = run(
            tf.constant(np.pad(token_ids, ((0, excess), (0, 0)))),
            use_cache=False,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
            training=False,
        ).last_hidden_state
        return states

    def _logits_at(self, states: tf.Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tf.Tensor:
        model: Any = self
        chosen = tf.gather_nd(states, np.stack([rows, columns], axis=1))
        if model.placement is not None:
            return at_least_float32(whole(run_over_mesh(model, "head", model.lm_head.call, chosen), model.placement))
        return at_least_float32(model.lm_head(chosen))

    def _rows_of(self, array: tf.Tensor, rows: NDArray[np.int64]) -> tf.Tensor:
        return tf.gather(array, rows)

    def _held(self, logits: tf.Tensor, columns: int | None = None) -> NDArray[Any] | Logits:
        held = Logits(logits, columns)
        return held.on_host() if on_host(logits) else held

    def _native(self, array: NDArray[Any]) -> tf.Tensor:
        return tf.constant(array)
