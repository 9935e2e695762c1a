"""Decoding: token ids to bytes, whole or piece by piece.

Decoding knows every id, or refuses it, or shows its number, as it is told; the library drops them in silence. So the
bytes of each id are kept in a list here, and decoding is a join and one UTF-8 decoding, which a stream does bit by bit.
"""

from __future__ import annotations

import codecs
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from gptj.errors import InputError, shown
from gptj.text.token_rows import one_of
from gptj.text.tokenizer_data import BYTE_OF_CHARACTER

__all__ = ["Decoder", "TextStream", "Unknown", "check_unknown", "plain_list"]

Unknown = Literal["refuse", "show", "replace"]
"""The ways to treat an id that the tokenizer does not have; see `GPTJTokenizer.decode`."""

_UNKNOWN = ("refuse", "show", "replace")


class TextStream:
    """Token ids in, text out, piece by piece, as they are generated; a character is never split.

    What `push` and then `finish` gave, joined, is what `decode` gives for all the ids. At most 3 bytes, a
    character's beginning, are held back.

    >>> tokenizer = GPTJTokenizer.gpt2()
    >>> stream = tokenizer.stream()
    >>> [stream.push(token) for token in tokenizer.encode("naïve 🤗")], stream.finish()
    (['na', 'ïve', ' ', '', '🤗'], '')
    """

    def __init__(self, to_bytes: Callable[[Any], bytes]) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Any) -> str:
        """The text that one id, or a list or array of ids, completes: often a word, sometimes nothing.

        Raises:
            InputError: an id is unknown. Then none of them is taken.
        """
        return self._decoder.decode(self._to_bytes(token_ids))

    def finish(self) -> str:
        """U+FFFD if a character was left unfinished, else nothing. After it the stream begins anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class Decoder:
    """Token ids to the bytes that they spell.

    Args:
        tokens: the token of each id, as the vocabulary spells it.
        added: those of them that are added, and spell themselves.
    """

    def __init__(self, tokens: Sequence[str], added: Collection[str]) -> None:
        self._bytes = [
            token.encode("utf-8") if token in added else bytes(BYTE_OF_CHARACTER[character] for character in token)
            for token in tokens
        ]

    def to_bytes(
        self, token_ids: Any, *, leave_out: Collection[int] = (), unknown: Unknown = "refuse", where: str = "token_ids"
    ) -> bytes:
        """The bytes that the ids spell, those in `leave_out` aside.

        Raises:
            InputError: an id that is unknown and not to be shown or replaced, or no token id at all.
        """
        check_unknown(unknown)
        ids = self.known_ids(token_ids, where=where, others=unknown != "refuse")
        if leave_out:
            ids = [token_id for token_id in ids if token_id not in leave_out]
        if unknown == "refuse":
            return b"".join([self._bytes[token_id] for token_id in ids])
        size, replaced = len(self._bytes), "\ufffd".encode()
        return b"".join(
            [
                self._bytes[token_id] if token_id < size else b"<|%d|>" % token_id if unknown == "show" else replaced
                for token_id in ids
            ]
        )

    def known_ids(self, token_ids: Any, *, where: str = "token_ids", others: bool = False) -> list[int]:
        """`token_ids` as Python's whole numbers, all of them ids of this tokenizer, or with `others` of any.

        Raises:
            InputError: one is none; its place is named.
        """
        plain = plain_list(token_ids, where=where)
        size = sys.maxsize if others else len(self._bytes)
        if all(type(one) is int and 0 <= one < size for one in plain):
            return plain
        ids = []
        for place, one in enumerate(plain):
            try:
                token_id = None if isinstance(one, bool) else operator.index(one)
            except TypeError:
                token_id = None
            name = where if np.isscalar(token_ids) else f"{where}[{place}]"
            if token_id is None:
                hint = "batch_decode takes several rows" if isinstance(one, list | tuple) else None
                raise InputError("not a token id", where=name, expected="a whole number", found=shown(one), hint=hint)
            if not 0 <= token_id < size:
                rule = "0 or above" if others else f"0 to {size - 1}"
                raise InputError("unknown token id", where=name, expected=rule, found=token_id)
            ids.append(token_id)
        return ids


def check_unknown(unknown: object) -> None:
    """Refuse what is no way to treat unknown ids."""
    one_of(unknown, _UNKNOWN, where="unknown")


def plain_list(value: Any, *, where: str) -> list[Any]:
    """A list of what `value` holds: one number, a sequence, or an array or tensor of any framework."""
    if isinstance(value, str | bytes | dict):
        raise InputError("not token ids", where=where, expected="whole numbers", found=shown(value, longest=80))
    if hasattr(value, "tolist"):
        value = value.tolist()
    elif hasattr(value, "numpy"):  # a TensorFlow tensor
        value = value.numpy().tolist()
    if isinstance(value, list):
        return value
    return list(value) if isinstance(value, Iterable) else [value]
