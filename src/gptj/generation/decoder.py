"""The one thing that a wing provides: a Decoder, which turns token ids into the next logits over a cache.

All bookkeeping that could differ between three frameworks is here, on the host, in NumPy: which cache slot a
token takes, which slots are real and which are left padding, the position of every token, and whether it still
fits. A wing's subclass gets finished arrays and computes.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptj.calls.inputs import check_attention_mask, check_cache_room, check_cache_size, check_ids
from gptj.calls.outputs import KVCache
from gptj.config import BUILT_IN, GPTJConfig
from gptj.errors import InputError
from gptj.generation.held import HeldLogits

__all__ = [
    "Columns",
    "Decoder",
    "DecoderFactory",
    "Extension",
    "Ids",
    "Mask",
    "Step",
    "Uncached",
    "built_alike",
    "extend_together",
    "round_up",
    "round_up_columns",
    "round_up_slots",
]

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Step:
    """The result of one call of a decoder.

    Attributes:
        held: the logits, on the host or where the model left them: float32 or float64, (b, v) of the last position, or
            (b, n, v) of all n.
        hidden_states: where asked, n_layer + 1 arrays (b, n, m), in NumPy; the last is after ln_f.
        attentions: where asked, n_layer arrays (b, h, n, s), in NumPy, s the cache's length after the call.
    """

    held: NDArray[Any] | HeldLogits
    hidden_states: tuple[NDArray[Any], ...] | None = None
    attentions: tuple[NDArray[Any], ...] | None = None

    @classmethod
    def of(
        cls,
        held: NDArray[Any] | HeldLogits,
        hidden_states: Iterable[Any] | None,
        attentions: Iterable[Any] | None,
        *,
        fetch: Callable[[Any], NDArray[Any]],
        columns: int | None = None,
        length: int | None = None,
    ) -> Step:
        """The step of a wing's arrays, without the columns and slots that pad a compiled program's shape.

        Args:
            held, hidden_states, attentions: as above, the latter two where the wing left them.
            fetch: makes one of them NumPy's.
            columns, length: how many columns and slots count; None: all.
        """
        return cls(
            held,
            None if hidden_states is None else tuple(fetch(x)[:, :columns] for x in hidden_states),
            None if attentions is None else tuple(fetch(x)[:, :, :columns, :length] for x in attentions),
        )

    @functools.cached_property
    def logits(self) -> NDArray[Any]:
        """All logits, on the host."""
        return self.held.on_host() if isinstance(self.held, HeldLogits) else self.held

    def select(self, rows: Sequence[int] | NDArray[Any]) -> Step:
        """The step of these rows."""
        index, held = np.asarray(rows, np.int64), self.held
        return Step(
            held.of_rows(index) if isinstance(held, HeldLogits) else held[index],
            None if self.hidden_states is None else tuple(h[index] for h in self.hidden_states),
            None if self.attentions is None else tuple(a[index] for a in self.attentions),
        )

    def position(self, n: int) -> Step:
        """The step of query n alone, where there are n logits: logits (b, v), hidden states (b, 1, m)."""
        held = self.held
        queries = held.shape[1]
        return Step(
            held.of_position(n) if isinstance(held, HeldLogits) else held[:, n],
            None if self.hidden_states is None else tuple(h[:, n : n + 1] for h in self.hidden_states),
            # Query n saw the slots up to its own, so the later ones are cut off as they are after a single step.
            None
            if self.attentions is None
            else tuple(a[:, :, n : n + 1, : a.shape[3] - (queries - 1 - n)] for a in self.attentions),
        )

    def last(self, count: int) -> Step:
        """The step of the last `count` of n queries."""
        held = self.held
        return Step(
            held.of_last(count) if isinstance(held, HeldLogits) else held if held.ndim == 2 else held[:, -count:],
            None if self.hidden_states is None else tuple(h[:, -count:] for h in self.hidden_states),
            None if self.attentions is None else tuple(a[:, :, -count:] for a in self.attentions),
        )


def round_up(count: int, most: int, *, fewest: int = 1) -> int:
    """The size that `count` is compiled for: a power of two up to 256, above it a multiple of 256, so that few are met.

    >>> [round_up(n, 2048) for n in (1, 5, 200, 300, 1030, 2047)]
    [1, 8, 256, 512, 1280, 2048]

    Args:
        count: what must fit.
        most: the largest size, though it be neither.
        fewest: the smallest.
    """
    count = max(count, fewest)
    power = 1 << (count - 1).bit_length()
    return min(power if power <= 256 else -(-count // 256) * 256, most)


def built_alike(config: GPTJConfig) -> GPTJConfig:
    """The fields of a config that a model is built by, and else defaults: all models of these share what is compiled.

    >>> built_alike(GPTJConfig(eos_token_id=7)) == built_alike(GPTJConfig(use_cache=False))
    True
    """
    return GPTJConfig(**{field: getattr(config, field) for field in BUILT_IN})


def round_up_slots(config: GPTJConfig, capacity: int) -> int:
    """The slots of a compiled cache for `capacity` tokens: 64 at least, n_positions at most."""
    return round_up(capacity, config.n_positions, fewest=64)


PIECE = 16
"""Slots at whose multiples a prompt is cut, so that its numbers are the same in whatever pieces it is read."""


def round_up_columns(columns: int, room: int) -> int:
    """The columns of a compiled prompt: 8 at least, unless it is one token, and `room` at most."""
    return 1 if columns == 1 else round_up(columns, room, fewest=8)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The keys and values of some columns of a row, copied out of a cache to be put into another place of one.

    A key is rotated by its position, which the slot does not tell, so it is the same in every slot.

    Attributes:
        keys, values: n_layer of the wing's arrays (h, n, d).
        first: which of the n columns is the first that counts; a wing that compiles copies more than it is asked for.
        count: how many count.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    first: int
    count: int

    @property
    def held(self) -> int:
        """How many columns there are, those that do not count included."""
        return int(self.keys[0].shape[1])


class Decoder(abc.ABC):
    """A model with a cache of `capacity` slots for each of `batch` rows; slot s of a row holds its column s.

    A wing's subclass calls `super().__init__` first, which refuses a cache that the model has no positions for,
    then allocates, and implements `_run`, `_gather` and, where a shorter cache needs more than to be masked,
    `_forget`.

    Attributes:
        config: the model's.
        batch: rows now; `select` may change it.
        capacity: slots of a row that may be filled.
        slots: of a row, `capacity` or what a wing that compiles rounds it up to.
        joins: whether `extend_together` computes several of them in one pass, takes rows of lengths of their own
            (`Extension.slots`), and gives each row the numbers that it has alone, to the bit, also where a prompt is
            read in pieces, as long as each begins at a multiple of `PIECE` slots.
        length: filled slots, the same for all rows.
        mask: bool (batch, capacity), True where a slot holds a token that may be attended to.
    """

    joins = False

    def __init__(self, config: GPTJConfig, batch: int, capacity: int) -> None:
        check_cache_size(config, batch, capacity)
        self.config = config
        self.batch = batch
        self.capacity = self.slots = capacity
        self.length = 0
        self.mask: Mask = np.zeros((batch, capacity), bool)

    # ---- what the loops call

    def prefill(
        self, token_ids: Ids, mask: Mask | None = None, *, want: frozenset[str] = frozenset(), chunk: int | None = None
    ) -> Step:
        """The logits (b, v) after the prompt, which enters the empty cache, in chunks of `chunk` columns if given.

        Args:
            token_ids: int64 (b, t).
            mask: bool (b, t), True where a column is a token; False only on the left. None: all are.
            want: of "hidden_states" and "attentions"; they need the prompt in one chunk.
            chunk: columns of one call of the model.
        """
        if chunk is not None and want:
            raise InputError(
                f"a prompt in chunks has no {', '.join(sorted(want))}", where="prefill_chunk_size", found=chunk
            )
        if self.length:
            raise InputError("the cache is not empty", where="prefill", expected="0 slots taken", found=self.length)
        return self._fill(token_ids, mask, want=want, chunk=chunk)

    def _fill(self, token_ids: Ids, mask: Mask | None, *, want: frozenset[str], chunk: int | None) -> Step:
        """The logits after the prompt, of which the columns from `length` on enter the cache."""
        columns = token_ids.shape[1]
        chunk = columns if chunk is None else chunk
        for start in range(self.length, columns, chunk):
            part = slice(start, min(start + chunk, columns))
            step = self.extend(token_ids[:, part], None if mask is None else mask[:, part], want=want, last_only=True)
        return step

    def step(self, token_ids: Ids, *, want: frozenset[str] = frozenset()) -> Step:
        """The logits (b, v) after one more token a row, int64 (b,)."""
        return self.extend(token_ids[:, None], want=want, last_only=True)

    def extend(
        self, token_ids: Ids, mask: Mask | None = None, *, want: frozenset[str] = frozenset(), last_only: bool = False
    ) -> Step:
        """The logits after each of n more tokens a row, (b, n, v), or only after the last, (b, v).

        Raises:
            InputError: a token that the model does not have, another batch, or no room in the cache.
        """
        run = self._checked(token_ids, mask, last_only)
        step = self._run(*run.arguments, last_only=last_only, want=want)
        self.length = run.end
        return step

    def _checked(self, token_ids: Ids, mask: Mask | None, last_only: bool) -> Run:
        """The arguments of `_run` for these tokens, which the mask counts already."""
        ids = check_ids(self.config, token_ids).astype(np.int64, copy=False)
        batch, columns = ids.shape
        if batch != self.batch:
            raise InputError("another batch than the cache's", where="input_ids", expected=self.batch, found=batch)
        check_cache_room(self.length, columns, self.capacity)
        if mask is not None:
            check_attention_mask(mask, batch, (columns,))
        start, end = self.length, self.length + columns
        self.mask[:, start:end] = True if mask is None else mask
        # A token's position counts the tokens before it, so left padding moves nothing; padding itself gets 0.
        positions = np.clip(np.cumsum(self.mask[:, :end], axis=1)[:, start:] - 1, 0, None).astype(np.int64)
        return Run(self, ids, positions, self.mask, start, last_only)

    def _checked_rows(self, token_ids: Ids, slots: Ids) -> Run:
        """The run of rows of lengths of their own, which say what each sees."""
        ids = check_ids(self.config, token_ids).astype(np.int64, copy=False)
        if not self.joins or ids.shape != (len(slots), 1) or len(slots) > self.batch or slots.max() >= self.capacity:
            expected = f"at most {self.batch} rows, slots below {self.capacity}"
            raise InputError("no such rows", where="slots", expected=expected, found=f"{ids.shape}, {slots.max()}")
        return Run(self, ids, slots[:, None], self.mask, self.length, True, slots)

    def select(self, rows: Sequence[int] | NDArray[Any]) -> None:
        """Row r of the cache becomes what row `rows[r]` was; there may be more or fewer rows than before."""
        index = np.asarray(rows, np.int64)
        if index.shape == (self.batch,) and (index == np.arange(self.batch)).all():
            return
        self._gather(index)
        self.mask = self.mask[index]
        self.batch = len(index)

    def truncate(self, length: int) -> None:
        """Forget everything in the slots from `length` on."""
        if not 0 <= length <= self.length:
            raise InputError("no such length", where="truncate", expected=f"0 to {self.length}", found=length)
        if length < self.length:
            self._forget(length)
            self.mask[:, length:] = False
            self.length = length

    def filled(self, length: int) -> KVCache[Any] | None:
        """The keys and values of the first `length` columns, as a cache that a model call takes, where there is one."""
        return self._filled(min(length, self.length))

    # ---- rows that come and go (see `gptj.serving`)

    def restart(self, length: int) -> None:
        """Forget all, and let the next column go to slot `length`; the slots before it are empty until written."""
        if not 0 <= length <= self.capacity:
            raise InputError("no such length", where="restart", expected=f"0 to {self.capacity}", found=length)
        self.mask[:] = False
        self.length = length

    def read(self, row: int, start: int, count: int) -> Columns:
        """A copy of `count` columns of a row, from slot `start` on."""
        self._require_slots("read", row, start, count)
        return self._read(row, start, count)

    def write(self, row: int, start: int, columns: Columns, count: int | None = None) -> None:
        """Make the first `count` of the columns, or all, the only ones of the row, in the slots from `start` on."""
        count = columns.count if count is None else count
        self._require_slots("write", row, start, count)
        self._write(row, start, dataclasses.replace(columns, count=count))
        self.mask[row] = False
        self.mask[row, start : start + count] = True

    def move(self, length: int) -> None:
        """Let the next column go to slot `length`, and what each row holds, as one piece, end before it.

        Raises:
            InputError: a row holds more, or the cache has less.
        """
        begins = np.where(self.mask.any(axis=1), self.mask.argmax(axis=1), self.length)
        most = int((self.length - begins).max(initial=0))
        if not most <= length <= self.capacity:
            raise InputError("no such length", where="move", expected=f"{most} to {self.capacity}", found=length)
        end, self.length = self.length, max(self.length, length)
        for row, begin in enumerate(begins.tolist()):
            if begin < end:  # row for row: one row's copy at a time is little memory
                self.write(row, length - (end - begin), self.read(row, begin, end - begin))
        self.length = length

    def clear(self, row: int) -> None:
        """Empty the row: nothing attends to what its slots hold."""
        self.mask[row] = False

    def _require_slots(self, act: str, row: int, start: int, count: int) -> None:
        if not 0 <= row < self.batch or start < 0 or count < 1 or start + count > self.length:
            found = f"row {row}, slots {start} to {start + count}"
            expected = f"rows below {self.batch}, slots up to {self.length}"
            raise InputError("no such columns", where=act, expected=expected, found=found)

    # ---- what a wing that compiles asks for

    def _pad(self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int) -> tuple[Ids, Ids, Mask]:
        """The arrays of `_run` in a shape that is compiled for: columns rounded up, and a mask of all slots."""
        columns = token_ids.shape[1]
        excess = (0, 0), (0, round_up_columns(columns, self.slots - offset) - columns)
        all_slots = (0, 0), (0, self.slots - mask.shape[1])
        return np.pad(token_ids, excess), np.pad(position_ids, excess), np.pad(mask, all_slots)

    # ---- what a wing provides

    @abc.abstractmethod
    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        """Write n tokens' keys and values to slots `offset` to `offset + n - 1` and return their logits.

        Args:
            token_ids, position_ids: int64 (b, n), checked.
            mask: bool (b, capacity), these n slots included, later slots False. Query i sees slots up to offset + i
                that are True; a query that sees none is a fully masked row, defined as in a model call.
            offset: the first slot.
            last_only: logits (b, v) of the last position, else (b, n, v).
            want: "hidden_states", "attentions": what the Step holds besides.
        """

    def _run_together(self, runs: Sequence[Run]) -> list[Step]:
        """The steps of several decoders of one model, this one's the first; one after another, unless a wing can join.

        Joined, they read the weights once.
        """
        return [run.decoder._run(*run.arguments, last_only=run.last_only, want=frozenset()) for run in runs]

    @abc.abstractmethod
    def _gather(self, rows: NDArray[np.int64]) -> None:
        """Make the cache's row r what row `rows[r]` was, for every r."""

    def _read(self, row: int, start: int, count: int) -> Columns:
        """These columns of a row; a hook."""
        raise NotImplementedError(f"{type(self).__name__} has no rows that come and go")

    def _write(self, row: int, start: int, columns: Columns) -> None:
        """Put the columns into a row's slots from `start` on; what its other slots hold is lost. A hook."""
        raise NotImplementedError(f"{type(self).__name__} has no rows that come and go")

    def _filled(self, length: int) -> KVCache[Any] | None:
        """The first `length` slots, n_layer pairs of (b, h, length, d)."""
        return None

    def _forget(self, length: int) -> None:
        """Called before the slots from `length` on are given up. They are masked and overwritten: nothing to do."""
        return


@dataclasses.dataclass(frozen=True)
class Extension:
    """More tokens that a decoder is to take: the arguments of its `extend`.

    Attributes:
        decoder: which.
        token_ids: int64 (b, n).
        mask: bool (b, n), True where a column is a token. None: all are.
        last_only: logits (b, v) of the last position, else (b, n, v).
        slots: int64 (b,), where the first b rows, n = 1, are filled to lengths of their own: each row's token is at its
            own position, goes to the slot of that number, and sees those before it. The decoder's `length` and `mask`
            count for nothing, and stay as they are. None: all rows go on at `length`.
    """

    decoder: Decoder
    token_ids: Ids
    mask: Mask | None = None
    last_only: bool = True
    slots: Ids | None = None


class Run(NamedTuple):
    """An extension whose arguments are checked, as `Decoder._run` takes them; with `slots`, as a wing that joins."""

    decoder: Decoder
    token_ids: Ids
    position_ids: Ids
    mask: Mask
    offset: int
    last_only: bool
    slots: Ids | None = None

    @property
    def arguments(self) -> tuple[Ids, Ids, Mask, int]:
        """Those of `_run` without a name."""
        return self.token_ids, self.position_ids, self.mask, self.offset

    @property
    def end(self) -> int:
        """The slot after the last that is written."""
        return self.offset + (len(self.token_ids[0]) if self.slots is None else 0)


def extend_together(extensions: Sequence[Extension]) -> list[Step]:
    """Each extension's step; the decoders are of one model, whose weights are read once where its wing can.

    Where it raises, no decoder has grown, and the same may be tried again.

    Raises:
        InputError: see `Decoder.extend`.
    """
    first = extensions[0]
    if len(extensions) == 1 and first.slots is None and first.token_ids.shape[1] == 1:  # joined it would be padded
        return [first.decoder.extend(first.token_ids, first.mask, last_only=first.last_only)]
    runs = [
        one.decoder._checked(one.token_ids, one.mask, one.last_only)
        if one.slots is None
        else one.decoder._checked_rows(one.token_ids, one.slots)
        for one in extensions
    ]
    steps = runs[0].decoder._run_together(runs)
    for run in runs:
        run.decoder.length = run.end
    return steps


class Uncached(Decoder):
    """A decoder that computes every call from the first column, over another one that it empties each time.

    Slow, and the same: it is what `use_cache=False` means, and what a cache is tested against.
    """

    def __init__(self, inner: Decoder) -> None:
        super().__init__(inner.config, inner.batch, inner.capacity)
        self._inner = inner
        self._ids = np.zeros((inner.batch, inner.capacity), np.int64)

    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        count = token_ids.shape[1]
        end = offset + count
        self._ids[:, offset:end] = token_ids
        self._inner.truncate(0)
        step = self._inner.extend(self._ids[:, :end], mask[:, :end], want=want, last_only=last_only)
        return step.last(count)

    def _gather(self, rows: NDArray[np.int64]) -> None:
        self._inner.select(rows)
        self._ids = self._ids[rows]


DecoderFactory = Callable[[int, int], Decoder]
"""`decoder_factory(batch, capacity)`: an empty decoder of that size."""
