"""Every size that an engine may meet, computed once before others ask, so that nobody waits for a compiler.

XLA compiles a program for each number of rows, each width of a piece of a prompt and each size of a cache. The engine
asks for powers of two alone, so they are a few hundred, of a block each, which the layers share. What compiles in the
engine's thread holds all requests up for many steps. So the smallest caches are met before the first request, larger
ones in a thread of their own while the engine works; until then, a prompt that needs one waits without the others.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gptj.config import GPTJConfig
from gptj.generation import Columns, DecoderFactory, GenerationConfig
from gptj.generation.session import prepare
from gptj.serving.batch import choose_slots, power_of_two
from gptj.serving.continuation import Continuation, Failed, Piece, Scored, Transcript, no_decoder
from gptj.serving.engine import Closed, Engine
from gptj.serving.prefill import FEWEST, MOST, MOST_PROMPTS

__all__ = ["Size", "sizes", "warm_up", "warm_up_behind"]

_log = logging.getLogger("gptj.serving")

Size = tuple[int, int]
"""Rows and slots of a cache."""


def sizes(config: GPTJConfig, most_rows: int) -> list[Size]:
    """The caches that an engine of so many rows may make: those of its rows, and those of prompts that are read.

    >>> sizes(GPTJConfig(n_positions=512), 3)
    [(1, 256), (2, 256), (3, 256), (4, 256), (1, 512), (2, 512), (3, 512), (4, 512)]
    """
    rows = {power_of_two(count, most_rows) for count in range(1, most_rows + 1)}
    rows |= {power_of_two(count, MOST_PROMPTS) for count in range(1, min(most_rows, MOST_PROMPTS) + 1)}
    slots = {choose_slots(config, tokens) for tokens in range(1, config.n_positions + 1)}
    return [(batch, count) for count in sorted(slots) for batch in sorted(rows)]


def widths(rows: int, slots: int) -> list[int]:
    """The pieces of prompts in so many rows, whose cache has so many slots: none for rows that are only stepped."""
    if rows > MOST_PROMPTS:
        return []
    return [width for n in range(MOST.bit_length()) if FEWEST <= (width := 1 << n) <= min(MOST // rows, slots)]


def warm_up(engine: Engine, say: Callable[[str], None] = lambda doing: None, *, adapter: str | None = None) -> None:
    """Let a running engine meet the smallest cache, and continue as many at once as it can; nothing of it is counted.

    Args:
        engine: which waits meanwhile.
        say: told how far it is.
        adapter: which of the model's adapters computes; None for none.

    Raises:
        Exception: what the model raised.
    """
    found = sizes(engine.model_config, engine.most_rows)
    found = [size for size in found if size[1] == found[0][1]]

    def meet(make: DecoderFactory) -> Iterator[str]:
        kept: dict[int, Columns] = {}
        for rows, slots in found:
            yield f"{rows} rows of {slots} tokens"
            _meet(make, rows, slots, kept)

    for number, doing in enumerate(engine.rehearse(meet, adapter), 1):
        say(f"compiling {doing}, {number} of {len(found)}")
    count = 1
    while True:
        _run(engine, [5] * count, adapter)
        if count == engine.most_rows:
            break
        count = power_of_two(count + 1, engine.most_rows)
    engine.forget()


def warm_up_behind(
    engine: Engine, adapters: Sequence[str] = (), *, free_bytes: Callable[[], int | None] = lambda: None
) -> threading.Thread:
    """Let an engine meet the larger caches, too, in the thread that is returned, while it works.

    Until then prompts that need one wait for it, unless nobody else is there. A cache that would take a quarter of the
    memory that is free is left to the first prompt that needs it.

    Args:
        engine: which works meanwhile.
        adapters: of the model, which are served beside it, and whose programs may be others.
        free_bytes: gives the memory that is free now; None where nobody knows.
    """
    config = engine.model_config
    found = sizes(config, engine.most_rows)
    engine.met_slots = found[0][1]
    of_token = 8 * config.n_layer * config.n_embd  # bytes of a key and a value, in float32

    def meet() -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        kept: dict[int, Columns] = {}
        try:
            for slots, those in itertools.groupby(found, lambda size: size[1]):
                for (rows, _), adapter in itertools.product(those, (None, *adapters)):
                    free = free_bytes()
                    if engine.is_closing or (free is not None and 4 * rows * slots * of_token > free):
                        continue
                    with engine.within():
                        _meet(functools.partial(engine.make_decoder_of, adapter), rows, slots, kept)
                engine.met_slots = slots
                engine.wake()
        except Closed:
            return
        except Exception as error:  # whoever needs that size will meet the same, and be told
            _log.warning("a size was not compiled ahead", exc_info=error)
        finally:
            engine.met_slots = None
            engine.wake()

    thread = threading.Thread(target=meet, name="gptj-compiling", daemon=True)
    thread.start()
    return thread


def _meet(make: DecoderFactory, rows: int, slots: int, kept: dict[int, Columns]) -> None:
    """Compute a step and every piece over a cache, at its beginning and behind something, and move columns."""
    decoder = make(rows, slots)
    for width in [1, *widths(rows, slots)]:
        ids = np.zeros((rows, width), np.int64)
        for start in (0, width):
            if start + width <= slots:
                decoder.restart(start)
                decoder.extend(ids, last_only=True)
                if rows == 1 and width > 1:
                    decoder.restart(start)
                    decoder.extend(ids, last_only=False)  # a prompt that is scored
    decoder.restart(slots)
    for count in sorted({power_of_two(count, slots) for count in range(1, slots + 1)}):
        moved = decoder.read(0, 0, count)
        decoder.write(0, 0, kept.setdefault(moved.keys[0].shape[1], moved), count)


class _Silent:
    """A text decoder that makes no text."""

    def push(self, token_ids: object) -> str:
        """Nothing."""
        return ""

    def finish(self) -> str:
        """Nothing."""
        return ""


def _run(engine: Engine, lengths: list[int], adapter: str | None) -> None:
    """Continue prompts of these lengths, and wait for them."""
    done = threading.Semaphore(0)
    failed: list[BaseException] = []

    def listen(told: Piece | Scored | Failed) -> None:
        if isinstance(told, Failed):
            failed.append(told.error)
        if isinstance(told, Failed) or (isinstance(told, Piece) and told.finish is not None):
            done.release()

    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, remove_invalid_values=True)
    made = []
    for number, length in enumerate(lengths):
        ids = np.full((1, length), number % engine.model_config.vocab_size, np.int64)
        session = prepare(no_decoder, ids, model_config=engine.model_config, generation_config=config)
        made.append(Continuation(ids[0], session, Transcript(_Silent()), listen, adapter=adapter))
    engine.submit(made)
    for _ in made:
        done.acquire()
    if failed:
        raise failed[0]
