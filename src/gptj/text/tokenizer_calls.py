"""The calls of transformers' tokenizers that other libraries make: padding of encoded rows, tokens by name, new tokens.

They are GPTJTokenizer's methods, each a few words over what it does itself. Where transformers would answer an
unknown token with another, these refuse it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptj.errors import InputError, did_you_mean, shown
from gptj.paths.hub import HUB_ARGUMENTS
from gptj.text.token_rows import BatchEncoding, Row, as_tensors, one_of, padded_width, whole_number
from gptj.text.tokenizer_data import BYTE_OF_CHARACTER, AddedToken, TokenizerData, assign_role, mark_special
from gptj.text.tokenizer_names import FIXED, ROLES, FurtherNames

__all__ = [
    "TransformersCalls",
    "check_decoding_options",
    "check_saving_options",
    "clean_up_spaces",
    "set_from_pretrained",
    "take_call_arguments",
]

_PADDED_WITH = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}

_SO_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_special_tokens": ((True, False), ""),
    "return_token_type_ids": ((False,), "the model reads token types only where they are asked for"),
    "return_special_tokens_mask": ((False,), "no special token is put around a text"),
    "return_overflowing_tokens": ((False,), "cut the text before the call"),
    "is_split_into_words": ((False,), "join the words"),
    "stride": ((0,), "cut the text before the call"),
    "verbose": ((True, False), ""),
    **dict.fromkeys(("text_target", "text_pair_target"), ((None,), "labels are tokens as inputs are: tokenizer(text)")),
}
"""Arguments of a tokenizer's call that change nothing with these values (or None): no token is ever added."""

_CALL_ARGUMENTS = (
    *("text", "text_pair", "padding", "padding_side", "pad_to_multiple_of", "truncation", "truncation_side"),
    *("max_length", "return_offsets", "return_offsets_mapping", "return_attention_mask", "return_tensors"),
    *("return_length", "split_special_tokens"),
    *("allow_special", *_SO_ANYWAY),
)
_SIDES = ("padding_side", "truncation_side", "model_max_length")
_FAST_ONLY = ("use_fast", "trust_remote_code")


def take_call_arguments(others: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments of transformers' call that mean something, under our names: return_offsets, return_length,
    return_attention_mask and allow_special.

    Raises:
        InputError: an unknown argument, or one that asks for something that there is not.
    """
    taken: dict[str, Any] = {}
    for name, value in others.items():
        if name == "return_offsets_mapping":
            taken["return_offsets"] = bool(value)
        elif name == "return_attention_mask":
            taken["return_attention_mask"] = value is None or bool(value)
        elif name == "return_length":
            taken["return_length"] = bool(value)
        elif name == "split_special_tokens":
            taken["allow_special"] = value is not None and not value
        elif name not in _SO_ANYWAY:
            raise InputError("no such argument", where=shown(name), hint=did_you_mean(name, _CALL_ARGUMENTS))
        elif value is not None and value not in _SO_ANYWAY[name][0]:
            allowed, hint = _SO_ANYWAY[name]
            raise InputError("not supported", where=name, expected=repr(allowed[0]), found=shown(value), hint=hint)
    return taken


def check_decoding_options(others: Mapping[str, Any]) -> None:
    """Make sure that what decoding was told besides is something of transformers' that changes nothing there either.

    Raises:
        InputError: there is no such argument, or it asks for another tokenizer.
    """
    for name, value in others.items():
        if name not in ("spaces_between_special_tokens", "use_source_tokenizer"):
            known = ("skip_special_tokens", "clean_up_tokenization_spaces", "unknown")
            raise InputError("no such argument", where=shown(name), hint=did_you_mean(name, known))
        if name == "use_source_tokenizer" and value:
            raise InputError("not supported", where=name, expected=False, found=shown(value))


_SAVING_OPTIONS: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True, False, None),  # of weights, which a pipeline hands to both
    "legacy_format": (None,),
    "filename_prefix": (None,),
    "push_to_hub": (False,),
}


def check_saving_options(others: Mapping[str, Any]) -> None:
    """Make sure that what `save_pretrained` was told besides the folder asks for what is so anyway.

    Raises:
        InputError: there is no such option, or its value cannot be had.
    """
    for name, value in others.items():
        if name not in _SAVING_OPTIONS:
            raise InputError("no such argument", where=shown(name), expected=", ".join(_SAVING_OPTIONS))
        if not any(value is known for known in _SAVING_OPTIONS[name]):
            raise InputError("not supported", where=name, expected=str(_SAVING_OPTIONS[name][0]), found=shown(value))


_JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up_spaces(text: str, *, asked: bool | None) -> str:
    """The text, where it is asked for without the spaces of English written in tokens: transformers' own list.

    >>> clean_up_spaces("It is n't so , he says .", asked=True)
    "It isn't so, he says."

    Raises:
        InputError: `asked` is neither True, False nor None.
    """
    if asked is not None and type(asked) is not bool:
        raise InputError(
            "breaks its rule",
            where="clean_up_tokenization_spaces",
            expected="True, False or None",
            found=shown(asked),
        )
    for spaced in _JOINED if asked else ():
        text = text.replace(spaced, spaced.strip())
    return text


class TransformersCalls(FurtherNames):
    """Methods of GPTJTokenizer under the names that transformers gives them."""

    # ---- special tokens

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of tokens that a call puts around a text, or a pair: none."""
        return 0

    def add_tokens(self, new_tokens: str | Any | Sequence[Any], special_tokens: bool = False) -> int:
        """Append tokens to the vocabulary; those that it has already are not appended. Returns how many are new.

        A text becomes them only with `allow_special=True`. The model's embedding must have rows for them:
        `model.resize_token_embeddings(len(tokenizer))`.

        Args:
            new_tokens: a token or several, as text or as the `tokenizers` library's AddedToken.
            special_tokens: whether decoding with `skip_special_tokens` drops them.
        """
        listed = [new_tokens] if isinstance(new_tokens, str) or hasattr(new_tokens, "content") else list(new_tokens)
        added: list[AddedToken] = []
        for place, one in enumerate(listed):
            content = getattr(one, "content", one)
            if not isinstance(content, str) or not content:
                raise InputError("not a token", where=f"new_tokens[{place}]", expected="text", found=shown(one))
            if content in self._ids or any(token.content == content for token in added):
                continue
            kinds = {name: bool(getattr(one, name, False)) for name in ("single_word", "lstrip", "rstrip")}
            special = special_tokens or bool(getattr(one, "special", False))
            number = len(self._tokens) + len(added)
            normalized = bool(getattr(one, "normalized", not special))
            added.append(AddedToken(content=content, id=number, special=special, normalized=normalized, **kinds))
        if added:
            self._rebuild(dataclasses.replace(self._data, added=(*self._data.added, *added)))
        return len(added)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Give tokens their roles, appending those that the vocabulary lacks. Returns how many are new.

        Args:
            special_tokens_dict: by role: bos_token, eos_token, unk_token, pad_token, and a list of
                additional_special_tokens.
            replace_additional_special_tokens: accepted: further ones have no list of their own here.
        """
        for role in special_tokens_dict:
            if role not in (*ROLES, "additional_special_tokens"):
                expected = ", ".join((*ROLES, "additional_special_tokens"))
                hint = "Such a token has no role in a GPT-J: list it in additional_special_tokens"
                raise InputError("no such role", where=shown(role), expected=f"one of {expected}", hint=hint)
        count = 0
        for role, given in special_tokens_dict.items():
            count += self.add_tokens(given, special_tokens=True)
            if role in ROLES:
                self._data = assign_role(self._data, role, getattr(given, "content", given))
            else:
                listed = [given] if isinstance(given, str) or hasattr(given, "content") else given
                self._data = mark_special(self._data, (getattr(one, "content", one) for one in listed))
        return count

    def _rebuild(self, data: TokenizerData) -> None:
        """Become the tokenizer of other data."""
        raise NotImplementedError

    # ---- tokens and ids

    def get_vocab(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, with its id."""
        return dict(self._ids)

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens with their ids."""
        return {token.content: token.id for token in self._data.added}

    def tokenize(self, text: str, pair: str | None = None, **options: Any) -> list[str]:
        """The tokens of a text, and of a second, as the vocabulary spells them: a space as Ġ."""
        taken = take_call_arguments(options)
        if taken:
            raise InputError("no such argument", where=shown(next(iter(options))))
        ids = [*self._encode_text(text), *([] if pair is None else self._encode_text(pair))]
        return [self._tokens[one] for one in ids]

    def _encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """The id of a token as the vocabulary spells it, or the ids of several.

        Raises:
            InputError: there is no such token.
        """
        if isinstance(tokens, str):
            return self._id(tokens, where="tokens")
        return [self._id(token, where=f"tokens[{place}]") for place, token in enumerate(tokens)]

    def _id(self, token: Any, *, where: str) -> int:
        found = self._ids.get(token) if isinstance(token, str) else None
        if found is None:
            raise InputError("no such token", where=where, found=shown(token), hint="Use add_tokens to add it")
        return found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """The token of an id as the vocabulary spells it, or the tokens of several.

        Raises:
            InputError: an id that this tokenizer does not have.
        """
        known = self._decoder.known_ids(ids, where="ids")
        if np.ndim(ids) == 0:
            return self._tokens[known[0]]
        dropped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._tokens[one] for one in known if one not in dropped]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text that tokens spell."""
        added = {token.content for token in self._data.added}
        spelt = [
            token.encode() if token in added else bytes(BYTE_OF_CHARACTER[character] for character in token)
            for token in (self._tokens[self._id(one, where="tokens")] for one in tokens)
        ]
        return b"".join(spelt).decode("utf-8", "replace")

    # ---- encoded rows

    padding_side: Any
    model_max_length: Any

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Any = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encoded rows filled to one length: what a data collator makes of examples.

        Args:
            encoded_inputs: one row as a dict, several as a dict of lists, or a list of dicts. input_ids and masks are
                filled; other members, such as labels, stay as they are.
            padding: True or "longest" fills up to the longest row, "max_length" up to max_length; False fills nothing.
            max_length, pad_to_multiple_of, padding_side, return_tensors: as in a call of the tokenizer.
            return_attention_mask: False gives none.
            verbose: accepted.

        Raises:
            InputError: no input_ids, no token to pad with, or rows of different lengths for a tensor.
        """
        one_of(padding, (False, True, "longest", "max_length"), where="padding")
        members, single = _members(encoded_inputs)
        side = (
            self.padding_side if padding_side is None else one_of(padding_side, ("left", "right"), where="padding_side")
        )
        rows = members["input_ids"]
        members.setdefault("attention_mask", [[1] * len(row) for row in rows])
        if return_attention_mask is False:
            del members["attention_mask"]
        if padding:
            if self.pad_token_id is None:
                hint = "Set tokenizer.pad_token to a token of the vocabulary"
                raise InputError("no token to pad with", where="padding", hint=hint)
            limit = None
            if padding == "max_length":
                limit = self.model_max_length if max_length is None else max_length
                limit = whole_number(limit, where="max_length", least=1)
            width = padded_width([Row(row, []) for row in rows], limit=limit, multiple=pad_to_multiple_of)
            for name, filling in {"input_ids": self.pad_token_id, **_PADDED_WITH}.items():
                if name in members:
                    members[name] = [_fill(row, filling, width, side) for row in members[name]]
        if return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in members.items()} if single else members)
        return BatchEncoding(as_tensors({name: _array(name, value) for name, value in members.items()}, return_tensors))


def _members(encoded: Any) -> tuple[dict[str, list[Any]], bool]:
    """The members as lists of rows, and whether there was one row alone."""
    if isinstance(encoded, Mapping):
        members = {name: _plain(value) for name, value in encoded.items()}
    elif isinstance(encoded, list | tuple) and encoded and all(isinstance(one, Mapping) for one in encoded):
        names = [*encoded[0]]
        for place, one in enumerate(encoded):
            if set(one) != set(names):
                found = ", ".join(map(str, one))
                raise InputError("not the same members", where=f"encoded_inputs[{place}]", expected=names, found=found)
        members = {name: [_plain(one[name]) for one in encoded] for name in names}
    else:
        found = type(encoded).__name__
        raise InputError("not encoded rows", where="encoded_inputs", expected="a dict, or a list of dicts", found=found)
    rows = members.get("input_ids")
    if not isinstance(rows, list):
        raise InputError("no input_ids", where="encoded_inputs", found=", ".join(members) or "nothing")
    single = not rows or not isinstance(rows[0], list)
    return ({name: [value] for name, value in members.items()} if single else members), single


def _plain(value: Any) -> Any:
    """Arrays and tensors, and lists of them, as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "numpy"):
        return value.numpy().tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _fill(row: list[Any], filling: int, width: int, side: str) -> list[Any]:
    missing = [filling] * (width - len(row))
    return missing + row if side == "left" else row + missing


def _array(name: str, value: Any) -> Any:
    """A member as an array: whole numbers int64, others float32."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iubf":
        hint = "Pass padding=True, and pad other members beforehand"
        raise InputError("rows of different lengths, or no numbers", where=shown(name), hint=hint)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def set_from_pretrained(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Assign the options of `from_pretrained` that are a tokenizer's: padding_side, model_max_length, pad_token ...

    Raises:
        InputError: there is no such option.
    """
    for name, value in options.items():
        if name in _FAST_ONLY:
            allowed = (True, False) if name == "use_fast" else (False,)
            if value is not None and value not in allowed:
                raise InputError("not supported", where=name, expected=allowed[0], found=shown(value))
        elif name in ROLES:
            if name == "unk_token":
                tokenizer.add_special_tokens({name: value})
            else:
                setattr(tokenizer, name, value)
        elif name in _SIDES or name in FIXED:
            setattr(tokenizer, name, value)
        elif name == "additional_special_tokens":
            tokenizer.add_special_tokens({name: value or []})
        else:
            hint = did_you_mean(name, (*_FAST_ONLY, *ROLES, *_SIDES, *FIXED, *HUB_ARGUMENTS))
            raise InputError("no such option", where=shown(name), hint=hint)
