"""Turn by turn: each line that is typed is continued, by a model that has read all lines before it."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import click

from gptj.command.continuation import pieces
from gptj.command.opened_model import OpenedModel, Request
from gptj.command.prompts import Prompt, read_turns
from gptj.errors import InputError
from gptj.generation import Conversation, GenerationConfig
from gptj.generation.sampling import SEEDS

__all__ = ["converse"]

WELCOME = """What you type is continued. A line that ends in \\ goes on in the next.
Ctrl-C stops an answer; an empty line or Ctrl-D ends."""


def converse(
    request: Request, prompts: Sequence[Prompt], *, write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Join each line of stdin to the text so far, and continue it; the model reads only the new tokens.

    An empty line, or the end of stdin, ends it. Ctrl-C ends the present answer, a second one all.

    Args:
        request: how.
        prompts: the first turns.
        write: takes text, as soon as there is some.
        note: takes a line for the person at the terminal.

    Raises:
        InputError: the context is full, or a strategy that knows its tokens only at the end.
    """
    opened = OpenedModel(request, needs_tokenizer=True)
    with opened.at_work():
        _converse(opened, opened.load(math.inf).conversation(), prompts, write=write, note=note)


def _converse(
    opened: OpenedModel,
    conversation: Conversation,
    prompts: Sequence[Prompt],
    *,
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    request, config = opened.request, opened.config
    if _at_a_terminal():
        note(WELCOME)
    said = (str(prompt.text) for prompt in prompts)
    for number, text in enumerate(itertools.chain(said, _read_typed_turns())):
        if not text:
            return
        ids, fitting = fit_turn(opened, conversation, opened.encode(text), config)
        if number < len(prompts):
            write(text)
        steps = conversation.stream(
            ids,
            fitting,
            seed=(opened.seed + number) % SEEDS,
            logits_processor=opened.processors(fitting),
            tokenizer=opened.tokenizer,
        )
        with interruptible() as interrupted:
            for piece in pieces(steps, opened.decoder(), config, interrupted):
                write(piece)
        write("\n")
        if len(conversation.ids) >= opened.limit(config) and not request.truncate:
            note(f"The context is full: {len(conversation.ids)} of {opened.limit(config)} tokens.")


def fit_turn(
    opened: OpenedModel, conversation: Conversation, ids: list[int], config: GenerationConfig
) -> tuple[list[int], GenerationConfig]:
    """The turn's tokens, and `config` with as many new ones as have room; where asked for, the oldest are forgotten.

    Raises:
        InputError: there is room for none.
    """
    limit = opened.limit(config)
    if opened.request.truncate:
        whole = [*conversation.ids, *ids][-opened.prompt_limit(config) :]
        ids = ids[-len(whole) :]
        conversation.ids = whole[: len(whole) - len(ids)]
    room = limit - len(conversation.ids) - len(ids)
    if room < 1:
        raise InputError(
            "the context is full",
            where="conversation",
            expected=f"at most {limit - 1} tokens before the next one",
            found=f"{len(conversation.ids)} and {len(ids)} new",
            hint="Say --truncate left to forget the oldest",
        )
    return ids, config.replace(max_new_tokens=min(config.max_new_tokens or room, room))


def _at_a_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _read_typed_turns() -> Iterator[str]:
    """The turns that are typed, one at a time: with a line editor on a terminal, else the lines of stdin."""
    if not _at_a_terminal():
        yield from read_turns()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input uses it once it is imported)
    while True:
        turn = ""
        try:
            turn = input("> ")
            while turn.endswith("\\"):
                turn = turn[:-1] + "\n" + input("… ")
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo()
            return
        yield turn


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C, so that the function which this gives returns True; a second one interrupts."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
