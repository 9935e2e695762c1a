"""GPTJTokenizer: text to token ids and back, GPT-2's byte-level BPE over the `tokenizers` library.

Four things differ from transformers on purpose.

* A user's text never becomes a special or added token: `<|endoftext|>` in a prompt is seven ordinary tokens
  unless `allow_special=True`. So there are two pipelines over one model, one without the added tokens;
  the library's own switch (`encode_special_tokens`) leaves the 143 extra tokens matched.
* Decoding knows every id, or refuses it, or shows its number, as it is told. The library drops them in silence. So
  the bytes of each id are kept in a list here, and decoding is a join and one UTF-8 decoding, which a stream does
  bit by bit.
* Padding goes to the left by default: a model continues the last token of a row, which must not be padding.
* Long texts are cut at places that change nothing (`text_pieces`), and each different word is encoded once.

No token is put before or after a text. GPT-J has no padding token; padding falls back to `<|endoftext|>`, 50256.

>>> tokenizer = GPTJTokenizer.gpt2()
>>> tokenizer.encode("Hello, my dog is cute")
[15496, 11, 616, 3290, 318, 13779]
>>> tokenizer(["Hello", "Hello, my dog"], padding=True).attention_mask
[[0, 0, 0, 1], [1, 1, 1, 1]]
"""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, Self, overload

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, InputError, TokenizerError, shown
from gptj.hub import is_repository_id, split_hub_arguments
from gptj.text.pieces import text_pieces, text_words
from gptj.text.token_rows import (
    BatchEncoding,
    NamedText,
    Offsets,
    Row,
    TensorKind,
    Truncation,
    fill_row,
    join_rows,
    one_of,
    padded_width,
    tensors,
    texts_and_pairs,
    truncate,
    truncate_pair,
    whole_number,
)
from gptj.text.tokenizer_calls import (
    TransformersCalls,
    check_saving_options,
    cleaned_up,
    set_from_pretrained,
    take_call_arguments,
)
from gptj.text.tokenizer_data import (
    BYTE_OF_CHARACTER,
    END_OF_TEXT,
    Side,
    TokenizerData,
    is_gpt2_vocabulary,
    named_token,
)
from gptj.text.tokenizer_files import gpt2_tokenizer_data, read_tokenizer_data, tokenizer_files, write_tokenizer_files

__all__ = ["BatchEncoding", "GPTJTokenizer", "TextStream", "Unknown"]

Unknown = Literal["refuse", "show", "replace"]
"""What becomes of an id that the tokenizer does not have; see `GPTJTokenizer.decode`."""

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

_SIDES = ("left", "right")
_UNKNOWN = ("refuse", "show", "replace")
_PADDINGS = (False, True, "longest", "max_length")
_TRUNCATIONS = (False, True, "longest_first", "only_first", "only_second")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# What GPT-2's vocabulary gives for texts that need every part of the pipeline: OpenAI's encoder said so.
_KNOWN_ANSWERS: dict[str, list[int]] = {
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    " I'll  say\n\n2,048 naïve 🤗<|endoftext|>": [
        *(314, 1183, 220, 910, 198, 198, 17, 11, 47202, 41492),
        *(12520, 97, 245, 27, 91, 437, 1659, 5239, 91, 29),
    ],
}


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


class GPTJTokenizer(TransformersCalls):
    """Text to token ids and back.

    Make one with `from_pretrained` (a folder), `gpt2` (the installed vocabulary) or `train`.

    Args:
        data: a checked vocabulary with its merges and added tokens.

    Attributes:
        default_tensors: what a call gives where its return_tensors is not said: lists (None), and in the tokenizer of
            `gptj.pt`, `gptj.tf` or `gptj.flax` that framework's tensors.
    """

    default_tensors: ClassVar[TensorKind | None] = None

    def __init__(self, data: TokenizerData) -> None:
        self._data = data
        model = models.BPE(vocab=dict(data.vocab), merges=list(data.merges))
        self._text_only = _pipeline(model)
        self._with_added = _pipeline(model)
        self._with_added.add_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=token.special,
                )
                for token in data.added
            ]
        )
        self._ids = {**data.vocab, **{token.content: token.id for token in data.added}}
        self._tokens = sorted(self._ids, key=self._ids.__getitem__)
        # One object an id: a token then takes 8 bytes of a list of ids, and not 36.
        self._numbers = tuple(range(len(self._tokens)))
        self._known_words: dict[str, tuple[int, ...]] = {}
        assert all(self._with_added.token_to_id(token.content) == token.id for token in data.added)
        added = {token.content for token in data.added}
        self._bytes = [
            token.encode("utf-8") if token in added else bytes(BYTE_OF_CHARACTER[character] for character in token)
            for token in self._tokens
        ]
        # An added token with a space in it, or one that eats the space after it, could be cut in two.
        self._added_can_be_cut = any(token.rstrip or re.search(r"\s", token.content) for token in data.added)
        if is_gpt2_vocabulary(data):
            self._check_known_answers()

    def _check_known_answers(self) -> None:
        """Refuse a `tokenizers` library that no longer encodes GPT-2's vocabulary as OpenAI's encoder does."""
        for text, expected in _KNOWN_ANSWERS.items():
            found = self.encode(text)
            if found != expected:
                raise TokenizerError(
                    f"tokenizers {tokenizers.__version__} encodes {shown(text)} wrongly",
                    expected=expected,
                    found=found,
                    hint="Install another version of tokenizers and report this one",
                )

    def __reduce__(self) -> tuple[type[GPTJTokenizer], tuple[TokenizerData]]:
        return type(self), (self._data,)

    def __repr__(self) -> str:
        pad = f"{self.pad_token!r} ({self.pad_token_id})" + (", the eos token" if self._data.pad_token is None else "")
        return (
            f"GPTJTokenizer({len(self)} tokens, eos {self.eos_token!r} ({self.eos_token_id}), "
            f"pad {pad if self.pad_token is not None else None}, padding {self.padding_side})"
        )

    # Making and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, extra_tokens: bool | None = None, **options: Any
    ) -> Self:
        """The tokenizer in a folder: tokenizer.json, or vocab.json and merges.txt.

        Args:
            directory: the folder; its path need not be UTF-8.
            extra_tokens: whether GPT-2's bare vocabulary of 50,257 gets `<|extratoken_1|>` (50257) to
                `<|extratoken_143|>`. None: yes, unless a config.json beside it has no room for them. Other
                vocabularies never get them.
            options: padding_side, truncation_side, model_max_length, pad_token, bos_token and eos_token in place of
                the files'; and the hub client's revision, cache_dir, token, local_files_only, force_download and
                subfolder.

        Raises:
            MissingFileError: there is no such folder.
            TokenizerError: no tokenizer files in it, or damaged ones; the message names the file and the place.
        """
        place, options = split_hub_arguments(options)
        if is_repository_id(directory) or place.subfolder:
            directory = place.locate(directory, patterns=("*.json", "merges.txt")) / place.subfolder
        tokenizer = cls(read_tokenizer_data(directory, extra_tokens=extra_tokens))
        set_from_pretrained(tokenizer, options)
        return tokenizer

    @classmethod
    def gpt2(cls, *, extra_tokens: bool = True) -> Self:
        """GPT-J's tokenizer: GPT-2's vocabulary of 50,257, with `extra_tokens` 50,400. Needs the extra `vocab`.

        Raises:
            TokenizerError: the vocabulary is not installed; the message says how to.
        """
        return cls(gpt2_tokenizer_data(extra_tokens=extra_tokens))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """A byte-level BPE of exactly `vocab_size` tokens learnt from `texts`, `<|endoftext|>` the last of them.

        Raises:
            InputError: the size is below 257 (the bytes and the end of text), or the texts have too few
                different words for so many tokens.
        """
        size = whole_number(vocab_size, where="vocab_size", least=257)
        trained = _pipeline(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1,
            min_frequency=0,
            show_progress=False,
            initial_alphabet=sorted(BYTE_OF_CHARACTER),
        )
        trained.train_from_iterator(texts, trainer)
        vocab = trained.get_vocab(with_added_tokens=False)
        if len(vocab) != size - 1:
            raise InputError(
                "more tokens than the texts have", where="vocab_size", expected=f"at most {len(vocab) + 1}", found=size
            )
        with_merges = _model_members(trained)
        data = TokenizerData(
            vocab={**vocab, END_OF_TEXT: size - 1}, merges=tuple((a, b) for a, b in with_merges["merges"]), added=()
        )
        for role in ("bos_token", "eos_token", "unk_token"):
            data = named_token(data, role, END_OF_TEXT)
        return cls(data)

    def files(self) -> dict[str, bytes]:
        """The names and bytes of the files that `save_pretrained` writes, for a writer that stages a whole folder."""
        return tokenizer_files(self._data)

    def save_pretrained(self, directory: str | os.PathLike[str], **others: Any) -> None:
        """The tokenizer's five files stand in the folder, which is made if need be.

        `others` are what transformers' pipelines and tokenizers take besides; see `check_saving_options`.

        They are tokenizer.json, tokenizer_config.json, special_tokens_map.json, vocab.json and merges.txt;
        transformers' AutoTokenizer, fast or slow, opens them.

        Raises:
            WriteError: the folder cannot be written. No file is left half-written.
            InputError: another option, or a value that cannot be had.
        """
        check_saving_options(others)
        write_tokenizer_files(self._data, directory)

    def check_fits(self, config: GPTJConfig) -> None:
        """Make sure that the model's embedding has a row for every id that this tokenizer can give.

        A smaller tokenizer is fine: 50,257 tokens in the 50,400 rows of GPT-J.

        Raises:
            ConfigError: the tokenizer is larger. The message has both numbers.
        """
        if len(self) > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(self)} tokens and the embedding {config.vocab_size} rows",
                where="vocab_size",
                expected=f"at least {len(self)}",
                found=config.vocab_size,
                hint="These are not the tokenizer and the weights of one model",
            )

    # Facts ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many ids there are, added tokens included."""
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        """How many ids there are without the added tokens that follow the vocabulary: 50,257 for GPT-2's."""
        return len(self._data.vocab)

    @property
    def model_max_length(self) -> int | None:
        """The longest row that the files allow, or None; truncation uses it where no max_length is given."""
        return self._data.model_max_length

    @model_max_length.setter
    def model_max_length(self, length: int | None) -> None:
        settled = None if length is None else whole_number(length, where="model_max_length", least=1)
        self._data = dataclasses.replace(self._data, model_max_length=settled)

    @property
    def bos_token(self) -> str | None:
        """The token that may begin a text. It is never put there by itself."""
        return self._data.bos_token

    @bos_token.setter
    def bos_token(self, token: str | None) -> None:
        self._data = named_token(self._data, "bos_token", token)

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text. It is never put there by itself."""
        return self._data.eos_token

    @eos_token.setter
    def eos_token(self, token: str | None) -> None:
        self._data = named_token(self._data, "eos_token", token)

    @property
    def pad_token(self) -> str | None:
        """The token that fills short rows: the one that was named, else the eos token. Can be set."""
        return self._data.pad_token if self._data.pad_token is not None else self._data.eos_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self._data = named_token(self._data, "pad_token", token)

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`: 50256 for GPT-J."""
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`: 50256 for GPT-J."""
        return self._id_of(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`: 50256 for GPT-J, which is its eos token's."""
        return self._id_of(self.pad_token)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._ids[token]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` drops."""
        return frozenset(token.id for token in self._data.added if token.special)

    @property
    def padding_side(self) -> Side:
        """Where short rows are filled: "left" unless the files say otherwise. Can be set."""
        return self._data.padding_side

    @padding_side.setter
    def padding_side(self, side: Side) -> None:
        self._data = dataclasses.replace(self._data, padding_side=one_of(side, _SIDES, where="padding_side"))

    @property
    def truncation_side(self) -> Side:
        """Where long rows are cut: "right" unless the files say otherwise. Can be set."""
        return self._data.truncation_side

    @truncation_side.setter
    def truncation_side(self, side: Side) -> None:
        self._data = dataclasses.replace(self._data, truncation_side=one_of(side, _SIDES, where="truncation_side"))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it (`"Ġdog"` is 3290), or None."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str:
        """The token of an id as the vocabulary spells it, a space as Ġ."""
        return self._tokens[self._known_ids(token_id)[0]]

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for. Those of several ids, joined, are their text in UTF-8."""
        return self._bytes[self._known_ids(token_id)[0]]

    # Text to ids ------------------------------------------------------------------------------------------------

    @overload
    def encode(self, text: str, text_pair: str | None = None, *, allow_special: bool = False) -> list[int]: ...
    @overload
    def encode(
        self, text: str, text_pair: str | None = None, *, allow_special: bool = False, **options: Any
    ) -> Any: ...
    def encode(self, text: str, text_pair: str | None = None, *, allow_special: bool = False, **options: Any) -> Any:
        """The token ids of `text`, none added before or after: a list, or the tensor asked for (1, t).

        Args:
            text: any text that UTF-8 can spell, of any length.
            text_pair: a second text, whose tokens follow.
            allow_special: whether `<|endoftext|>` and other added tokens in the text become those tokens.
            options: of a call: return_tensors, truncation, max_length, padding ...

        Raises:
            InputError: not text, or text with a lone surrogate, whose offset is named.
        """
        if options or text_pair is not None:
            return self(text, text_pair, allow_special=allow_special, **options)["input_ids"]
        return self._encode([NamedText(text, "text")], allow_special=allow_special)[0].ids

    def encode_with_offsets(self, text: str, *, allow_special: bool = False) -> tuple[list[int], Offsets]:
        """The token ids of `text`, and for each (start, end) such that text[start:end] is what it spells.

        A space before a word belongs to the word's token. A token that is a part of a character has the
        character's bounds.

        >>> GPTJTokenizer.gpt2().encode_with_offsets("my dog")
        ([1820, 3290], [(0, 2), (2, 6)])
        """
        row = self._encode([NamedText(text, "text")], allow_special=allow_special, with_offsets=True)[0]
        return row.ids, row.offsets

    def _encode(self, texts: Sequence[NamedText], *, allow_special: bool, with_offsets: bool = False) -> list[Row]:
        """A row of ids, and of offsets if asked for, a text."""
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

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[tuple[str, str]],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | Literal["longest", "max_length"] = False,
        padding_side: Side | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | Truncation = False,
        truncation_side: Side | None = None,
        max_length: int | None = None,
        return_offsets: bool = False,
        return_tensors: TensorKind | Literal["default"] | None = "default",
        allow_special: bool = False,
        **further: Any,
    ) -> BatchEncoding:
        """The model's inputs for a text, a pair, or several of either.

        Args:
            text: a text, a list of texts, or a list of pairs.
            text_pair: the second text of each pair. Its tokens follow the first's; nothing stands between.
            padding: True or "longest" fills the rows up to the longest, "max_length" up to max_length.
            padding_side, truncation_side: "left" or "right"; None takes the tokenizer's.
            pad_to_multiple_of: with padding, the width is rounded up to a multiple of this, so that a compiler
                sees fewer shapes.
            truncation: True or "longest_first" cuts what is over max_length, of a pair from the longer text
                first; "only_first" and "only_second" cut only that text.
            max_length: in tokens; None takes `model_max_length`.
            return_offsets: also give `offset_mapping`, and for pairs `sequence_ids`; the model takes neither.
            return_tensors: "pt", "tf", "jax" or "np" for tensors (b, t), int64 in PyTorch and NumPy, int32 in
                the others, instead of lists (None). A single text then is a batch of one. "default": the class's
                `default_tensors`.
            allow_special: whether added tokens in the text become those tokens; see `encode`.
            further: transformers' names: return_attention_mask, return_offsets_mapping, and what is so anyway:
                add_special_tokens, return_token_type_ids=False ...

        Raises:
            InputError: an argument that breaks its rule or would have no effect, or rows of different lengths
                for a tensor.
            BackendError: the framework of `return_tensors` is not installed.
        """
        named = take_call_arguments(further)
        return_offsets = named.get("return_offsets", return_offsets)
        tensor_kind = self.default_tensors if return_tensors == "default" else return_tensors
        one_of(padding, _PADDINGS, where="padding")
        one_of(truncation, _TRUNCATIONS, where="truncation")
        limit = self._limit(max_length, needed=bool(truncation) or padding == "max_length")
        firsts, seconds = texts_and_pairs(text, text_pair)
        rows = self._encode(firsts, allow_special=allow_special, with_offsets=return_offsets)
        others = None
        if seconds is not None:
            others = self._encode(seconds, allow_special=allow_special, with_offsets=return_offsets)
        if truncation:
            self._truncate(rows, others, limit, truncation, truncation_side)
        for row, other in zip(rows, others or (), strict=False):
            join_rows(row, other)
        self._pad(rows, padding, limit, padding_side, pad_to_multiple_of)
        members: dict[str, Any] = {"input_ids": [row.ids for row in rows], "attention_mask": [row.mask for row in rows]}
        if not named.get("return_attention_mask", True):
            del members["attention_mask"]
        if return_offsets:
            members["offset_mapping"] = [row.offsets for row in rows]
            if others is not None:
                members["sequence_ids"] = [row.sequences for row in rows]
        if tensor_kind is not None:
            return BatchEncoding(tensors(members, tensor_kind))
        return BatchEncoding({name: value[0] for name, value in members.items()} if isinstance(text, str) else members)

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """The same as a call: transformers' older name."""
        return self(text, text_pair, **options)

    batch_encode_plus = encode_plus

    def _encode_text(self, text: str) -> list[int]:
        return self._encode([NamedText(text, "text")], allow_special=False)[0].ids

    def _rebuild(self, data: TokenizerData) -> None:
        type(self).__init__(self, data)

    def _limit(self, max_length: int | None, *, needed: bool) -> int | None:
        """The most tokens of a row, or None where nothing needs a limit."""
        if max_length is not None and not needed:
            hint = 'Pass truncation=True, or padding="max_length"'
            raise InputError("has no effect by itself", where="max_length", hint=hint)
        if max_length is None and needed and self.model_max_length is None:
            hint = "The tokenizer's files do not say how long a row may be"
            raise InputError("needed to truncate or pad", where="max_length", hint=hint)
        return self.model_max_length if max_length is None else whole_number(max_length, where="max_length", least=1)

    def _truncate(
        self, rows: list[Row], others: list[Row] | None, limit: int | None, how: bool | Truncation, side: Side | None
    ) -> None:
        """No row, or no row and its other together, has more than `limit` tokens afterwards."""
        assert limit is not None  # _limit saw to it
        chosen = self.truncation_side if side is None else one_of(side, _SIDES, where="truncation_side")
        if others is None:
            if how == "only_second":
                raise InputError("there is no second text to cut", where="truncation", found=how)
            for row in rows:
                truncate(row, limit, chosen)
            return
        for number, (row, other) in enumerate(zip(rows, others, strict=True)):
            truncate_pair(row, other, limit, chosen, how, where=f"pair {number}")

    def _pad(self, rows: list[Row], how: Any, limit: int | None, side: Side | None, multiple: int | None) -> None:
        """Every row has its mask afterwards and, where padding is asked for, the same length."""
        pad = self.pad_token_id
        if not how:
            for name, value in (("padding_side", side), ("pad_to_multiple_of", multiple)):
                if value is not None:
                    raise InputError("has no effect without padding", where=name, hint="Pass padding=True")
            for row in rows:
                row.mask = [1] * len(row.ids)
            return
        if pad is None:
            hint = "Set tokenizer.pad_token to a token of the vocabulary"
            raise InputError("no token to pad with", where="padding", hint=hint)
        chosen = self.padding_side if side is None else one_of(side, _SIDES, where="padding_side")
        width = padded_width(rows, limit=limit if how == "max_length" else None, multiple=multiple)
        for row in rows:
            fill_row(row, width, pad=pad, side=chosen)

    # Ids to text ------------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        unknown: Unknown = "refuse",
    ) -> str:
        """The text that the ids spell. Bytes that are no UTF-8 become U+FFFD; nothing is cleaned up unasked.

        Args:
            token_ids: one id, or a list, or an array or tensor of one axis.
            skip_special_tokens: whether `<|endoftext|>` and other special tokens are left out.
            clean_up_tokenization_spaces: whether to take out the spaces before . ? ! , and n't, 's and the like, as
                transformers' pipelines ask; the text is then no longer what the ids spell. None is False.
            unknown: what becomes of an id that this tokenizer does not have, as a model with more rows than the
                tokenizer has tokens can make one (GPT-2's 50,257 in the 50,400 of GPT-J): "refuse" it, "show" its
                number, `<|50300|>`, or "replace" it by U+FFFD.

        Raises:
            InputError: an id that is unknown and not to be shown or replaced, or is no token id at all, negative or
                no whole number; its place is named.

        >>> GPTJTokenizer.gpt2(extra_tokens=False).decode([3290, 50300], unknown="show")
        ' dog<|50300|>'
        """
        data = self._to_bytes(token_ids, skip_special_tokens=skip_special_tokens, unknown=unknown)
        return cleaned_up(data.decode("utf-8", "replace"), asked=clean_up_tokenization_spaces)

    def batch_decode(
        self,
        sequences: Any,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        unknown: Unknown = "refuse",
    ) -> list[str]:
        """`decode` of every row of a list of rows, or of an array or tensor (b, t)."""
        rows = [
            self._to_bytes(row, skip_special_tokens=skip_special_tokens, unknown=unknown, where=f"sequences[{number}]")
            for number, row in enumerate(_plain(sequences, where="sequences"))
        ]
        return [cleaned_up(row.decode("utf-8", "replace"), asked=clean_up_tokenization_spaces) for row in rows]

    def stream(self, *, skip_special_tokens: bool = False, unknown: Unknown = "refuse") -> TextStream:
        """A decoder for ids that come one by one; see `TextStream`, and `decode` for the arguments."""
        one_of(unknown, _UNKNOWN, where="unknown")
        return TextStream(
            lambda token_ids: self._to_bytes(token_ids, skip_special_tokens=skip_special_tokens, unknown=unknown)
        )

    def _to_bytes(
        self, token_ids: Any, *, skip_special_tokens: bool, unknown: Unknown, where: str = "token_ids"
    ) -> bytes:
        """The bytes that the ids spell."""
        one_of(unknown, _UNKNOWN, where="unknown")
        ids = self._known_ids(token_ids, where=where, others=unknown != "refuse")
        if skip_special_tokens:
            special = self.special_ids
            ids = [token_id for token_id in ids if token_id not in special]
        if unknown == "refuse":
            return b"".join([self._bytes[token_id] for token_id in ids])
        size, replaced = len(self._bytes), "\ufffd".encode()
        return b"".join(
            [
                self._bytes[token_id] if token_id < size else b"<|%d|>" % token_id if unknown == "show" else replaced
                for token_id in ids
            ]
        )

    def _known_ids(self, token_ids: Any, *, where: str = "token_ids", others: bool = False) -> list[int]:
        """`token_ids` as Python's whole numbers, all of them ids of this tokenizer, or with `others` of any."""
        plain = _plain(token_ids, where=where)
        size = sys.maxsize if others else len(self._tokens)
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


def _pipeline(model: models.Model) -> tokenizers.Tokenizer:
    """GPT-2's byte-level pipeline around a BPE model."""
    pipeline = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _model_members(pipeline: tokenizers.Tokenizer) -> dict[str, Any]:
    """The model of a trained pipeline, as tokenizer.json spells it: the library has no other way to its merges."""
    members: dict[str, Any] = json.loads(pipeline.to_str())["model"]
    return members


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


def _plain(value: Any, *, where: str) -> list[Any]:
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
