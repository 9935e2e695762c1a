"""The two steps under generation, prefill and one token, over a preallocated cache; the loop is `gptj.generation`'s.

XLA compiles anew for every shape, so shapes are few: the cache's capacity and a prompt's length are rounded up, the
slots in excess are masked and later overwritten. The cache is donated to each step, which writes it in place: a block
at a time, as a prepared model's steps do (`gptj.flax.inference`), over the parameters as they are.
"""

from __future__ import annotations

import copy
import functools
import secrets
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from gptj import generation
from gptj.calls.outputs import KVCache
from gptj.flax.inference import FastPath
from gptj.flax.weights import from_numpy, to_numpy
from gptj.generation import PARTS, Columns, Selected, Step, scoring
from gptj.generation.decoder import Ids, Mask, round_up, round_up_columns, round_up_slots
from gptj.sharding import Placement, check_rows

_FEWEST_MOVED = 64
"""Columns that are copied between caches at least: a program is compiled for each width."""


@functools.partial(jax.jit, static_argnames="sharding")
def gather_rows(cache: KVCache, rows: Array, *, sharding: Any = None) -> KVCache:
    """The cache whose row r is what row `rows[r]` was, cut as `sharding` says."""
    keys, values = (tuple(x[rows] for x in side) for side in (cache.keys, cache.values))
    if sharding is not None:
        keys, values = lax.with_sharding_constraint((keys, values), sharding)
    return KVCache(keys, values, cache.length, fixed=True)


@functools.partial(jax.jit, static_argnames=("heads", "width"))
def read_slots(slots: Array, row: Array, start: Array, *, heads: int, width: int) -> Array:
    """`width` slots (h, width, d) of a row of (b h, s, d), from `start` on."""
    return lax.dynamic_slice(slots, (row * heads, start, np.int32(0)), (heads, width, slots.shape[2]))


@functools.partial(jax.jit, static_argnames="width", donate_argnums=0)
def write_slots(slots: Array, new: Array, row: Array, first: Array, roll: Array, start: Array, *, width: int) -> Array:
    """The slots (b h, s, d) with `width` of `new` (h, n, d) from `first` on, moved round by `roll`, from `start` on."""
    part = jnp.roll(lax.dynamic_slice_in_dim(new, first, width, 1), roll, 1)
    return lax.dynamic_update_slice(slots, part, (row * len(new), start, np.int32(0)))


def cut_along_dp(placement: Placement | None, batch: int) -> tuple[Callable[[Any], Any], Any]:
    """The function that gives each device its own of a batch's rows, and the sharding by which it does.

    Raises:
        InputError: there are not as many for each.
    """
    if placement is None:
        return (lambda array: array), None
    from gptj.flax.parallel import cut_rows, rows_sharding

    check_rows(batch, placement)
    if placement.mesh.dp == 1:
        return (lambda array: array), None
    return (lambda array: cut_rows(array, placement)), rows_sharding(placement)


class Decoder(generation.Decoder):
    """A GPTJForCausalLM with a cache of its own, fed by the loop of `gptj.generation`.

    Args:
        model: the model; it is run in evaluation mode.
        batch: rows.
        capacity: the most tokens a row will have.
    """

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        super().__init__(model.config, batch, capacity)
        self.model = model
        self.slots = round_up_slots(model.config, capacity)
        self.path = model._path()
        self._cut, self._sharding = cut_along_dp(model.placement, batch)
        self.cache: KVCache = self.path.init_cache(batch, self.slots, self._sharding)

    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        columns = token_ids.shape[1]
        ids, positions, mask = self._pad(token_ids.astype(np.int32), position_ids.astype(np.int32), mask, offset)
        self.cache.length = np.int32(offset)
        arguments = self.cache, *map(self._cut, (ids, positions, mask)), np.int32(columns - 1)
        self.cache, made = self.path.step(*arguments, last_only=last_only, want=want)
        held = self.model._held(made["logits"], columns)
        return Step.of(held, made["hidden_states"], made["attentions"], fetch=to_numpy, columns=columns,
                       length=offset + columns)  # fmt: skip

    def _gather(self, rows: NDArray[np.int64]) -> None:
        each = self.config.n_head
        places = (rows[:, None] * each + np.arange(each)).reshape(-1)
        self.cache = gather_rows(self.cache, places, sharding=self._sharding)

    def _read(self, row: int, start: int, count: int) -> Columns:
        # Differs: widths are rounded up, so that few programs are compiled: more is copied, and what counts is named.
        width = min(1 << (max(count, _FEWEST_MOVED) - 1).bit_length(), self.slots)
        begin = min(start, self.slots - width)
        place = np.int32(row), np.int32(begin)
        keys, values = (
            tuple(read_slots(x, *place, heads=self.config.n_head, width=width) for x in side)
            for side in (self.cache.keys, self.cache.values)
        )
        return Columns(keys, values, start - begin, count)

    def _write(self, row: int, start: int, columns: Columns) -> None:
        copied = columns.keys[0].shape[1]
        width = min(copied, self.slots)
        first = min(columns.first, copied - width)
        begin = min(max(start - (columns.first - first), 0), self.slots - width)
        roll = start - (columns.first - first) - begin
        numbers = (np.int32(row), np.int32(first), np.int32(roll), np.int32(begin))
        keys, values = (
            tuple(write_slots(slots, its, *numbers, width=width) for slots, its in zip(side, new, strict=True))
            for side, new in ((self.cache.keys, columns.keys), (self.cache.values, columns.values))
        )
        self.cache = KVCache(keys, values, self.cache.length, fixed=True)

    def _filled(self, length: int) -> KVCache:
        config = self.config
        shape = (self.batch, config.n_head, self.slots, config.head_dim)
        keys, values = (
            tuple(x.reshape(shape)[:, :, :length].astype(self.model.dtype) for x in side)
            for side in (self.cache.keys, self.cache.values)
        )
        return KVCache(keys, values, length)


@functools.partial(jax.jit, static_argnames=("count", "weigh"))
def best_of(logits: Array, named: Array, temperature: Array, *, count: int, weigh: bool) -> tuple[Array, ...]:
    """Select the best logits of each row for `Logits.best`; compiled once for each shape."""
    values, ids = lax.top_k(logits, count)
    asked, finite = jnp.take_along_axis(logits, named, 1), jnp.isfinite(logits).all(1)
    if not weigh:
        return values, ids, finite, asked
    weights = jnp.where(logits > values[:, -1:], 0, jnp.exp((logits - values[:, :1]) / temperature))
    parts = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % PARTS)))
    return values, ids, finite, asked, parts.reshape(len(parts), PARTS, -1).sum(2)


class Logits(generation.HeldLogits):
    """A step's logits on a device."""

    def best(self, count: int, named: NDArray[np.int64], temperature: float | None) -> Selected:
        """The `count` best of each row of (b, v), and the logits of `named` (b, m)."""
        divisor = np.asarray(1 if temperature is None else temperature, self._array.dtype)
        made = best_of(self._array, named.astype(np.int32), divisor, count=count, weigh=temperature is not None)
        here = all(array.is_fully_addressable for array in made)
        return Selected(*(jax.device_get(made) if here else map(to_numpy, made)))

    def _fetched(self, array: Array) -> NDArray[Any]:
        return to_numpy(array)

    def _rows(self, rows: NDArray[np.int64]) -> Array:
        return self._array[rows]

    def _position(self, n: int) -> Array:
        return lax.dynamic_index_in_dim(self._array, np.int32(n), 1, keepdims=False)


def on_host(logits: Array) -> bool:
    """Whether they lie in the host's memory, where NumPy reads them without a copy."""
    return all(device.platform == "cpu" for device in logits.devices())


def is_typed_key(key: Any) -> bool:
    """Whether it is a key of `jax.random.key`, and not the plain array of `jax.random.PRNGKey`."""
    return isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


class GenerationMixin(generation.Generates[jax.Array], scoring.Scores):
    """`generate`, `stream` and `score` for a Flax model."""

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        return Decoder(self, batch, capacity)

    def _agree_on(self, seed: Any) -> Any:
        if self.placement is None or seed is not None:  # type: ignore[attr-defined]
            return seed
        from gptj.flax.processes import share_number

        return share_number(secrets.randbits(62))

    def _is_traced(self) -> bool:
        return isinstance(jnp.zeros(()), jax.core.Tracer)

    def _host(self, array: Any) -> NDArray[Any]:
        if isinstance(array, jax.core.Tracer):
            raise generation.inside_a_graph()
        return to_numpy(array)

    def _seed_of(self, prng_key: Any) -> int:
        # Differs: a key of jax.random is a seed; its bits are read as one number.
        bits = np.asarray(jax.random.key_data(prng_key) if is_typed_key(prng_key) else prng_key, np.uint64).reshape(-1)
        seed = 0
        for word in bits[-2:]:
            seed = seed << 32 | int(word)
        return seed

    def _with(self, params: Any) -> Self:
        # Differs: a call may bring parameters of its own, which generation may too.
        if params is None:
            return self
        own: Any = self
        own._refuse_prepared("params")
        model: Any = copy.copy(self)
        model.params = params
        return model

    def _evaluate(self, **arguments: Any) -> Any:
        return self(**arguments)  # type: ignore[operator]

    def _embed(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        model: Any = self
        return to_numpy(model.get_input_embeddings()[token_ids])

    def _last_states(self, token_ids: NDArray[np.int64]) -> Array:
        # Differs: compiled for each shape, so few are met; what fills one is seen by no token that is scored.
        b, t = token_ids.shape
        placement: Placement | None = self.placement  # type: ignore[attr-defined]
        rows = round_up(b, 2**62)
        rows += 0 if placement is None else -rows % placement.mesh.dp
        excess = rows - b, round_up_columns(t, self.config.n_positions) - t
        cut, _ = cut_along_dp(placement, rows)
        return self._path().last_states(cut(np.pad(token_ids, [(0, n) for n in excess]).astype(np.int32)))

    def _logits_at(self, states: Array, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        excess = round_up(len(rows), 2**62) - len(rows)
        places = (np.pad(place, (0, excess)).astype(np.int32) for place in (rows, columns))
        return self._path().logits_at(states, *places)

    def _path(self) -> FastPath:
        model: Any = self
        if model.fast_path is None:
            return FastPath(model.module, model.params, model.adapter_variables())
        return model.fast_path

    def _rows_of(self, array: Array, rows: NDArray[np.int64]) -> Array:
        return array[rows]

    def _held(self, logits: Array, columns: int | None = None) -> NDArray[Any] | Logits:
        held = Logits(logits, columns)
        return held.on_host() if on_host(logits) else held

    def _native(self, array: NDArray[Any]) -> Array:
        # Differs: jax has no int64 unless it is asked for, and token ids fit in int32.
        return from_numpy(array if jax.config.jax_enable_x64 else array.astype(jnp.int32))
