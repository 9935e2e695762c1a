"""tokenizer.json read strictly: its vocabulary, once its pipeline is known to be GPT-2's and nothing else.

Read as bytes and never by the `tokenizers` library, which fails on a path that is not UTF-8. A step that would change
what text becomes is refused; a Sequence around the only step, or an empty one, changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj.errors import TokenizerError, shown, warn_of
from gptj.paths.json_file import parse_json_object
from gptj.text.tokenizer_data import AddedToken, TokenizerData, spelt

__all__ = ["check_twice", "kind_of", "parse_added_token", "parse_tokenizer_json"]


def check_twice(pairs: list[tuple[str, str]], *, file: Path, place: Any) -> None:
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

# The member of a Sequence that lists its steps.
_LISTED_IN = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def parse_tokenizer_json(data: bytes, *, file: Path) -> TokenizerData:
    """The tokenizer of a tokenizer.json, once its pipeline is known to be GPT-2's and nothing else."""
    members = parse_json_object(data, file=file, error=TokenizerError)
    for field in ("truncation", "padding"):
        if members.get(field) is not None:
            warn_of("is left out: no text is cut or filled unless a call asks for it", file=file, where=field)
    _check_pipeline(members, file=file)
    model = members.get("model")
    _check_members(model, {"type": ("BPE", None), **_NEUTRAL_MODEL}, file=file, where="model")
    assert isinstance(model, dict)
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict):
        raise TokenizerError(
            "no vocabulary", file=file, where="model.vocab", expected="an object", found=kind_of(vocab)
        )
    if not isinstance(merges, list):
        raise TokenizerError("no merges", file=file, where="model.merges", expected="a list", found=kind_of(merges))
    pairs = [_merge_pair(merge, file=file, number=number) for number, merge in enumerate(merges)]
    check_twice(pairs, file=file, place=lambda n: f"model.merges[{n}]")
    added = [] if members.get("added_tokens") is None else members["added_tokens"]
    if not isinstance(added, list):
        raise TokenizerError("not a list", file=file, where="added_tokens", found=kind_of(added))
    tokens = [parse_added_token(token, file=file, where=f"added_tokens[{n}]") for n, token in enumerate(added)]
    return TokenizerData(vocab=vocab, merges=tuple(pairs), added=tuple(sorted(tokens, key=lambda token: token.id)))


def _check_pipeline(members: dict[str, Any], *, file: Path) -> None:
    """Refuse a step that changes the text, splits it otherwise, spells it otherwise or adds tokens to it."""
    for place, step in _steps(members, "normalizer", file=file):
        raise TokenizerError("changes the text first", file=file, where=place, expected="null", found=kind_of(step))
    for part, rules in _NEUTRAL_STEPS.items():
        # Fuse joins the texts of the tokens, which decoding does anyway.
        steps = [(p, s) for p, s in _steps(members, part, file=file) if part != "decoder" or kind_of(s) != "Fuse"]
        for place, step in steps or [(part, None)]:
            _check_members(step, rules, file=file, where=place)
        if len(steps) > 1:
            raise TokenizerError(
                "not GPT-2's byte-level BPE",
                file=file,
                where=part,
                expected="one ByteLevel",
                found=f"a Sequence of {len(steps)}",
            )
    for place, step in _steps(members, "post_processor", file=file):
        if kind_of(step) == "ByteLevel":
            if step.get("trim_offsets") is True:
                problem = "is not followed: a token's offsets keep the space before its word"
                warn_of(problem, file=file, where=f"{place}.trim_offsets", expected="false", found="true")
        elif not _is_bare_template(step):
            raise TokenizerError(
                "adds tokens to every text",
                file=file,
                where=place,
                expected="null or ByteLevel: GPT-J adds none",
                found=kind_of(step),
            )


def _steps(members: dict[str, Any], part: str, *, file: Path) -> list[tuple[str, Any]]:
    """The steps of a part of the pipeline with the place of each. A Sequence is what it lists, null is no step."""
    found: list[tuple[str, Any]] = []
    waiting = [] if members.get(part) is None else [(part, members[part])]
    while waiting:
        place, step = waiting.pop()
        if kind_of(step) != "Sequence":
            found.append((place, step))
            continue
        name = _LISTED_IN[part]
        if not isinstance(step.get(name), list):
            raise TokenizerError("not a list", file=file, where=f"{place}.{name}", found=kind_of(step.get(name)))
        waiting += [(f"{place}.{name}[{n}]", one) for n, one in enumerate(step[name])][::-1]
    return found


def _is_bare_template(step: Any) -> bool:
    """Whether a post-processor is a template that puts nothing around a text or a pair, as GPT-NeoX's class writes."""

    def names(items: Any) -> list[Any]:
        pieces = items if isinstance(items, list) else [None]
        sequences = [piece.get("Sequence") if isinstance(piece, dict) and len(piece) == 1 else None for piece in pieces]
        return [one.get("id") if isinstance(one, dict) else None for one in sequences]

    return (
        kind_of(step) == "TemplateProcessing"
        and names(step.get("single")) == ["A"]
        and names(step.get("pair")) == ["A", "B"]
    )


def kind_of(value: object) -> str:
    """The kind of a JSON value, for a message: its `type` member where it has one."""
    if value is None:
        return "null"
    kind = value["type"] if isinstance(value, dict) and "type" in value else type(value).__name__
    return kind[:80] if isinstance(kind, str) else spelt(kind)


def _check_members(value: object, rules: Mapping[str, tuple[Any, ...]], *, file: Path, where: str) -> None:
    """Refuse an object one of whose members has a value outside the allowed ones; an absent member counts as None."""
    if not isinstance(value, dict):
        raise TokenizerError(
            "not GPT-2's byte-level BPE", file=file, where=where, expected="an object", found=kind_of(value)
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
                found=spelt(found),
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
            found=spelt(merge),
        )
    return parts[0], parts[1]


def parse_added_token(value: object, *, file: Path, where: str, **known: Any) -> AddedToken:
    """The added token that a JSON object describes; `known` members stand for absent ones."""
    members = known | value if isinstance(value, dict) else {}
    content, token_id = members.get("content"), members.get("id")
    if not isinstance(content, str) or not content or not _is_unicode(content) or type(token_id) is not int:
        raise TokenizerError(
            "not an added token", file=file, where=where, expected="an id and a content", found=spelt(value)
        )
    flags = {}
    for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
        flags[flag] = members.get(flag, flag == "normalized" and not members.get("special", False))
        if not isinstance(flags[flag], bool):
            raise TokenizerError("not true or false", file=file, where=f"{where}.{flag}", found=spelt(flags[flag]))
    return AddedToken(content=content, id=token_id, **flags)


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
