"""generation_config.json as others write it: what takes effect, what waits, what cannot be honoured.

A file is written for many programs and many calls, so most of its oddities mean nothing: sampling settings without
do_sample, a null, an id of -1, a cache's name. None of them may keep a model from being opened. A member that the
strict rules of `GenerationConfig` do not take is kept in `extra`, and said. It waits there: `replace` offers it
again, so a temperature takes effect in the call that turns do_sample on, as in transformers. What would change the
text and cannot be honoured (`find_unhonoured`) is refused when text is asked for, by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from gptj.config.rules import is_number, plain, spelt
from gptj.errors import ConfigError, shown, warn_of
from gptj.generation.rules import (
    ASSISTANT_FIELDS,
    BEAMS_ONLY,
    CHANGES_TEXT,
    CONVERTERS,
    RULES,
    SAMPLING_ONLY,
    UNSUPPORTED,
    is_neutral,
)

__all__ = ["drop_ids_beyond", "find_unhonoured", "fit", "read_members"]

Config = TypeVar("Config", bound=Any)  # GenerationConfig, which imports this module

_METADATA = frozenset(("transformers_version", "_from_model_config", "_commit_hash"))
_ONE_ID = ("bos_token_id", "pad_token_id", "forced_bos_token_id")
_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_LISTS = (*_IDS, "bad_words_ids", "sequence_bias", "stop_strings")
_GUESSES = (*ASSISTANT_FIELDS, "prompt_lookup_num_tokens", "max_matching_ngram_size")
_WAY_ONLY = frozenset((*_GUESSES, "bos_token_id", "use_cache", "prefill_chunk_size"))
"""Fields that are about the way to the text and never about the text."""
_YIELDS = ("max_length", "penalty_alpha", "exponential_decay_length_penalty")
"""Fields that transformers does not read beside the others that they contradict."""


def read_members(
    make: Callable[..., Config],
    members: Mapping[str, Any],
    *,
    file: str | os.PathLike[str] | None = None,
    say: Callable[..., object] = warn_of,
) -> Config:
    """The config that the members of a generation_config.json describe; what has no effect in it is said.

    Args:
        make: `GenerationConfig`.
        members: of the file.
        file: what warnings name.
        say: takes what there is to say, as `warn_of` does.
    """
    offered: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    said: dict[str, ConfigError] = {}
    for key, value in members.items():
        if key in RULES:
            if value is None:
                continue
            offered[key] = value
        elif key in UNSUPPORTED and is_neutral(key, value):
            continue
        else:
            extra[key] = value
            if key in UNSUPPORTED:
                said[key] = ConfigError(f"not supported: {UNSUPPORTED[key][1]}", where=key, found=spelt(value))
            elif key not in _METADATA:
                close = difflib.get_close_matches(key, (*RULES, *UNSUPPORTED), n=1, cutoff=0.8)
                if close:
                    hint = f"Did you mean {close[0]}?"
                    said[key] = ConfigError("no field of generation", where=shown(key), hint=hint)
    for key in ASSISTANT_FIELDS:
        if key in offered:  # it waits for an argument of the call, not for a field
            extra[key] = offered.pop(key)
            said[key] = ConfigError("has no effect without an assistant model", where=key, found=spelt(extra[key]))
    config, left = fit(make, {}, offered, extra)
    refused = {str(error.where) for error in find_unhonoured(config)}
    for key, error in {**left, **said}.items():
        kept = "kept, and `generate` refuses it until the call says otherwise" if key in refused else "kept, not read"
        say(f"{error.problem}: {kept}", **error.facts(file=file))
    for key, value in offered.items():
        if key not in left and (problem := _lenient(key, value)[1]):
            say(problem, file=file, where=key, found=spelt(value))
    return config


def fit(
    make: Callable[..., Config], fields: Mapping[str, Any], offered: Mapping[str, Any], extra: Mapping[str, Any]
) -> tuple[Config, dict[str, ConfigError]]:
    """A config of `fields` and of those members of a file that the rules take beside them, the others in its `extra`.

    Args:
        make: `GenerationConfig`.
        fields: what a call says.
        offered: members that are fields, as the file has them.
        extra: members that are none.

    Returns:
        The config, and for each member that was left why.

    Raises:
        ConfigError: `fields` alone break a rule.
    """
    taken = {key: _lenient(key, value)[0] for key, value in offered.items()}
    left: dict[str, ConfigError] = {}
    while True:
        try:
            waiting = {key: offered[key] for key in left}
            return make(**{**fields, **taken}, extra={**extra, **waiting}), left
        except ConfigError as error:
            # Groups of beams lack a penalty that the file does not name: it is the groups that do not fit.
            culprits = (error.where, "num_beam_groups" if error.where == "diversity_penalty" else None)
            culprit = next((where for where in culprits if where in taken), None)
            if culprit is None:
                raise
            if culprit != error.where:
                rule, value = f"{error.where} {error.expected}", spelt(taken[culprit])
                error = ConfigError(error.problem, where=culprit, expected=rule, found=value)
            del taken[culprit]
            left[culprit] = error


def find_unhonoured(config: Any) -> Iterator[ConfigError]:
    """An error for each member in `config.extra` that would change the text if it could be honoured."""
    for key, value in config.extra.items():
        problem: ConfigError | None = None
        if key in CHANGES_TEXT and not is_neutral(key, value):
            problem = ConfigError(f"not supported: {UNSUPPORTED[key][1]}")
        elif key in RULES and not _has_no_effect(config, key):
            try:
                dataclasses.replace(config, **{key: _lenient(key, value)[0]}, extra={})
            except ConfigError as error:
                yields = key in _YIELDS and RULES[key][0](_convert(key, value))
                problem = None if yields or error.problem.startswith("has no effect") else error
        if problem is not None:
            hint = f"Say otherwise in the call: {key}=None, or a generation_config of its own"
            yield ConfigError(
                f"is asked for by the model's generation_config.json and cannot be honoured: {problem.problem}",
                **problem.facts(where=key, found=spelt(value), hint=hint),
            )


def _has_no_effect(config: Any, key: str) -> bool:
    """Whether the field is not read beside the others, whatever it holds."""
    return (
        key in _WAY_ONLY
        or (key == "max_length" and config.max_new_tokens is not None)
        or (key in SAMPLING_ONLY and not config.do_sample and not (key == "top_k" and config.penalty_alpha))
        or (key in BEAMS_ONLY and config.num_beams == 1 and key != "num_beam_groups")
    )


def drop_ids_beyond(
    config: Config,
    vocab_size: int,
    *,
    file: str | os.PathLike[str] | None = None,
    say: Callable[..., object] = warn_of,
) -> Config:
    """The config without the token ids that a vocabulary does not have; each field that loses one is said."""
    changes: dict[str, Any] = {}
    for field in (*_ONE_ID, *_IDS, "bad_words_ids", "sequence_bias"):
        value = getattr(config, field)
        entries = value if isinstance(value, tuple) else () if value is None else (value,)
        beyond = [entry for entry in entries if max(_ids_of(field, entry)) >= vocab_size]
        if beyond:
            say(
                "beyond the vocabulary: left out",
                file=file,
                where=field,
                expected=f"0 to {vocab_size - 1}",
                found=spelt(beyond[0] if len(beyond) == 1 else beyond),
            )
            kept = tuple(entry for entry in entries if entry not in beyond)
            single = field in _ONE_ID or (field in ("eos_token_id", "forced_eos_token_id") and len(kept) == 1)
            changes[field] = None if not kept else kept[0] if single else kept
    if not changes:
        return config
    fields = {field: getattr(config, field) for field in RULES} | changes
    waiting = ("exponential_decay_length_penalty",)  # it needs an eos
    offered = {field: fields.pop(field) for field in waiting if fields[field] is not None}
    return fit(type(config), fields, offered, config.extra)[0]


def _ids_of(field: str, entry: Any) -> tuple[int, ...]:
    """The token ids of one entry of a field: an id, a word, or a sequence with its bias."""
    return (entry,) if isinstance(entry, int) else entry[0] if field == "sequence_bias" else entry


def _convert(field: str, value: Any) -> Any:
    value = plain(_lenient(field, value)[0])
    return CONVERTERS[field](field, value) if field in CONVERTERS and value is not None else value


def _lenient(field: str, value: Any) -> tuple[Any, str | None]:
    """A file's value as it is meant, and what is odd about it: 1.0 for 1, 0 for false, -1 for no token, [] for none."""
    if field in _LISTS and isinstance(value, list | dict) and not value:
        return None, "empty: it has no effect"
    if field in (*_ONE_ID, *_IDS):
        return _lenient_ids(field, value)
    if field == "bad_words_ids" and isinstance(value, list) and all(isinstance(word, list) for word in value):
        words = [[_as_whole(i) for i in word] for word in value if word]
        return words or None, None if words == value and _same_types(words, value) else "not written as token ids"
    holds = RULES[field][0]
    if holds(value):
        return value, None
    if holds(_as_whole(value)):
        return _as_whole(value), "not written as a whole number"
    if is_number(value) and value in (0, 1) and holds(bool(value)):
        return bool(value), "a number in place of true or false"
    return value, None


def _lenient_ids(field: str, value: Any) -> tuple[Any, str | None]:
    listed = value if isinstance(value, list) else [value]
    ids = [_as_whole(one) for one in listed]
    kept = [one for one in ids if not (is_number(one) and one < 0)]
    if len(kept) < len(ids):
        problem: str | None = "no token id: left out"
    else:
        problem = None if _same_types(ids, listed) else "not written as a whole number"
    if not kept:
        return None, problem
    if field in _ONE_ID and isinstance(value, list) and len(kept) == 1:
        return kept[0], "a list in place of an id"
    return kept if isinstance(value, list) else kept[0], problem


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and is_number(value) and value.is_integer() else value


def _same_types(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same_types(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other)
