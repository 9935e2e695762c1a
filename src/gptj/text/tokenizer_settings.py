"""The files beside a tokenizer's vocabulary: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

These name the special tokens and their ids, and much that transformers' classes know besides. A setting that would
give other ids for every text is refused; one that can be followed is; one that would change something and cannot is
said by name; all others change nothing and are passed over.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj.config import CONFIG_FILE
from gptj.errors import TokenizerError, shown, warn_of
from gptj.text.tokenizer_data import END_OF_TEXT, AddedToken, TokenizerData, assign_role, mark_special, spelt
from gptj.text.tokenizer_json import kind_of, parse_added_token

__all__ = ["Beside", "check_settings", "with_listed_special", "with_settings", "with_tokens_beside"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """The files beside a vocabulary, as they were read; empty where a file is absent.

    Attributes:
        folder: where they stand.
        settings: tokenizer_config.json.
        names: special_tokens_map.json.
        added: added_tokens.json, ids by text.
        model: config.json.
    """

    folder: Path
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """The number of ids that the model in the folder has room for, or None where no config.json says so."""
        rows = self.model.get("vocab_size")
        return rows if type(rows) is int else None

    @property
    def settings_file(self) -> Path:
        """The place of `settings`."""
        return self.folder / "tokenizer_config.json"

    @property
    def names_file(self) -> Path:
        """The place of `names`."""
        return self.folder / "special_tokens_map.json"

    def saying(self, field: str) -> tuple[Any, Path] | None:
        """A special token as a file lists it, and the file: special_tokens_map.json where the other has none."""
        if field in self.settings:
            return self.settings[field], self.settings_file
        return (self.names[field], self.names_file) if field in self.names else None


# Checking -----------------------------------------------------------------------------------------------------

_SAME_CLASSES = ("CodeGenTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
"""The classes of transformers, "Fast" taken off, that encode a text by its byte-level BPE and add nothing."""

_OTHER_CLASSES = (
    "Albert", "Bart", "Barthez", "Bartpho", "Bert", "BertGeneration", "BertJapanese", "Bertweet", "BigBird",
    "BioGpt", "Blenderbot", "BlenderbotSmall", "ByT5", "CLIP", "CTRL", "Camembert", "Canine", "Clvp", "CodeLlama",
    "Cohere", "ConvBert", "Cpm", "CpmAnt", "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "Deberta",
    "DebertaV2", "Dia", "DistilBert", "Electra", "ErnieM", "Esm", "FNet", "FSMT", "FastSpeech2Conformer",
    "Flaubert", "Funnel", "GPTNeoXJapanese", "GPTSanJapanese", "GPTSw3", "Gemma", "Herbert", "Jukebox", "LED",
    "LayoutLM", "LayoutLMv2", "LayoutLMv3", "LayoutXLM", "Llama", "Longformer", "Luke", "Lxmert", "M2M100",
    "MBart", "MBart50", "MLuke", "MPNet", "MT5", "Marian", "Mgpstr", "MistralCommon", "MobileBert", "Mvp", "MyT5",
    "Nllb", "OpenAIGPT", "PLBart", "ParakeetCTC", "Pegasus", "Perceiver", "Phobert", "ProphetNet", "Rag", "Realm",
    "Reformer", "RemBert", "RetriBert", "RoCBert", "RoFormer", "Roberta", "SeamlessM4T", "Siglip", "Speech2Text",
    "Speech2Text2", "SpeechT5", "Splinter", "SqueezeBert", "T5", "Tapas", "Tapex", "TransfoXL", "Udop", "Vits",
    "Wav2Vec2", "Wav2Vec2CTC", "Wav2Vec2PhonemeCTC", "Whisper", "XGLM", "XLM", "XLMProphetNet", "XLMRoberta",
    "XLMRobertaXL", "XLNet",
)  # fmt: skip
"""Classes, "Tokenizer" and "Fast" taken off, that split a text otherwise or put tokens around it of themselves."""

_NOT_FOLLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "clean_up_tokenization_spaces": ((None, False), "is not followed: decoding leaves spaces as the ids spell them"),
    "spaces_between_special_tokens": ((None, False), "is not followed: decoding puts no space between tokens"),
    "errors": ((None, "replace"), "is not followed: bytes that are no UTF-8 are decoded as U+FFFD"),
    "chat_template": ((None, "", [], {}), "is left out: no chat template is applied to a text"),
    "split_special_tokens": ((None, False), "is not followed: allow_special of a call says what such a text becomes"),
    "do_lower_case": ((None, False), "is not followed: no text is lower-cased"),
    "return_token_type_ids": ((None, False), "is not followed: token types are given by no call"),
    "fix_mistral_regex": ((None, False), "is not followed: texts are split by GPT-2's pattern"),
    "auto_map": ((None, [], {}), "names code, which is not run: the files are read as a byte-level BPE"),
    "tokenizer_file": ((None,), "is not followed: the files of this folder count"),
    "vocab_file": ((None,), "is not followed: the files of this folder count"),
    "merges_file": ((None,), "is not followed: the files of this folder count"),
    "init_inputs": ((None, []), "is left out: no further arguments are known"),
}
"""Settings that transformers' classes follow: the values under which they change nothing, and what is so here."""

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def check_settings(beside: Beside, *, with_pipeline: bool) -> None:
    """Refuse settings that would give other ids for every text, and warn of those that are not followed.

    Args:
        beside: the files.
        with_pipeline: whether a tokenizer.json says how a text is encoded; else the class alone does.
    """
    settings, file = beside.settings, beside.settings_file
    for source, members in ((file, settings), (beside.folder / CONFIG_FILE, beside.model)):
        if members.get("tokenizer_class") is not None:  # transformers asks config.json where the other is silent
            _check_class(members["tokenizer_class"], file=source, with_pipeline=with_pipeline)
            break
    for flag in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if settings.get(flag) not in (None, False):
            raise TokenizerError(
                "would add to every text", file=file, where=flag, expected="false", found=shown(settings[flag])
            )
    for field, (neutral, problem) in _NOT_FOLLOWED.items():
        found = settings.get(field)
        # 0 == False in Python, and transformers takes both for the same.
        if found not in neutral:
            warn_of(problem, file=file, where=field, found=spelt(found))
    inputs = settings.get("model_input_names")
    if inputs is not None and (
        not isinstance(inputs, list) or sorted(map(str, inputs)) != ["attention_mask", "input_ids"]
    ):
        problem = "is not followed: a call gives input_ids and attention_mask"
        warn_of(problem, file=file, where="model_input_names", found=spelt(inputs))
    for name in _TEMPLATE_FILES:
        if os.path.lexists(beside.folder / name):
            warn_of("is left out: no chat template is applied to a text", file=beside.folder / name)


def _check_class(name: object, *, file: Path, with_pipeline: bool) -> None:
    """Refuse a class that would give other ids, and warn of one that might."""
    # A class may be named with its repository or module: "owner/name--module.Class".
    bare = re.split(r"--|[./:]", name)[-1] if isinstance(name, str) else ""
    plain = bare.removesuffix("Fast")
    known = plain in _SAME_CLASSES
    if not (known or (with_pipeline and bare)) or plain.removesuffix("Tokenizer") in _OTHER_CLASSES:
        raise TokenizerError(
            "another kind of tokenizer",
            file=file,
            where="tokenizer_class",
            expected=" or ".join(_SAME_CLASSES) + ', each also with "Fast"',
            found=shown(name),
            hint=None if with_pipeline else "Another class needs a tokenizer.json, which says how it encodes",
        )
    if not known or name != bare:
        warn_of(
            "is not known: a text is encoded by tokenizer.json, a byte-level BPE, and this class might do more"
            if with_pipeline and not known
            else "is code of another place, which is not run: the files are read as a byte-level BPE",
            file=file,
            where="tokenizer_class",
            found=shown(name),
        )


# Added tokens -------------------------------------------------------------------------------------------------


def with_tokens_beside(data: TokenizerData, beside: Beside, *, file: Path) -> TokenizerData:
    """`data` of `file` with the tokens that added_tokens.json and added_tokens_decoder list besides.

    A token that `file` has already must have the same id there. Its flags are those of added_tokens_decoder.

    Raises:
        TokenizerError: two of the files give one id to two texts, or one text two ids.
    """
    listed = [*_by_content(beside), *_by_id(beside)]
    if not listed:
        return data
    added = {token.id: token for token in data.added}
    texts = {token_id: text for text, token_id in data.vocab.items()} | {n: token.content for n, token in added.items()}
    ids = {text: token_id for token_id, text in texts.items()}
    source = dict.fromkeys(texts, file.name)
    flagged = {*added}
    for place, where, token, has_flags in listed:
        text, token_id = texts.get(token.id, token.content), ids.get(token.content, token.id)
        if text != token.content or token_id != token.id:
            other = token.id if text != token.content else token_id
            raise TokenizerError(
                f"contradicts {source[other]}",
                file=place,
                where=where,
                expected=shown(text) if text != token.content else f"id {token_id}",
                found=shown(token.content) if text != token.content else f"id {token.id}",
            )
        if has_flags and token.id in flagged:
            _warn_of_flags(added[token.id], token, file=place, where=where, other=source[token.id])
        if has_flags or token.id not in added:
            added[token.id] = token
        texts[token.id], ids[token.content] = token.content, token.id
        source.setdefault(token.id, place.name)
    return dataclasses.replace(data, added=tuple(added[token_id] for token_id in sorted(added)))


Listed = tuple[Path, str, AddedToken, bool]


def _by_content(beside: Beside) -> Iterator[Listed]:
    """The tokens of added_tokens.json, which says nothing of their flags."""
    file = beside.folder / "added_tokens.json"
    for content, token_id in beside.added.items():
        where = shown(content)
        yield file, where, parse_added_token({"content": content, "id": token_id}, file=file, where=where), False


def _by_id(beside: Beside) -> Iterator[Listed]:
    """The tokens of added_tokens_decoder: an object whose keys are token ids as JSON spells numbers."""
    file, described = beside.settings_file, beside.settings.get("added_tokens_decoder")
    if described is None:
        return
    if not isinstance(described, dict):
        raise TokenizerError("not an object", file=file, where="added_tokens_decoder", found=kind_of(described))
    for key, value in described.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
            raise TokenizerError("not a token id", file=file, where="added_tokens_decoder", found=shown(key))
        where = f"added_tokens_decoder.{key}"
        token = parse_added_token(value, file=file, where=where, id=int(key))
        if token.id != int(key):
            raise TokenizerError("two ids", file=file, where=f"{where}.id", expected=key, found=token.id)
        yield file, where, token, True


def _warn_of_flags(there: AddedToken, token: AddedToken, *, file: Path, where: str, other: str) -> None:
    """Warn of flags that differ: releases of transformers disagree which file counts. `normalized` changes nothing."""
    for flag in ("special", "single_word", "lstrip", "rstrip"):
        if getattr(there, flag) != getattr(token, flag):
            problem = f"counts, and {other} says otherwise"
            warn_of(problem, file=file, where=f"{where}.{flag}", found=spelt(getattr(token, flag)))


_FURTHER_ROLES = ("sep_token", "cls_token", "mask_token")
_FURTHER_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


def with_listed_special(data: TokenizerData, beside: Beside) -> TokenizerData:
    """`data` with the further special tokens special: those with a role that no GPT-J has, and those in a list.

    One that the vocabulary lacks is appended, as transformers does, where the model has a row for it; both is said.
    """
    for value, file, where in _further(beside):
        token = _special_token(value, file=file, where=where)
        if token.content not in data.vocab and all(one.content != token.content for one in data.added):
            facts: dict[str, Any] = {"file": file, "where": where, "found": shown(token.content)}
            if beside.rows is not None and data.size >= beside.rows:
                warn_of("is left out: the vocabulary lacks it, and the model has no row for it", **facts)
                continue
            warn_of(f"is appended with id {data.size}: the vocabulary lacks it", **facts)
            data = dataclasses.replace(data, added=(*data.added, dataclasses.replace(token, id=data.size)))
        data = _as_special(data, token)
    return data


def _further(beside: Beside) -> Iterator[tuple[Any, Path, str]]:
    """Each further special token as a file lists it, with the file and the place."""
    for role in _FURTHER_ROLES:
        said = beside.saying(role)
        if said is not None and said[0] is not None:
            yield *said, role
    for field in _FURTHER_LISTS:
        said = beside.saying(field)
        if said is None or said[0] is None:
            continue
        listed, file = said
        if isinstance(listed, list):
            yield from ((value, file, f"{field}[{place}]") for place, value in enumerate(listed))
        elif isinstance(listed, dict) and field != "additional_special_tokens":
            yield from ((value, file, f"{field}.{shown(name)[1:-1]}") for name, value in listed.items())
        else:
            raise TokenizerError("not a list", file=file, where=field, found=kind_of(listed))


def _role_token(value: object, *, file: Path, where: str) -> AddedToken | None:
    """The special token of a role, which may be null."""
    return None if value is None else _special_token(value, file=file, where=where)


def _special_token(value: object, *, file: Path, where: str) -> AddedToken:
    """A special token that is spelt as a string or as an object with a content; its id is 0 still."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise TokenizerError("not a token", file=file, where=where, expected="a string or null", found=kind_of(value))
    members = value if isinstance(value, dict) else {"content": content}
    return parse_added_token({**members, "id": 0, "special": True}, file=file, where=where)


def _as_special(data: TokenizerData, token: AddedToken) -> TokenizerData:
    """`data` with that token special: with its flags, unless it is an added one and so has flags already."""
    if token.content in data.vocab and all(one.content != token.content for one in data.added):
        here = dataclasses.replace(token, id=data.vocab[token.content])
        added = sorted((*data.added, here), key=lambda one: one.id)
        return dataclasses.replace(data, added=tuple(added))
    return mark_special(data, {token.content})


# Roles, sides and length --------------------------------------------------------------------------------------


def with_settings(data: TokenizerData, beside: Beside) -> TokenizerData:
    """`data` with what tokenizer_config.json says, and special_tokens_map.json where that one is silent."""
    settings, file = beside.settings, beside.settings_file
    sides = {}
    for side in ("padding_side", "truncation_side"):
        if side in settings:
            if settings[side] not in ("left", "right"):
                raise TokenizerError(
                    "not a side", file=file, where=side, expected='"left" or "right"', found=shown(settings[side])
                )
            sides[side] = settings[side]
    data = dataclasses.replace(data, **sides, model_max_length=_length(settings, data.model_max_length, file=file))
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        said = beside.saying(role)
        if said is not None:
            data = _with_role(data, role, *said, beside=beside)
        elif role != "pad_token" and END_OF_TEXT in data.vocab:
            data = assign_role(data, role, END_OF_TEXT)
    return mark_special(data, {END_OF_TEXT} & data.vocab.keys())


def _with_role(data: TokenizerData, role: str, value: object, file: Path, *, beside: Beside) -> TokenizerData:
    """`data` with the token that `file` gives the role; warns where special_tokens_map.json gives it another."""
    token = _role_token(value, file=file, where=role)
    content = None if token is None else token.content
    if file != beside.names_file and role in beside.names:
        other = _role_token(beside.names[role], file=beside.names_file, where=role)
        if other is None or other.content != content:
            warn_of(
                "is not followed: tokenizer_config.json counts",
                file=beside.names_file,
                where=role,
                expected="null" if content is None else shown(content),
                found="null" if other is None else shown(other.content),
            )
    if token is not None and token.content in data.vocab:
        data = _as_special(data, token)
    return assign_role(data, role, content, file=file)


def _length(settings: Mapping[str, Any], otherwise: int | None, *, file: Path) -> int | None:
    """The longest row, max_len being its name in transformers' oldest files; None where there is no limit."""
    field = "model_max_length" if "model_max_length" in settings or "max_len" not in settings else "max_len"
    length = settings.get(field, otherwise)
    if length is not None and (
        isinstance(length, bool) or not isinstance(length, int | float) or length < 1 or length != length // 1
    ):
        raise TokenizerError("not a length", file=file, where=field, expected="at least 1", found=shown(length))
    # transformers writes 1e30 for "no limit".
    return None if length is None or length > 2**31 else int(length)
