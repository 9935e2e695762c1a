"""The first requests, made by the server itself, so that a backend that compiles has done so before others ask."""

from __future__ import annotations

import threading

import numpy as np

from gptj.generation import GenerationConfig
from gptj.generation.session import prepare
from gptj.serving.batch import power_of_two
from gptj.serving.continuation import Continuation, Failed, Piece, Scored, Transcript, no_decoder
from gptj.serving.engine import Engine

__all__ = ["warm_up"]

_LONGEST = 256
"""Tokens of the longest prompt that is tried; what is longer compiles when it comes."""


def warm_up(engine: Engine) -> None:
    """Let a running engine continue as many at once as it can, and prompts of some lengths; nothing of it is counted.

    Raises:
        Exception: what the model raised.
    """
    positions = engine.model_config.n_positions
    count = 1
    while True:
        _run(engine, [5] * count)
        if count == engine.most_rows:
            break
        count = power_of_two(count + 1, engine.most_rows)
    width = 16
    while width <= min(_LONGEST, positions - 4):
        _run(engine, [width])
        width *= 2
    engine.forget()


class _Silent:
    """A text that nobody reads."""

    def push(self, token_ids: object) -> str:
        """Nothing."""
        return ""

    def finish(self) -> str:
        """Nothing."""
        return ""


def _run(engine: Engine, lengths: list[int]) -> None:
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
        made.append(Continuation(ids[0], session, Transcript(_Silent()), listen))
    engine.submit(made)
    for _ in made:
        done.acquire()
    if failed:
        raise failed[0]
