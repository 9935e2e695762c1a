"""GPTJTokenizer: text to token ids and back, GPT-2's byte-level BPE over the `tokenizers` library.

Three things differ from transformers on purpose.

* A user's text never becomes a special or added token: `<|endoftext|>` in a prompt is seven ordinary tokens
  unless `allow_special=True`; see `encoder.py`.
* Decoding knows every id, or refuses it, or shows its number, as it is told; see `decoder.py`.
* Padding goes to the left by default: a model continues the last token of a row, which must not be padding.

No token is put before or after a text. GPT-J has no padding token; padding falls back to `<|endoftext|>`, 50256.

>>> tokenizer = GPTJTokenizer.gpt2()
>>> tokenizer.encode("Hello, my dog is cute")
[15496, 11, 616, 3290, 318, 13779]
>>> tokenizer(["Hello", "Hello, my dog"], padding=True).attention_mask
[[0, 0, 0, 1], [1, 1, 1, 1]]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import tokenizers

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, InputError, TokenizerError, shown
from gptj.paths import path_called
from gptj.paths.hub import is_repository_id, split_hub_arguments
from gptj.text.decoder import Decoder, TextStream, Unknown, check_unknown, plain_list
from gptj.text.encoder import Encoder, learn_merges
from gptj.text.token_rows import (
    SIDES,
    BatchEncoding,
    NamedText,
    Offsets,
    TensorKind,
    Truncation,
    join_rows,
    mask_rows,
    one_of,
    pad_rows,
    tensors,
    texts_and_pairs,
    truncate_rows,
    whole_number,
)
from gptj.text.tokenizer_calls import (
    TransformersCalls,
    check_decoding_options,
    check_saving_options,
    clean_up_spaces,
    set_from_pretrained,
    take_call_arguments,
)
from gptj.text.tokenizer_data import END_OF_TEXT, Side, TokenizerData, assign_role, is_gpt2_vocabulary
from gptj.text.tokenizer_files import gpt2_tokenizer_data, read_tokenizer_data, tokenizer_files, write_tokenizer_files

__all__ = ["BatchEncoding", "GPTJTokenizer", "TextStream", "Unknown"]

_PADDINGS = (False, True, "longest", "max_length")
_TRUNCATIONS = (False, True, "longest_first", "only_first", "only_second")

# What GPT-2's vocabulary gives for texts that need every part of the pipeline: OpenAI's encoder said so.
_KNOWN_ANSWERS: dict[str, list[int]] = {
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    " I'll  say\n\n2,048 naïve 🤗<|endoftext|>": [
        *(314, 1183, 220, 910, 198, 198, 17, 11, 47202, 41492),
        *(12520, 97, 245, 27, 91, 437, 1659, 5239, 91, 29),
    ],
}


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
        self._ids = {**data.vocab, **{token.content: token.id for token in data.added}}
        self._tokens = sorted(self._ids, key=self._ids.__getitem__)
        self._encoder = Encoder(data)
        self._decoder = Decoder(self._tokens, {token.content for token in data.added})
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

    def __reduce__(self) -> tuple[type[GPTJTokenizer], tuple[TokenizerData], dict[str, Any]]:
        return type(self), (self._data,), {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __repr__(self) -> str:
        pad = f"{self.pad_token!r} ({self.pad_token_id})" + (", the eos token" if self._data.pad_token is None else "")
        return (
            f"GPTJTokenizer({len(self)} tokens, eos {self.eos_token!r} ({self.eos_token_id}), "
            f"pad {pad if self.pad_token is not None else None}, padding {self.padding_side})"
        )

    # Making and saving ------------------------------------------------------------------------------------------

    @classmethod
    @path_called("pretrained_model_name_or_path")
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
        named = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
        place, options = split_hub_arguments(options)
        if is_repository_id(directory) or place.subfolder:
            directory = place.locate(directory, patterns=("*.json", "merges.txt")) / place.subfolder
        tokenizer = cls(read_tokenizer_data(directory, extra_tokens=extra_tokens))
        tokenizer.name_or_path = named
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
        vocab, merges = learn_merges(texts, size - 1)
        if len(vocab) != size - 1:
            raise InputError(
                "more tokens than the texts have", where="vocab_size", expected=f"at most {len(vocab) + 1}", found=size
            )
        data = TokenizerData(vocab={**vocab, END_OF_TEXT: size - 1}, merges=merges, added=())
        for role in ("bos_token", "eos_token", "unk_token"):
            data = assign_role(data, role, END_OF_TEXT)
        return cls(data)

    def files(self) -> dict[str, bytes]:
        """The names and bytes of the files that `save_pretrained` writes, for a writer that stages a whole folder."""
        return tokenizer_files(self._data)

    @path_called("save_directory")
    def save_pretrained(self, directory: str | os.PathLike[str], **others: Any) -> tuple[str, ...]:
        """Write the tokenizer's five files into the folder, which is made if need be. Returns their paths.

        `others` are what transformers' pipelines and tokenizers take besides; see `check_saving_options`.

        They are tokenizer.json, tokenizer_config.json, special_tokens_map.json, vocab.json and merges.txt;
        transformers' AutoTokenizer, fast or slow, opens them.

        Raises:
            WriteError: the folder cannot be written. No file is left half-written.
            InputError: another option, or a value that cannot be had.
        """
        check_saving_options(others)
        write_tokenizer_files(self._data, directory)
        return tuple(str(Path(directory) / name) for name in self.files())

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
        """The number of ids, added tokens included."""
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        """The number of ids without the added tokens that follow the vocabulary: 50,257 for GPT-2's."""
        return len(self._data.vocab)

    @property
    def model_max_length(self) -> int | None:
        """The longest row that the files allow, or None; truncation uses it where no max_length is given."""
        return self._data.model_max_length

    @model_max_length.setter
    def model_max_length(self, length: int | None) -> None:
        limit = None if length is None else whole_number(length, where="model_max_length", least=1)
        self._data = dataclasses.replace(self._data, model_max_length=limit)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` drops."""
        return frozenset(token.id for token in self._data.added if token.special)

    @property
    def padding_side(self) -> Side:
        """The side on which short rows are filled: "left" unless the files say otherwise. Can be set."""
        return self._data.padding_side

    @padding_side.setter
    def padding_side(self, side: Side) -> None:
        self._data = dataclasses.replace(self._data, padding_side=one_of(side, SIDES, where="padding_side"))

    @property
    def truncation_side(self) -> Side:
        """The side on which long rows are cut: "right" unless the files say otherwise. Can be set."""
        return self._data.truncation_side

    @truncation_side.setter
    def truncation_side(self, side: Side) -> None:
        self._data = dataclasses.replace(self._data, truncation_side=one_of(side, SIDES, where="truncation_side"))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it (`"Ġdog"` is 3290), or None."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str:
        """The token of an id as the vocabulary spells it, a space as Ġ."""
        return self._tokens[self._decoder.known_ids(token_id)[0]]

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for. Those of several ids, joined, are their text in UTF-8."""
        return self._decoder.to_bytes(token_id)

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
        return self._encoder.encode([NamedText(text, "text")], allow_special=allow_special)[0].ids

    def encode_with_offsets(self, text: str, *, allow_special: bool = False) -> tuple[list[int], Offsets]:
        """The token ids of `text`, and for each (start, end) such that text[start:end] is what it spells.

        A space before a word belongs to the word's token. A token that is a part of a character has the
        character's bounds.

        >>> GPTJTokenizer.gpt2().encode_with_offsets("my dog")
        ([1820, 3290], [(0, 2), (2, 6)])
        """
        row = self._encoder.encode([NamedText(text, "text")], allow_special=allow_special, with_offsets=True)[0]
        return row.ids, row.offsets

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[tuple[str, str]] | None = None,
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | Literal["longest", "max_length", "do_not_pad"] = False,
        padding_side: Side | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | Truncation | Literal["do_not_truncate"] = False,
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
        padding = False if padding == "do_not_pad" else padding
        truncation = False if truncation == "do_not_truncate" else truncation
        allow_special = named.get("allow_special", allow_special)
        return_offsets = named.get("return_offsets", return_offsets)
        tensor_kind = self.default_tensors if return_tensors == "default" else return_tensors
        one_of(padding, _PADDINGS, where="padding")
        one_of(truncation, _TRUNCATIONS, where="truncation")
        limit = self._limit(max_length, needed=bool(truncation) or padding == "max_length")
        firsts, seconds = texts_and_pairs(text, text_pair)
        rows = self._encoder.encode(firsts, allow_special=allow_special, with_offsets=return_offsets)
        others = None
        if seconds is not None:
            others = self._encoder.encode(seconds, allow_special=allow_special, with_offsets=return_offsets)
        if truncation:
            side = self.truncation_side if truncation_side is None else truncation_side
            truncate_rows(rows, others, limit=limit, how=truncation, side=side)
        for row, other in zip(rows, others or (), strict=False):
            join_rows(row, other)
        if padding:
            side = self.padding_side if padding_side is None else padding_side
            width_limit = limit if padding == "max_length" else None
            pad_rows(rows, limit=width_limit, multiple=pad_to_multiple_of, pad_id=self.pad_token_id, side=side)
        else:
            mask_rows(rows, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of)
        members: dict[str, Any] = {"input_ids": [row.ids for row in rows], "attention_mask": [row.mask for row in rows]}
        if not named.get("return_attention_mask", True):
            del members["attention_mask"]
        if return_offsets:
            members["offset_mapping"] = [row.offsets for row in rows]
            if others is not None:
                members["sequence_ids"] = [row.sequences for row in rows]
        if named.get("return_length"):
            lengths = [len(row.ids) for row in rows]
            members["length"] = [lengths] if isinstance(text, str) else lengths  # as transformers
        if tensor_kind is not None:
            return BatchEncoding(tensors(members, tensor_kind))
        return BatchEncoding({name: value[0] for name, value in members.items()} if isinstance(text, str) else members)

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """The same as a call: transformers' older name."""
        return self(text, text_pair, **options)

    batch_encode_plus = encode_plus

    def _encode_text(self, text: str) -> list[int]:
        return self._encoder.encode([NamedText(text, "text")], allow_special=False)[0].ids

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

    # Ids to text ------------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        unknown: Unknown = "refuse",
        **others: Any,
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
            others: spaces_between_special_tokens, which changes nothing.

        Raises:
            InputError: an id that is unknown and not to be shown or replaced, or is no token id at all, negative or
                no whole number; its place is named.

        >>> GPTJTokenizer.gpt2(extra_tokens=False).decode([3290, 50300], unknown="show")
        ' dog<|50300|>'
        """
        check_decoding_options(others)
        leave_out = self.special_ids if skip_special_tokens else ()
        data = self._decoder.to_bytes(token_ids, leave_out=leave_out, unknown=unknown)
        return clean_up_spaces(data.decode("utf-8", "replace"), asked=clean_up_tokenization_spaces)

    def decode_any(self, token_ids: Any) -> str:
        """`decode`, with U+FFFD for an id that this tokenizer does not have."""
        return self.decode(token_ids, unknown="replace")

    def batch_decode(
        self,
        sequences: Any,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        unknown: Unknown = "refuse",
        **others: Any,
    ) -> list[str]:
        """`decode` of every row of a list of rows, or of an array or tensor (b, t)."""
        check_decoding_options(others)
        leave_out = self.special_ids if skip_special_tokens else ()
        rows = [
            self._decoder.to_bytes(row, leave_out=leave_out, unknown=unknown, where=f"sequences[{number}]")
            for number, row in enumerate(plain_list(sequences, where="sequences"))
        ]
        return [clean_up_spaces(row.decode("utf-8", "replace"), asked=clean_up_tokenization_spaces) for row in rows]

    def stream(self, *, skip_special_tokens: bool = False, unknown: Unknown = "refuse") -> TextStream:
        """A decoder for ids that come one by one; see `TextStream`, and `decode` for the arguments."""
        check_unknown(unknown)
        return TextStream(
            lambda token_ids: self._decoder.to_bytes(
                token_ids, leave_out=self.special_ids if skip_special_tokens else (), unknown=unknown
            )
        )
