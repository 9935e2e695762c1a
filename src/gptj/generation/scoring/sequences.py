"""Texts and continuations as token ids to be scored: how they are encoded, and what the first token comes after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gptj.calls.inputs import check_ids, check_method, check_row
from gptj.config import GPTJConfig
from gptj.errors import InputError, shown

__all__ = ["Prefix", "Sequenced", "encode_pair", "prefix_of", "sequence_of", "sequences_of"]

Prefix: TypeAlias = int | Literal["bos"] | None
"""The token that stands before a text: an id, "bos" for the config's bos or else its eos, None for none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequenced:
    """Tokens of which those from one place on are scored.

    Attributes:
        token_ids: int64 (n,), what is read before, and what is scored.
        first: the place of the first token that is scored, at least 1.
        n_bytes: of the text that is scored, in UTF-8; None where it is not known.
    """

    token_ids: NDArray[np.int64]
    first: int
    n_bytes: int | None

    @classmethod
    def of(cls, before: Sequence[int], scored: Sequence[int], n_bytes: int | None = None) -> Sequenced:
        """The sequence of these tokens, the second of which are scored: without their first, where none is before."""
        return cls(np.array([*before, *scored], np.int64), max(1, len(before)), n_bytes)


def sequences_of(
    config: GPTJConfig, texts: Any, continuations: Any, tokenizer: Any, prefix_token_id: Prefix
) -> list[Sequenced]:
    """The sequences of the arguments of `score`, one a text.

    Raises:
        InputError: an argument breaks its rule; the message names the text by its number.
    """
    check_method(tokenizer, "encode", where="tokenizer")
    prefix = prefix_of(config, prefix_token_id)
    first = _items(texts, "texts")
    if continuations is None:
        return [
            sequence_of(config, text, where=f"texts[{n}]", tokenizer=tokenizer, prefix=prefix)
            for n, text in enumerate(first)
        ]
    then = _items(continuations, "continuations")
    if len(then) != len(first):
        raise InputError("not one a text", where="continuations", expected=len(first), found=len(then))
    return [
        sequence_of(
            config, *pair, where=f"continuations[{n}]", before=f"texts[{n}]", tokenizer=tokenizer, prefix=prefix
        )
        for n, pair in enumerate(zip(first, then, strict=True))
    ]


def sequence_of(
    config: GPTJConfig,
    text: Any,
    continuation: Any = None,
    *,
    where: str,
    before: str = "context",
    tokenizer: Any,
    prefix: int | None,
) -> Sequenced:
    """The sequence of a text, or of a text and its continuation.

    Args:
        config: whose token ids these are.
        text, continuation: text or token ids.
        where, before: the names of what is scored, and of what a continuation comes after, in errors.
        tokenizer: its `encode` makes token ids of texts.
        prefix: the token before a text; None for none.
    """
    if continuation is None:
        return _of_text(config, text, where, tokenizer, prefix)
    return _of_pair(config, (text, continuation), (before, where), tokenizer, prefix)


def prefix_of(config: GPTJConfig, prefix_token_id: Prefix) -> int | None:
    """The id of the token before a text.

    Raises:
        InputError: no such token.
    """
    if prefix_token_id is None:
        return None
    if prefix_token_id == "bos":
        named = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        prefix_token_id = named[0] if isinstance(named, list | tuple) else named
        if prefix_token_id is None:
            hint = "Pass the id of one, or None to leave each text's first token out of its score"
            raise InputError("the config has neither bos nor eos", where="prefix_token_id", hint=hint)
    if isinstance(prefix_token_id, bool) or not isinstance(prefix_token_id, int | np.integer):
        expected = 'a token id, "bos" or None'
        raise InputError("no token id", where="prefix_token_id", expected=expected, found=shown(prefix_token_id))
    return int(check_ids(config, [[int(prefix_token_id)]], where="prefix_token_id")[0, 0])


def _items(value: Any, where: str) -> list[Any]:
    """The texts or rows of an argument: of one text, of a list of texts or rows, or of an array (b, t)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes | Mapping) or value is None:
        raise InputError("no texts", where=where, expected="a text, token ids, or a list of them", found=shown(value))
    items = check_row(value.tolist() if isinstance(value, np.ndarray) else value, where=where)
    if not items:
        raise InputError("no text", where=where, expected="at least one", found=shown(value))
    if all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in items):
        return [items]  # one row of token ids
    return items


def _of_text(config: GPTJConfig, text: Any, where: str, tokenizer: Any, prefix: int | None) -> Sequenced:
    ids = _encode(config, text, where, tokenizer)
    if prefix is None:  # the first token is context alone
        return Sequenced.of([], ids, _spelt(ids[1:], tokenizer))
    return Sequenced.of([prefix], ids, len(text.encode()) if isinstance(text, str) else _spelt(ids, tokenizer))


def _of_pair(
    config: GPTJConfig, pair: tuple[Any, Any], names: tuple[str, str], tokenizer: Any, prefix: int | None
) -> Sequenced:
    where = names[1]
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        raise InputError("text beside token ids", where=where, hint="Give context and continuation in the same form")

    def encode_each() -> list[list[int]]:
        return [_encode(config, one, name, tokenizer) for one, name in zip(pair, names, strict=True)]

    if isinstance(pair[0], str):
        try:
            context, scored = encode_pair(lambda text: _encode(config, text, where, tokenizer), *pair)
        except InputError:
            encode_each()  # says which of the two it is, and the place in it
            raise
    else:
        context, scored = encode_each()
    if not scored:
        hint = "Its text may be a part of the context's last token: move the border to one between words"
        raise InputError("no token of its own", where=where, found=shown(pair[1]), hint=hint if pair[1] else None)
    if not context:
        if prefix is None:
            raise InputError("nothing comes before it", where=where, hint="Pass a context, or a prefix_token_id")
        if scored[0] != prefix:
            context = [prefix]
        elif len(scored) > 1:
            context, scored = scored[:1], scored[1:]
        else:
            raise InputError("nothing but the token that stands before a text", where=where, found=scored)
    return Sequenced.of(context, scored, _spelt(scored, tokenizer))


def _spelt(ids: Sequence[int], tokenizer: Any) -> int | None:
    """The bytes that token ids stand for; None where the tokenizer does not say, or does not know one of them."""
    id_to_bytes = getattr(tokenizer, "id_to_bytes", None)
    if id_to_bytes is None or any(token >= len(tokenizer) for token in ids):
        return None
    return sum(len(id_to_bytes(token)) for token in ids)


def encode_pair(encode: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of its continuation, where those of both together are cut.

    Spaces at the end of the context belong to the continuation, whose first word's token they are a part of; so it
    is in lm-evaluation-harness.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    before: list[int] = encode(context)
    return before, encode(context + continuation)[len(before) :]


def _encode(config: GPTJConfig, text: Any, where: str, tokenizer: Any) -> list[int]:
    """The checked token ids of a text or a row."""
    if isinstance(text, str):
        if tokenizer is None:
            hint = "Pass tokenizer=..., or token ids"
            raise InputError("text, and no tokenizer", where=where, found=shown(text, longest=40), hint=hint)
        try:
            ids: Any = [int(token) for token in tokenizer.encode(text)]
        except InputError as error:  # the tokenizer does not know what the text is called here
            raise InputError(error.problem, **error.facts(where=where)) from None
    else:
        ids = text
    if not isinstance(ids, list | tuple):
        raise InputError("not a row of token ids", where=where, expected="[id, ...]", found=shown(text))
    if not ids:
        return []
    try:
        return [int(token) for token in check_ids(config, [[*ids]], where=where)[0]]
    except InputError as error:  # of a batch of this one row
        place = None if error.where is None else error.where.replace(f"{where}[0]", where)
        raise InputError(error.problem, **error.facts(where=place)) from None
