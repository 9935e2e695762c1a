"""One thread that owns the model: it reads prompts, steps the running rows, and tells who listens.

Between two steps everything may change: a row that ended is free at once, so is that of a client who left, and who
waits takes it. A turn makes one step of all running rows, and reads some of a waiting prompt beside it, or of several
where a wing joins calls: where all rows are taken that of the text that is next to have one, so that no row stands idle
while it is read.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from gptj.errors import GPTJError
from gptj.generation import Columns, DecoderFactory, Extension, Step, extend_together
from gptj.generation.decoder import PIECE, round_up
from gptj.serving.apart import RowsApart
from gptj.serving.batch import RunningBatch, slots_of
from gptj.serving.continuation import Continuation
from gptj.serving.metrics import Metrics
from gptj.serving.prefill import FEWEST, MOST, MOST_PROMPTS, Pace, Prefill, Prompt, Spare
from gptj.serving.prefixes import PrefixStore

__all__ = ["Closed", "Engine", "Full"]

T = TypeVar("T")


class Full(GPTJError):
    """The error of a full queue."""


class Closed(GPTJError):
    """The error of an engine that is being closed."""


class Engine:
    """Continues prompts, many at a time.

    Args:
        model: a causal language model of any backend.
        most_rows: continued at once at most.
        most_waiting: continuations that may wait for a row.
        prefix_tokens: of prompts that are kept for others that begin alike.
        metrics: is told what happens.
        within: gives the context that the thread runs in, such as a device's.
        use_adapter: brings an adapter of the model into use; None where there are none.

    Attributes:
        met_slots: the largest cache that is compiled; a prompt or a text that needs a larger one waits while others
            are there. None: nothing waits for a compiler.
    """

    def __init__(
        self,
        model: Any,
        *,
        most_rows: int = 8,
        most_waiting: int = 256,
        prefix_tokens: int = 8192,
        metrics: Metrics | None = None,
        within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        use_adapter: Callable[[str | None], None] | None = None,
    ) -> None:
        self.model_config = model.config
        self.make_decoder: DecoderFactory = model._decoder
        self._joins: bool = model._joins_calls
        self.most_rows, self.most_waiting = most_rows, most_waiting
        self.metrics = metrics or Metrics()
        self.within, self._use_adapter = within, use_adapter
        self._adapter_in_use: object = object()
        self._prefixes = PrefixStore(prefix_tokens)
        self._pace, self._spare = Pace(PIECE if self._joins else FEWEST), Spare()
        self._changed = threading.Condition()
        self._waiting: deque[Continuation] = deque()
        self._prefills: deque[Prefill] = deque()
        self._batches: dict[str | None, RunningBatch | RowsApart] = {}
        self._errands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.met_slots: int | None = None
        self.metrics.gauges |= {
            "gptj_rows_running": lambda: self.running,
            "gptj_rows_most": lambda: self.most_rows,
            "gptj_waiting": lambda: self.waiting,
        }

    # ---- for others' threads

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._work, name="gptj-engine", daemon=True)
        self._thread.start()

    def submit(self, continuations: Sequence[Continuation]) -> None:
        """Take continuations, all or none; their listeners are told how they go.

        Raises:
            Full: too many wait.
            Closed: the engine is being closed.
        """
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            if len(self._waiting) + len(continuations) > self.most_waiting:
                raise Full("too many requests are waiting", found=len(self._waiting), hint="Try again later")
            self._waiting.extend(continuations)
            self._changed.notify()

    def wake(self) -> None:
        """Look at once whether a client has left."""
        with self._changed:
            self._changed.notify()

    def forget(self) -> None:
        """Begin the counts and the prefixes anew; nobody may be there."""
        self.metrics.clear()
        self._prefixes = PrefixStore(self._prefixes.most_tokens)

    def rehearse(self, run: Callable[[DecoderFactory], Iterable[T]], adapter: str | None) -> Iterator[T]:
        """The items of `run`, one after another, computed in the engine's thread with an adapter's decoders.

        Raises:
            Exception: what `run` raises.
            Closed: the engine is being closed.
        """
        steps: Iterator[T] | None = None

        def advance() -> list[T]:
            nonlocal steps
            steps = iter(run(self._decoder_of(adapter))) if steps is None else steps
            return [*itertools.islice(steps, 1)]

        while found := self._between_turns(advance):
            yield found[0]

    def make_decoder_of(self, adapter: str | None, batch: int, capacity: int) -> Any:
        """An empty decoder that computes with an adapter, to be run in any thread where a wing compiles.

        It is made in the engine's thread: only there may another adapter be brought into use.

        Raises:
            Closed: the engine is being closed.
        """
        if self._use_adapter is None:
            return self.make_decoder(batch, capacity)
        return self._between_turns(lambda: self._decoder_of(adapter)(batch, capacity))

    def _between_turns(self, work: Callable[[], T]) -> T:
        """The work's result, done in the engine's thread."""
        done: Future[T] = Future()

        def errand() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._errands.append(errand)
            self._changed.notify()
        return done.result()

    def close(self, timeout: float | None = None) -> bool:
        """Take no more, finish what there is, and return whether it was finished in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many have a row, or their prompt is being read."""
        rows = sum(len(batch) + len(batch.aside) for batch in list(self._batches.values()))
        return rows + sum(prefill.rows for prefill in list(self._prefills))

    # ---- the engine's thread

    def _work(self) -> None:
        with self.within():
            while True:
                with self._changed:
                    while not (self._waiting or self.running or self._errands or self._closing):
                        self._changed.wait()
                    errand = self._errands.popleft() if self._errands else None
                    if self._closing and errand is None and not (self._waiting or self.running):
                        return
                if errand is not None:
                    errand()
                    continue
                try:
                    self.turn()
                except Exception as error:  # a mistake of this file: whoever is there is told, and it goes on
                    self._abandon(error)

    def turn(self) -> None:
        """Admit what waits, read some of its prompts, and make the next token of every running row."""
        self._drop_those_who_left()
        self._take_back()
        self._admit()
        read = self._next_pieces()
        of_prompts = [prefill.adapter for prefill, _ in read[:1]]
        for adapter in dict.fromkeys([*of_prompts, *self._batches]):
            self._advance(adapter, read if adapter in of_prompts else [])

    def _drop_those_who_left(self) -> None:
        with self._changed:
            left = [one for one in self._waiting if one.left]
            for one in left:
                self._waiting.remove(one)
        for prefill in list(self._prefills):
            for prompt in prefill.prompts:
                left += [one for one in prompt.continuations if one.left]
                prompt.continuations = [one for one in prompt.continuations if not one.left]
            if not prefill.rows:
                self._prefills.remove(prefill)
        for batch in self._batches.values():
            for one in [one for one in batch.continuations if one.left]:
                batch.leave(one)
                left.append(one)
            left += [one for one, _ in batch.aside if one.left]
            batch.aside = [pair for pair in batch.aside if not pair[0].left]
        for one in left:
            one.ended = True
        self.metrics.add("gptj_cancelled_total", len(left))

    def _take_back(self) -> None:
        """Go on with texts that waited for a larger cache or a row."""
        for batch in self._batches.values():
            if ready := batch.take_ready(self._free):
                self._join(batch, ready)

    def _join(self, batch: RunningBatch | RowsApart, newcomers: list[tuple[Continuation, Columns]]) -> None:
        try:
            batch.join(newcomers)
        except Exception as error:
            self._fail([*batch.clear(), *(one for one, _ in newcomers)], error)

    def _limit(self) -> int | None:
        """The largest cache to be made now: what is compiled, where others would have to wait for a compiler."""
        met = self.met_slots
        if met is None or self._prefills:
            return met
        rows = (one for batch in self._batches.values() for one in batch.continuations)
        return met if any(one.cached < met for one in rows) else None

    def _admit(self) -> None:
        """Begin to read the prompts that there are rows for, or that of the first to have the next row."""
        while (room := self._room()) > 0 and (first := self._next()) is not None:
            prompts = self._gather(first, room)
            make = self._spare.before(first.adapter, self._decoder_of(first.adapter))
            try:
                self._prefills.append(Prefill(make, self.model_config, prompts))
            except Exception as error:
                self._fail((one for prompt in prompts for one in prompt.continuations), error)

    @property
    def _free(self) -> int:
        """The rows that no text has."""
        return self.most_rows - sum(map(len, self._batches.values()))

    def _room(self) -> int:
        """The texts whose prompts may be read now: those that there are rows for, and one where all are taken."""
        room = self.most_rows - self.running
        return 1 if not room and not self._free else room

    def _next(self) -> Continuation | None:
        """The first that waits and whose size is compiled already, so that nobody waits for a compiler."""
        with self._changed:
            return next((one for one in self._waiting if not self.running or self._is_met(one)), None)

    def _is_met(self, one: Continuation) -> bool:
        """Whether every program for the caches of a prompt has been compiled."""
        met = self.met_slots
        return met is None or slots_of(self.model_config, len(one.prompt)) <= met

    def _gather(self, first: Continuation, free: int) -> list[Prompt]:
        """The prompts to read together: the first, and those that wait and are as soon read with it."""
        tokens = self._tokens_a_turn()
        with self._changed:
            self._waiting.remove(first)
            prompts = [Prompt(first, self._prefix(first))]
            most_unread, rows = round_up(prompts[0].unread, MOST, fewest=FEWEST), 1
            for one in list(self._waiting):
                if rows == free:
                    break
                if not self._is_met(one) and len(one.prompt) > len(first.prompt):
                    continue
                same = next((prompt for prompt in prompts if prompt.is_same(one)), None)
                if same is not None:
                    same.continuations.append(one)
                elif self._has_place(prompts, (len(prompts) + 1) * most_unread <= tokens):
                    prompt = Prompt(one, self._prefix(one))
                    if prompt.scores is not None or prompt.adapter != first.adapter or prompt.unread > most_unread:
                        continue
                    prompts.append(prompt)
                else:
                    continue
                self._waiting.remove(one)
                rows += 1
        return prompts

    def _has_place(self, prompts: Sequence[Prompt], fits: bool) -> bool:
        """Whether another prompt may be read with these, where it is short enough; a scored one is read alone."""
        return fits and not self._joins and len(prompts) < MOST_PROMPTS and prompts[0].scores is None

    def _prefix(self, one: Continuation) -> tuple[Columns, int] | None:
        return None if one.scores_prompt else self._prefixes.find(one.prompt, one.adapter)

    def _tokens_a_turn(self) -> int:
        """How many tokens of prompts to read until the next step: many where nobody waits for that."""
        return self._pace.tokens if any(map(len, self._batches.values())) else MOST

    def _next_pieces(self) -> list[tuple[Prefill, Extension]]:
        """The prompts whose turn it is, of one adapter, with the columns of each to read."""
        tokens = self._tokens_a_turn()
        found: list[tuple[Prefill, Extension]] = []
        for prefill in self._prefills:
            if found and (
                not prefill.decoder.joins or tokens < prefill.fewest or prefill.adapter != found[0][0].adapter
            ):
                break
            piece = prefill.extension(tokens)
            found.append((prefill, piece))
            tokens -= piece.token_ids.size
        self._prefills.rotate(-len(found))
        return found

    def _advance(self, adapter: str | None, read: Sequence[tuple[Prefill, Extension]]) -> None:
        """One pass of the model with an adapter: a step of the running rows, beside it pieces of prompts."""
        batch, clock = self._batches.get(adapter), self._pace.clock
        others_wait, begin = any(map(len, self._batches.values())), clock()
        rows = self._rows_to_step(batch)
        shape = None if batch is None or rows is None else batch.shape
        asked = [*([] if rows is None else [rows]), *(piece for _, piece in read)]
        if not asked:
            return
        steps = self._extend(adapter, asked)
        if rows is not None:
            assert batch is not None
            self._share(batch, steps[0])
        for (prefill, _), step in zip(read, steps[len(steps) - len(read) :], strict=True):
            self._take(prefill, step, waits=others_wait)
        seconds = clock() - begin  # a device computes on after the call, until its result is needed
        if rows is not None:
            self.metrics.observe("gptj_step_seconds", seconds)
        if others_wait:
            self._learn(seconds, shape, [piece for _, piece in read])

    def _learn(self, seconds: float, step: tuple[int, int] | None, pieces: Sequence[Extension]) -> None:
        """Learn from a pass what a step takes, or by how much pieces of prompts delayed the running rows."""
        if not pieces:
            self._pace.note_step(step, seconds)
            return
        of_step = 0.0 if step is None else self._pace.step_s(step)
        if of_step is not None:
            tokens = sum(piece.token_ids.size for piece in pieces)
            shapes = {(one.decoder.batch, round_up(one.token_ids.shape[1], MOST), one.decoder.slots) for one in pieces}
            self._pace.note_prompt((step, frozenset(shapes)), tokens, seconds - of_step)

    def _rows_to_step(self, batch: RunningBatch | RowsApart | None) -> Extension | None:
        if batch is None or not len(batch):
            return None
        try:
            return batch.extension()
        except Exception as error:
            self._fail(batch.clear(), error)
            return None

    def _extend(self, adapter: str | None, asked: Sequence[Extension]) -> list[Step | Exception]:
        """The step of each, or its own error."""
        try:
            self._select_adapter(adapter)
            return [*extend_together(asked)]
        except Exception as error:
            if len(asked) == 1:
                return [error]
            return [found for one in asked for found in self._extend(adapter, [one])]

    def _share(self, batch: RunningBatch | RowsApart, step: Step | Exception) -> None:
        """Choose the next token of each running row."""
        if isinstance(step, Exception):
            self._fail(batch.clear(), step)
            return
        for one, its in batch.share(step):
            self._choose(one, its)
            if one.ended:
                batch.leave(one)

    def _take(self, prefill: Prefill, step: Step | Exception, *, waits: bool) -> None:
        """Take note of what was read of a prompt; give its continuations their rows when all is read."""
        try:
            if isinstance(step, Exception):
                raise step
            prefill.take(step)
            if waits:
                prefill.wait()
            if prefill.is_done:
                self._seat(prefill)
                self._prefills.remove(prefill)
                if not any(one.failed for prompt in prefill.prompts for one in prompt.continuations):
                    self._spare.keep(prefill.adapter, prefill.decoder)
        except Exception as error:
            self._prefills.remove(prefill)
            self._fail((one for prompt in prefill.prompts for one in prompt.continuations), error)

    def _seat(self, prefill: Prefill) -> None:
        """Choose the first token of each continuation, and give a row to those that go on."""
        newcomers = []
        for row, prompt in enumerate(prefill.prompts):
            step, columns = prefill.result(row)
            if prompt.scores is None:
                self._prefixes.keep(prompt.ids, columns, prompt.adapter)
            for number, one in enumerate(prompt.continuations):
                one.reused = len(prompt.ids) if number else one.reused  # the first's were read for all
                if not one.is_copy:
                    self.metrics.add("gptj_prompt_tokens_total", len(prompt.ids))
                    self.metrics.add("gptj_prompt_tokens_reused_total", one.reused)
                if one.scores_prompt:
                    one.tell_scores(prefill.scores)
                self._choose(one, step)
                if not one.ended:
                    newcomers.append((one, columns))
        if newcomers:
            free = self._free
            batch = self._batches.get(prefill.adapter)
            if batch is None:
                make, config, most = self._decoder_of(prefill.adapter), self.model_config, self.most_rows
                batch = RowsApart(make, config, most) if self._joins else RunningBatch(make, config, most, self._limit)
                self._batches[prefill.adapter] = batch
            batch.aside += newcomers[free:]
            self._join(batch, newcomers[:free])

    def _choose(self, one: Continuation, step: Any) -> None:
        try:
            if one.choose(step) is not None:
                self.metrics.add("gptj_generated_tokens_total", 1)
        except Exception as error:
            one.fail(error)

    def _fail(self, continuations: Iterable[Continuation], error: Exception) -> None:
        for one in continuations:
            if not one.ended:
                one.fail(error)

    def _abandon(self, error: Exception) -> None:
        """Fail all, and begin anew."""
        with self._changed:
            there = [*self._waiting]
            self._waiting.clear()
        there += [one for prefill in self._prefills for prompt in prefill.prompts for one in prompt.continuations]
        there += [one for batch in self._batches.values() for one in batch.clear()]
        self._prefills.clear()
        self._batches.clear()
        self._fail(there, error)

    def _decoder_of(self, adapter: str | None) -> DecoderFactory:
        def make(batch: int, capacity: int) -> Any:
            self._select_adapter(adapter)
            return self.make_decoder(batch, capacity)

        return make

    def _select_adapter(self, adapter: str | None) -> None:
        if self._use_adapter is not None and adapter != self._adapter_in_use:
            self._adapter_in_use = object()  # not known, should the next line fail
            self._use_adapter(adapter)
            self._adapter_in_use = adapter
