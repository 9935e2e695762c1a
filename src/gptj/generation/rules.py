"""Each field's own rule: how its value is kept, whether it holds, and the rule in words.

A number has a ceiling where more than that cannot be meant and would take all memory or time (beams, copies,
guesses), and where it would overflow or vanish on the way (penalties, biases, the exponent of a length).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptj.config.rules import is_number, is_text, is_whole, plain, spelt
from gptj.errors import ConfigError, shown

__all__ = [
    "ASSISTANT_FIELDS",
    "BEAMS_ONLY",
    "CHANGES_TEXT",
    "CONVERTERS",
    "RULES",
    "SAMPLING_ONLY",
    "UNSUPPORTED",
    "did_you_mean",
    "is_neutral",
    "known_members",
]

SAMPLING_ONLY = ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_k")
BEAMS_ONLY = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
ASSISTANT_FIELDS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")

UNSUPPORTED: dict[str, tuple[object, str]] = {
    "decoder_start_token_id": (None, "GPT-J has no encoder"),
    "token_healing": (False, "it re-tokenises the prompt; do that before the call"),
    "guidance_scale": (None, "classifier-free guidance is not implemented"),
    "watermarking_config": (None, "watermarks are not implemented"),
    "cache_implementation": (None, "there is one cache: preallocated, bounds-checked"),
    "cache_config": (None, "there is one cache: preallocated, bounds-checked"),
    "return_legacy_cache": (None, "the cache does not leave the call"),
    "compile_config": (None, "compilation is the backend's, not the call's"),
    "disable_compile": (False, "compilation is the backend's, not the call's"),
    "low_memory": (None, "it traded time for memory in one search of older versions"),
    "dola_layers": (None, "DoLa is not implemented"),
    "constraints": (None, "constrained beam search is not implemented"),
    "force_words_ids": (None, "constrained beam search is not implemented"),
    "forced_decoder_ids": (None, "tokens are not forced at given places"),
    "assistant_early_exit": (None, "GPT-J has no exits before its last block"),
    "assistant_lookbehind": (10, "both models must share one tokenizer"),
    "target_lookbehind": (10, "both models must share one tokenizer"),
    "synced_gpus": (False, "processes that share a model are kept in step by its strategy"),
    "negative_prompt_ids": (None, "classifier-free guidance is not implemented"),
    "negative_prompt_attention_mask": (None, "classifier-free guidance is not implemented"),
    "custom_generate": (None, "no code of a repository is ever run"),
}
"""Fields of transformers that are refused unless they hold this default (or null), and why."""

CHANGES_TEXT = frozenset(
    (
        "token_healing",
        "guidance_scale",
        "watermarking_config",
        "dola_layers",
        "constraints",
        "force_words_ids",
        "forced_decoder_ids",
    )
)
"""The unsupported fields without which another text is made; the others choose a cache, a compiler or guesses."""


def is_neutral(field: str, value: object) -> bool:
    """Whether an unsupported field's value asks for nothing."""
    if field == "guidance_scale" and is_number(value) and value == 1:
        return True
    empty = value is None or value is False or (isinstance(value, str | list | dict) and not value)
    return empty or (type(value) is type(UNSUPPORTED[field][0]) and value == UNSUPPORTED[field][0])


_SCHEDULES = ("constant", "heuristic", "heuristic_transient")

_LARGEST_TOKEN_ID = 2**31 - 1
_LARGEST_COUNT = 2**31 - 1
_LARGEST_PADDING = 2**20 - 1  # it may lie outside of the model's vocabulary, but of no tokenizer's: none has more
_MOST_BEAMS = 4096
_MOST_RETURNED = 2**16
_MOST_POSITIONS = 2**24  # of a model: longer guesses, ngrams and chunks there are none
_FACTORS = (1e-6, 1e6)  # beyond these a float32 logit may leave float64 or vanish
_SMALLEST_SUBTRACTED = 1e-30
_LARGEST_BIAS = 1e30  # finite in float32, which scores are returned in
_LARGEST_EXPONENT = 40  # of a length: 2**24 tokens to this power are a float64


def _is_token_ids(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(is_whole(i, 0, _LARGEST_TOKEN_ID) for i in value)


def _is_token_id_or_ids(value: object) -> bool:
    return value is None or is_whole(value, 0, _LARGEST_TOKEN_ID) or _is_token_ids(value)


def _to_tuple(field: str, value: Any) -> Any:
    """A list, set or array of whole numbers as a tuple of ints; anything else as it came, for the rule to judge."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple | set | frozenset):
        return plain(value)
    items = [plain(one) for one in value]
    unordered = isinstance(value, set | frozenset) and all(isinstance(one, int) for one in items)
    return tuple(sorted(items) if unordered else items)


def _to_words(field: str, value: Any) -> Any:
    return tuple(_to_tuple(field, word) for word in value) if isinstance(value, list | tuple) else value


def _to_biases(field: str, value: Any) -> Any:
    """A dict {(ids): bias} or a list [[ids, bias], ...] as ((ids, bias), ...)."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        return tuple((_to_tuple(field, ids), plain(bias)) for ids, bias in pairs)
    except (TypeError, ValueError):
        return value


def _to_strings(field: str, value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value


CONVERTERS = {
    "eos_token_id": _to_tuple,
    "forced_eos_token_id": _to_tuple,
    "suppress_tokens": _to_tuple,
    "begin_suppress_tokens": _to_tuple,
    "exponential_decay_length_penalty": _to_tuple,
    "bad_words_ids": _to_words,
    "sequence_bias": _to_biases,
    "stop_strings": _to_strings,
}
"""How a list is brought into the form that is kept."""


def _is_biases(value: object) -> bool:
    pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    if not isinstance(value, tuple) or not value or not pairs:
        return False
    if not all(_is_token_ids(ids) and is_number(bias) and abs(bias) <= _LARGEST_BIAS for ids, bias in value):
        return False
    return len({ids for ids, _ in value}) == len(value)


def _is_decay(value: object) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and is_whole(value[0], 0, _LARGEST_COUNT) and _is_factor(value[1])
    )


_Rule = tuple[Any, str]  # (does the value hold?, the rule in words)


def _is_factor(value: object) -> bool:
    return is_number(value) and _FACTORS[0] <= value <= _FACTORS[1]  # type: ignore[operator]


def _whole(lowest: int, *, null: bool = False, highest: int = _LARGEST_COUNT) -> _Rule:
    words = f"a whole number, {lowest} " + ("or above" if highest == _LARGEST_COUNT else f"to {highest}")
    return (lambda v: (null and v is None) or is_whole(v, lowest, highest)), ("null or " if null else "") + words


def _number(words: str, holds: Any, *, null: bool = False) -> _Rule:
    return (lambda v: (null and v is None) or (is_number(v) and holds(v))), ("null or " if null else "") + words


_FLAG: _Rule = ((lambda v: isinstance(v, bool)), "true or false")
_TOKEN: _Rule = ((lambda v: v is None or is_whole(v, 0, _LARGEST_TOKEN_ID)), "null or a token id, 0 or above")
_TOKEN_OR_TOKENS: _Rule = (_is_token_id_or_ids, "null, a token id, 0 or above, or a list of them")
_TOKENS: _Rule = ((lambda v: v is None or _is_token_ids(v)), "null or a list of token ids, 0 or above")
_FACTOR = _number(f"a number, {_FACTORS[0]:g} to {_FACTORS[1]:g}", _is_factor)
_CUTOFF = _number("a number, 0 to below 1", lambda v: 0 <= v < 1)
_MASS = _number("a number above 0, at most 1", lambda v: 0 < v <= 1)

RULES: dict[str, _Rule] = {
    "max_length": _whole(1, null=True),
    "max_new_tokens": _whole(1, null=True),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0, null=True),
    "max_time": _number("seconds, above 0", lambda v: v > 0, null=True),
    "stop_strings": (
        lambda v: v is None or (isinstance(v, tuple) and bool(v) and all(isinstance(s, str) and is_text(s) for s in v)),
        "null or strings that are not empty and have no lone surrogate",
    ),
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN_OR_TOKENS,
    "pad_token_id": (
        lambda v: v is None or is_whole(v, 0, _LARGEST_PADDING),
        f"null or a token id, 0 to {_LARGEST_PADDING}",
    ),
    "do_sample": _FLAG,
    "num_beams": _whole(1, highest=_MOST_BEAMS),
    "num_beam_groups": _whole(1, highest=_MOST_BEAMS),
    "diversity_penalty": _number(
        f"0, or {_SMALLEST_SUBTRACTED:g} to {_FACTORS[1]:g}",
        lambda v: v == 0 or _SMALLEST_SUBTRACTED <= v <= _FACTORS[1],
    ),
    "length_penalty": _number(
        f"a number, {-_LARGEST_EXPONENT} to {_LARGEST_EXPONENT}", lambda v: abs(v) <= _LARGEST_EXPONENT
    ),
    "early_stopping": (
        lambda v: isinstance(v, bool) or (isinstance(v, str) and v == "never"),
        'true, false or "never"',
    ),
    "penalty_alpha": _number("a number, 0 to 1", lambda v: 0 <= v <= 1, null=True),
    "prompt_lookup_num_tokens": _whole(1, null=True, highest=_MOST_POSITIONS),
    "max_matching_ngram_size": _whole(1, null=True, highest=_MOST_POSITIONS),
    "num_assistant_tokens": _whole(1, highest=_MOST_POSITIONS),
    "num_assistant_tokens_schedule": (
        lambda v: isinstance(v, str) and v in _SCHEDULES,
        "one of " + ", ".join(_SCHEDULES),
    ),
    "assistant_confidence_threshold": _number("a number, 0 to 1", lambda v: 0 <= v <= 1),
    "num_return_sequences": _whole(1, highest=_MOST_RETURNED),
    "use_cache": _FLAG,
    "prefill_chunk_size": _whole(1, null=True, highest=_MOST_POSITIONS),
    "sequence_bias": (
        lambda v: v is None or _is_biases(v),
        "null or pairs of token ids, each sequence once, and a finite bias",
    ),
    "encoder_repetition_penalty": _FACTOR,
    "repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _whole(0, highest=_MOST_POSITIONS),
    "encoder_no_repeat_ngram_size": _whole(0, highest=_MOST_POSITIONS),
    "bad_words_ids": (
        lambda v: v is None or (isinstance(v, tuple) and bool(v) and all(_is_token_ids(word) for word in v)),
        "null or lists of token ids, 0 or above",
    ),
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _TOKEN_OR_TOKENS,
    "remove_invalid_values": _FLAG,
    "exponential_decay_length_penalty": (
        lambda v: v is None or _is_decay(v),
        f"null or [start, factor], start 0 or above, factor {_FACTORS[0]:g} to {_FACTORS[1]:g}",
    ),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "temperature": _number(f"0 (greedy), or {_FACTORS[0]:g} to {_FACTORS[1]:g}", lambda v: v == 0 or _is_factor(v)),
    "top_k": _whole(0),
    "top_p": _MASS,
    "min_p": _number("a number, 0 to 1", lambda v: 0 <= v <= 1, null=True),
    "typical_p": _MASS,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "renormalize_logits": _FLAG,
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
    "output_hidden_states": _FLAG,
    "output_attentions": _FLAG,
}
"""Each field's rule: does the value hold, and the rule in words."""


def did_you_mean(fields: Mapping[str, Any], key: str) -> str:
    """`Did you mean top_k?` where `key` is one slip away from a field, else nothing."""
    close = difflib.get_close_matches(key, fields.keys() | UNSUPPORTED.keys(), n=1, cutoff=0.8)
    return f"Did you mean {close[0]}?" if close else ""


def known_members(fields: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """`members` without the unsupported fields that hold their default; refuses the others, and unknown ones."""
    known = {}
    for key, value in members.items():
        if key in UNSUPPORTED:
            default, reason = UNSUPPORTED[key]
            if value is not None and (default is None or value != default):
                raise ConfigError(f"not supported: {reason}", where=key, expected=spelt(default), found=spelt(value))
        elif key in fields or key == "extra":
            known[key] = value
        else:
            raise ConfigError("no such field", where=shown(key), hint=did_you_mean(fields, key) or None)
    return known
