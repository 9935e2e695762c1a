"""A tokenizer as data: vocabulary, merges and added tokens, their checks, and the roles that tokens have.

Everything is checked before it is used, since a lenient reader gives wrong ids in silence: the ids are 0 to n - 1,
each once; the 256 byte tokens are there, so that no text is unknown; every merge joins two tokens into a third;
every other token comes out of a merge or is an added one; and a vocabulary that is GPT-2's in one part must be
GPT-2's in every part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from gptj.errors import TokenizerError, shown

__all__ = [
    "BYTE_OF_CHARACTER",
    "END_OF_TEXT",
    "EXTRA_TOKENS",
    "GPT2_VOCABULARY_SIZE",
    "AddedToken",
    "Side",
    "TokenizerData",
    "assign_role",
    "check_ids",
    "check_tokenizer",
    "is_gpt2_vocabulary",
    "mark_special",
    "spelt",
    "with_extra_tokens",
]

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's only special token: it ends a document, and serves as bos, eos and unk."""

EXTRA_TOKENS = 143
"""`<|extratoken_1|>` = 50257 to `<|extratoken_143|>` = 50399 fill GPT-2's 50,257 tokens up to GPT-J's 50,400."""

GPT2_VOCABULARY_SIZE = 50257

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
        """The number of ids, added tokens included: ids are 0 to size - 1."""
        return len(self.vocab) + sum(token.content not in self.vocab for token in self.added)


# Checking -----------------------------------------------------------------------------------------------------


def check_tokenizer(data: TokenizerData, *, file: Path) -> None:
    """Refuse data that could not encode every text, or whose parts contradict each other."""
    check_ids(data, file=file)
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


def check_ids(data: TokenizerData, *, file: Path) -> None:
    """Refuse ids that are not 0 to n - 1, each once: first the vocabulary's, then the added tokens' after them."""
    size = len(data.vocab)
    owner: dict[int, str] = {}
    for token, token_id in data.vocab.items():
        if type(token_id) is not int or not 0 <= token_id < size:
            raise TokenizerError(
                f"{size} tokens have the ids 0 to {size - 1}, each once",
                file=file,
                where=f"token {shown(token, longest=80)}",
                found=f"id {spelt(token_id)}",
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


def spelt(value: object) -> str:
    """A JSON value as JSON spells it, all ASCII, cut at 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."


# Roles --------------------------------------------------------------------------------------------------------


def assign_role(data: TokenizerData, role: str, content: str | None, *, file: Path | None = None) -> TokenizerData:
    """`data` with `content` in the role of bos_token, eos_token, unk_token or pad_token, and special from now on.

    Raises:
        TokenizerError: there is no such token.
    """
    if content is not None:
        if content not in data.vocab and all(token.content != content for token in data.added):
            raise TokenizerError("names a token that the vocabulary lacks", file=file, where=role, found=shown(content))
        data = mark_special(data, {content})
    return dataclasses.replace(data, **{role: content})  # type: ignore[arg-type]


def mark_special(data: TokenizerData, contents: Iterable[str]) -> TokenizerData:
    """`data` with each of `contents` an added token that is special."""
    added = {token.content: token for token in data.added}
    for content in contents:
        token = added.get(content) or AddedToken(content=content, id=data.vocab[content], special=True)
        added[content] = dataclasses.replace(token, special=True)
    return dataclasses.replace(data, added=tuple(sorted(added.values(), key=lambda token: token.id)))


def with_extra_tokens(data: TokenizerData) -> TokenizerData:
    """`data` with the 143 extra tokens after GPT-2's vocabulary, unless other added tokens are there."""
    if any(token.id >= GPT2_VOCABULARY_SIZE for token in data.added):
        return data
    extra = tuple(
        AddedToken(content=f"<|extratoken_{i}|>", id=GPT2_VOCABULARY_SIZE - 1 + i, special=False, normalized=True)
        for i in range(1, EXTRA_TOKENS + 1)
    )
    return dataclasses.replace(data, added=data.added + extra)
