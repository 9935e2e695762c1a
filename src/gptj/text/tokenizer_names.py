"""Attributes that transformers' tokenizers have: those that can be had under their names, and why the others cannot.

An attribute that is set and would change nothing is refused, as `chat_template` is, and what is spelt nearly as one
that counts; any other is the user's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from gptj.errors import InputError, TokenizerError, did_you_mean, shown
from gptj.text.decoder import Decoder
from gptj.text.tokenizer_data import TokenizerData, assign_role

__all__ = ["FIXED", "ROLES", "FurtherNames"]

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_NO_ROLES = ("sep_token", "cls_token", "mask_token")

_CHAT = (
    "GPT-J has no chat template, and none is applied to a text",
    "Join the messages into a prompt; gptj serve applies a folder's own template",
)
_INSIDE = (
    "a text is encoded with and without added tokens by two tokenizers",
    "tokenizers.Tokenizer.from_file(DIR + '/tokenizer.json'), after save_pretrained(DIR)",
)
_NO_ROLE = (
    "no GPT-J has a token of this role",
    "add_special_tokens({'additional_special_tokens': [TOKEN]}), and convert_tokens_to_ids(TOKEN)",
)
_CALLED = ("is said in a call", "tokenizer(text, padding=..., truncation=..., max_length=...)")
_BY_PAD = ("rows are cut and filled by a call, or by pad", "tokenizer.pad({'input_ids': rows})")
_SAVED = ("all of a tokenizer's files are written together", "save_pretrained(DIR)")
_TABLES = ("is not kept apart", "get_vocab(), or convert_ids_to_tokens and convert_tokens_to_ids")

_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("apply_chat_template", "get_chat_template", "save_chat_templates"), _CHAT),
    **dict.fromkeys(("backend_tokenizer", "_tokenizer", "slow_tokenizer_class", "sp_model"), _INSIDE),
    **dict.fromkeys(("set_truncation_and_padding", "as_target_tokenizer", "init_kwargs"), _CALLED),
    **dict.fromkeys(("prepare_for_model", "truncate_sequences", "create_token_type_ids_from_sequences"), _BY_PAD),
    **dict.fromkeys(("save_vocabulary", "vocab_files_names"), _SAVED),
    **dict.fromkeys(("encoder", "decoder", "bpe_ranks", "byte_encoder", "byte_decoder"), _TABLES),
    "push_to_hub": ("nothing is uploaded from here", "save_pretrained(DIR), then: hf upload OWNER/NAME DIR"),
    "train_new_from_iterator": ("a vocabulary is learnt by the class", "GPTJTokenizer.train(texts, vocab_size)"),
    "clean_up_tokenization": ("is asked of decoding", "decode(ids, clean_up_tokenization_spaces=True)"),
    "sanitize_special_tokens": ("every token with a role is one of the vocabulary", "leave it out"),
    "all_special_tokens_extended": ("tokens are shown as text", "all_special_tokens, or added_tokens_decoder"),
    "special_tokens_map_extended": ("tokens are shown as text", "special_tokens_map, or added_tokens_decoder"),
}
"""Attributes of transformers' that are not there: why, and what to write."""

FIXED: dict[str, tuple[str, str]] = {
    "chat_template": _CHAT,
    "clean_up_tokenization_spaces": _REASONS["clean_up_tokenization"],
    "add_prefix_space": ("a text is encoded as it is", "tokenizer(' ' + text)"),
    "add_bos_token": ("nothing is put before a text", "tokenizer(tokenizer.bos_token + text, allow_special=True)"),
    "add_eos_token": ("nothing is put after a text", "tokenizer(text + tokenizer.eos_token, allow_special=True)"),
    **{name: _NO_ROLE for role in _NO_ROLES for name in (role, f"{role}_id")},
}
"""Attributes that are always the same here: why another value cannot be assigned, and what to write."""


class FurtherNames:
    """Attributes of GPTJTokenizer under the names that transformers gives them.

    Attributes:
        name_or_path: the folder or repository that it was opened from, as it was given; "" where there is none.
        chat_template, sep_token, cls_token, mask_token and their ids: None, since no GPT-J has any.
    """

    is_fast: ClassVar[bool] = True
    pad_token_type_id: ClassVar[int] = 0
    clean_up_tokenization_spaces: ClassVar[bool] = False
    add_prefix_space: ClassVar[bool] = False
    chat_template: ClassVar[None] = None
    sep_token: ClassVar[None] = None
    sep_token_id: ClassVar[None] = None
    cls_token: ClassVar[None] = None
    cls_token_id: ClassVar[None] = None
    mask_token: ClassVar[None] = None
    mask_token_id: ClassVar[None] = None
    model_input_names: Sequence[str] = ("input_ids", "attention_mask")
    name_or_path: str = ""

    _data: TokenizerData
    _ids: Mapping[str, int]
    _tokens: Sequence[str]
    _decoder: Decoder
    model_max_length: Any

    @property
    def deprecation_warnings(self) -> dict[str, bool]:
        """Nothing is warned of, so that there is nothing to switch off."""
        return {}

    def __getattr__(self, name: str) -> Any:
        if name in _REASONS:
            reason, way = _REASONS[name]
            raise AttributeError(f"{type(self).__name__}.{name} is not there: {reason}. Instead: {way}")
        meant = None if name.startswith("_") else did_you_mean(name, dir(type(self)))
        raise AttributeError(f"{type(self).__name__} has no {name!r}" + (f". {meant}" if meant else ""))

    def __setattr__(self, name: str, value: Any) -> None:
        refused = FIXED.get(name) or _REASONS.get(name)
        if refused is not None:
            if name in FIXED and (value is None or value == getattr(self, name, False)):
                return
            raise InputError(f"cannot be assigned: {refused[0]}", where=name, found=shown(value), hint=refused[1])
        if not hasattr(type(self), name) and not name.startswith("_"):
            settable = (one for one in dir(type(self)) if not callable(getattr(type(self), one)))
            if meant := did_you_mean(name, settable):
                raise InputError("no such attribute", where=shown(name), found=shown(value), hint=meant)
        object.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        return [name for name in object.__dir__(self) if name not in _REASONS]

    # ---- the vocabulary

    @property
    def vocab(self) -> dict[str, int]:
        """The same as `get_vocab()`: every token with its id."""
        return dict(self._ids)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The added tokens with their ids."""
        return {token.content: token.id for token in self._data.added}

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id, each as the `tokenizers` library's AddedToken."""
        from tokenizers import AddedToken

        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            token.id: AddedToken(token.content, **{flag: getattr(token, flag) for flag in flags})
            for token in self._data.added
        }

    @property
    def max_len_single_sentence(self) -> int | None:
        """The same as `model_max_length`: nothing is put around a text."""
        length: int | None = self.model_max_length
        return length

    max_len_sentences_pair = max_len_single_sentence

    def build_inputs_with_special_tokens(
        self, token_ids_0: Iterable[int], token_ids_1: Iterable[int] | None = None
    ) -> list[int]:
        """The ids of a text and of a second one, with nothing before, between or after them."""
        return [*token_ids_0, *(token_ids_1 or ())]

    # ---- special tokens

    @property
    def bos_token(self) -> str | None:
        """The token that may begin a text. It is never put there by itself. Can be set, as all of these can."""
        return self._data.bos_token

    @bos_token.setter
    def bos_token(self, token: str | None) -> None:
        self._assign("bos_token", token)

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text. It is never put there by itself."""
        return self._data.eos_token

    @eos_token.setter
    def eos_token(self, token: str | None) -> None:
        self._assign("eos_token", token)

    @property
    def pad_token(self) -> str | None:
        """The token that fills short rows: the one that was named, else the eos token."""
        return self._data.pad_token if self._data.pad_token is not None else self._data.eos_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self._assign("pad_token", token)

    @property
    def unk_token(self) -> str | None:
        """The token that stands for what is unknown. No text has such: every byte is a token."""
        return self._data.unk_token

    @unk_token.setter
    def unk_token(self, token: str | None) -> None:
        self._assign("unk_token", token)

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`: 50256 for GPT-J. Setting it sets the token, as for the others."""
        return self._id_of(self.bos_token)

    @bos_token_id.setter
    def bos_token_id(self, token_id: int | None) -> None:
        self._assign("bos_token", self._token_of(token_id, "bos_token_id"))

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`: 50256 for GPT-J."""
        return self._id_of(self.eos_token)

    @eos_token_id.setter
    def eos_token_id(self, token_id: int | None) -> None:
        self._assign("eos_token", self._token_of(token_id, "eos_token_id"))

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`: 50256 for GPT-J, which is its eos token's."""
        return self._id_of(self.pad_token)

    @pad_token_id.setter
    def pad_token_id(self, token_id: int | None) -> None:
        self._assign("pad_token", self._token_of(token_id, "pad_token_id"))

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`."""
        return self._id_of(self.unk_token)

    @unk_token_id.setter
    def unk_token_id(self, token_id: int | None) -> None:
        self._assign("unk_token", self._token_of(token_id, "unk_token_id"))

    def _assign(self, role: str, token: Any) -> None:
        content = getattr(token, "content", token)
        if content is not None and content not in self._ids:
            hint = f"add_special_tokens({{{role!r}: TOKEN}}), then model.resize_token_embeddings(len(tokenizer))"
            raise TokenizerError("names a token that the vocabulary lacks", where=role, found=shown(token), hint=hint)
        if content in self._data.vocab and all(one.content != content for one in self._data.added):
            # A word is not special by that: with "!" for padding, texts keep their exclamation marks.
            self._data = dataclasses.replace(self._data, **{role: content})
        else:
            self._data = assign_role(self._data, role, content)

    def _token_of(self, token_id: Any, where: str) -> str | None:
        return None if token_id is None else self._tokens[self._decoder.known_ids([token_id], where=where)[0]]

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._ids[token]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens without a role, in the order of their ids. Can be set to some that the vocabulary has."""
        named = {getattr(self._data, role) for role in ROLES}
        return [token.content for token in self._data.added if token.special and token.content not in named]

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[Any]) -> None:
        for place, token in enumerate(tokens):
            if getattr(token, "content", token) not in self._ids:
                hint = "add_special_tokens({'additional_special_tokens': [...]}) adds them"
                where = f"additional_special_tokens[{place}]"
                raise InputError("no token of the vocabulary", where=where, found=shown(token), hint=hint)
        self.add_special_tokens({"additional_special_tokens": tokens})

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return [self._ids[token] for token in self.additional_special_tokens]

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Give tokens their roles."""
        raise NotImplementedError

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The tokens that have a role, by role, and the list of additional_special_tokens where there are any."""
        named = {role: token for role in ROLES if (token := getattr(self._data, role)) is not None}
        others = self.additional_special_tokens
        return {**named, "additional_special_tokens": others} if others else named

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once: those with a role, then the others."""
        named = (token for role in ROLES if (token := getattr(self._data, role)) is not None)
        return list(dict.fromkeys((*named, *self.additional_special_tokens)))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._ids[token] for token in self.all_special_tokens]

    def get_special_tokens_mask(
        self,
        token_ids_0: Iterable[int],
        token_ids_1: Iterable[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each id of a special token that is in a text already, 0 for the others; nothing is put around one."""
        special = set(self.all_special_ids) if already_has_special_tokens else set()
        return [int(one in special) for one in self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)]
