"""Encoding: texts to rows of token ids, over the `tokenizers` library.

Two pipelines share one model, one of them without the added tokens: the library's own switch
(`encode_special_tokens`) leaves the 143 extra tokens matched. Long texts are cut at places that change nothing
(`text_pieces`), and each different word is encoded once.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gptj.errors import InputError
from gptj.text.pieces import text_pieces, text_words
from gptj.text.token_rows import NamedText, Row
from gptj.text.tokenizer_data import BYTE_OF_CHARACTER, AddedToken, TokenizerData

__all__ = ["Encoder", "learn_merges"]

# The library takes 2.8 times as long with pieces of 128,000 characters as with 8,000 to 32,000, and its own records of
# 256,000 characters take about 10 MB.
_PIECE_CHARACTERS = 16_000
_BATCH_CHARACTERS = 256_000

# From how many characters on a batch is encoded word by word. Shorter ones go to the library as they are, in one call
# that wakes no threads of it.
_WORDS_CHARACTERS = 4_096
# About 10 MB of words and ids.
_KNOWN_WORDS = 65_536
_KNOWN_WORD_CHARACTERS = 32

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoder:
    """Texts to rows of token ids.

    Args:
        data: a checked vocabulary with its merges and added tokens.
    """

    def __init__(self, data: TokenizerData) -> None:
        model = models.BPE(vocab=dict(data.vocab), merges=list(data.merges))
        self._text_only = _pipeline(model)
        self._with_added = _pipeline(model)
        self._with_added.add_tokens([*map(_to_library_token, data.added)])
        assert all(self._with_added.token_to_id(token.content) == token.id for token in data.added)
        # One object an id: a token then takes 8 bytes of a list of ids, and not 36.
        self._numbers = tuple(range(data.size))
        self._known_words: dict[str, tuple[int, ...]] = {}
        # An added token with a space in it, or one that eats the space after it, could be cut in two.
        self._added_can_be_cut = any(token.rstrip or re.search(r"\s", token.content) for token in data.added)

    def encode(self, texts: Sequence[NamedText], *, allow_special: bool, with_offsets: bool = False) -> list[Row]:
        """A row of ids, and of offsets if asked for, for each text.

        Raises:
            InputError: not text, or text with a lone surrogate, whose offset is named.
        """
        for one in texts:
            _check_text(one.text, where=one.name)
        rows = [Row([], []) for _ in texts]
        batch: list[tuple[Row, int, str]] = []
        waiting = 0

        def encode_batch() -> None:
            if waiting >= _WORDS_CHARACTERS and not allow_special and not with_offsets:
                self._encode_words(batch)
            else:
                pipeline = self._with_added if allow_special else self._text_only
                _encode_batch(pipeline, batch, self._numbers, with_offsets=with_offsets)

        for row, text in zip(rows, (one.text for one in texts), strict=True):
            at_least = len(text) if allow_special and self._added_can_be_cut else _PIECE_CHARACTERS
            for start, end in text_pieces(text, at_least=at_least, only_before_spaces=allow_special):
                batch.append((row, start, text[start:end]))
                # A letter outside ASCII may be three or four tokens, and the library keeps a record of each.
                waiting += (end - start) * (1 if batch[-1][2].isascii() else 4)
                if waiting >= _BATCH_CHARACTERS:
                    encode_batch()
                    batch, waiting = [], 0
        encode_batch()
        return rows

    def _encode_words(self, batch: list[tuple[Row, int, str]]) -> None:
        """Append the tokens of each piece to its row. Most words of a text are repeats, so each is encoded once.

        A piece of mostly new words, such as random characters, is encoded as a whole.
        """
        known = self._known_words
        ids: dict[str, tuple[int, ...]] = {}
        new: dict[str, None] = {}
        split = []
        for _, _, piece in batch:
            words = text_words(piece)
            different = dict.fromkeys(words)
            unknown = [word for word in different if word not in known]
            if 2 * len(unknown) > len(words):
                words = unknown = [piece]
            else:
                ids.update((word, known[word]) for word in different if word in known)
            split.append(words)
            new.update(dict.fromkeys(unknown))
        encodings = self._text_only.encode_batch_fast([*new], add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            ids[word] = tuple(map(self._numbers.__getitem__, encoding.ids))
        for (row, _, _), words in zip(batch, split, strict=True):
            row.ids.extend(itertools.chain.from_iterable(map(ids.__getitem__, words)))
        if len(known) > _KNOWN_WORDS:
            self._known_words = known = {}
        known.update((word, ids[word]) for word in new if len(word) <= _KNOWN_WORD_CHARACTERS)


def learn_merges(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """A byte-level BPE's vocabulary of at most `vocab_size` tokens, and its merges, learnt from texts."""
    trained = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
    )
    trained.train_from_iterator(texts, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]  # the library has no other way to them
    return trained.get_vocab(with_added_tokens=False), tuple((a, b) for a, b in merges)


def _to_library_token(token: AddedToken) -> tokenizers.AddedToken:
    """The library's object of an added token."""
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _pipeline(model: models.Model) -> tokenizers.Tokenizer:
    """GPT-2's byte-level pipeline around a BPE model."""
    pipeline = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _encode_batch(
    pipeline: tokenizers.Tokenizer, batch: list[tuple[Row, int, str]], numbers: Sequence[int], *, with_offsets: bool
) -> None:
    """Append the tokens of each piece to its row; the pieces of one row come in order."""
    if not batch:
        return
    pieces = [piece for _, _, piece in batch]
    if len(pieces) == 1:  # a batch wakes the library's threads, and then every later fork warns
        encodings = [pipeline.encode(pieces[0], add_special_tokens=False)]
    elif with_offsets:
        encodings = pipeline.encode_batch(pieces, add_special_tokens=False)
    else:
        encodings = pipeline.encode_batch_fast(pieces, add_special_tokens=False)
    for (row, start, _), encoding in zip(batch, encodings, strict=True):
        row.ids.extend(map(numbers.__getitem__, encoding.ids))
        if with_offsets:
            row.offsets.extend((start + first, start + last) for first, last in encoding.offsets)


def _check_text(text: object, *, where: str) -> None:
    """Refuse what is no text, and text that UTF-8 cannot spell."""
    if not isinstance(text, str):
        raise InputError("not text", where=where, expected="str", found=type(text).__name__)
    lone = None if text.isascii() else _LONE_SURROGATE.search(text)
    if lone is not None:
        raise InputError(
            "a lone surrogate, which is no character",
            where=where,
            found=f"U+{ord(lone[0]):04X} at offset {lone.start()}",
            hint='Decode the bytes that it came from with errors="replace"',
        )
