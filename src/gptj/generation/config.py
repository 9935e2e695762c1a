"""GenerationConfig: how text is made, before any model: frozen, validated, generation_config.json in and out.

Field names and defaults are transformers' (4.57, `GenerationConfig`), and so are the meanings unless a field's
line below begins with "Differs". Nothing is ignored: a field that has no effect beside the others (a beam
option without beams, a temperature without sampling) is refused with the field that it waits for, and a field
of transformers that is not honoured here at all (`UNSUPPORTED`) is refused with the reason.

So that an override of a call stays one word, `replace` returns to their defaults those fields that only the
former strategy read: `GenerationConfig(do_sample=True, top_p=0.9).replace(do_sample=False)` is plain greedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, Unpack

import numpy as np

from gptj.brief import brief, html_table
from gptj.config import GPTJConfig
from gptj.errors import ConfigError, InputError, naming_file, shown
from gptj.generation.fields import GenerationFields
from gptj.json_file import read_json_object

__all__ = ["ASSISTANT_FIELDS", "GENERATION_CONFIG_FILE", "UNSUPPORTED", "GenerationConfig", "Strategy"]

GENERATION_CONFIG_FILE = "generation_config.json"

Strategy = Literal["greedy", "sample", "beam", "beam_sample", "group_beam", "contrastive"]
"""What `GenerationConfig.strategy` may be; "greedy" and "sample" may also be assisted."""

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
    "assistant_early_exit": (None, "GPT-J has no exits before its last block"),
    "assistant_lookbehind": (10, "both models must share one tokenizer"),
    "target_lookbehind": (10, "both models must share one tokenizer"),
}
"""Fields of transformers that are refused unless they hold this default (or null), and why."""

_SAMPLING_ONLY = ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_k")
_BEAMS_ONLY = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
ASSISTANT_FIELDS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
_OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
_METADATA = frozenset(("transformers_version", "_from_model_config", "_commit_hash"))
_SCHEDULES = ("constant", "heuristic", "heuristic_transient")

_LARGEST_TOKEN_ID = 2**31 - 1
_LARGEST_COUNT = 2**31 - 1
_LONGEST_SHOWN = 200
_TEMPERATURES = (1e-6, 1e6)  # beyond these a float32 logit may leave float64 or vanish; 0 is greedy, by definition


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class GenerationConfig:
    """How the next tokens are chosen, and when to stop.

    Lists may be given as lists; they are kept as tuples.

    Length:
        max_length: columns of the longest result, prompt and padding included. Differs: the default is None, which
            means 20 new tokens, or as many as the model has positions for.
        max_new_tokens: the same counted after the prompt. Only one of the two may be set.
        min_length, min_new_tokens: until then no eos is chosen; min_length counts columns as max_length does.
        max_time: seconds after which no further step is begun.
        stop_strings: a row ends after the token that completes one of these in the text of its new tokens. The call
            must be given `decode`.
        eos_token_id, pad_token_id: a row ends after any eos; the rest of its columns is pad, by default the first eos.
        bos_token_id: kept, and read by forced_bos_token_id's users; GPT-J starts from the prompt.

    Strategy:
        do_sample: draw the tokens rather than take the best.
        num_beams: beams of beam search; 1 is none.
        num_beam_groups, diversity_penalty: diverse groups of beams (arXiv:1610.02424).
        length_penalty: a hypothesis' score is its log probability / length ** length_penalty.
        early_stopping: True ends a search when it has num_beams hypotheses, False also when the best running beam
            cannot win at its present length, "never" only when it cannot win at any length.
        penalty_alpha: with top_k above 1, contrastive search (arXiv:2202.06417).
        prompt_lookup_num_tokens, max_matching_ngram_size: guess that many tokens by finding the last ngram (of 2
            by default) earlier in the row, and keep the guesses that the model itself would have chosen.
        num_assistant_tokens, num_assistant_tokens_schedule, assistant_confidence_threshold: how many tokens the
            assistant model guesses a round. "heuristic": 2 more after a round all of whose guesses were right, else 1
            fewer. A guess that the assistant gives less than the threshold ends its round.
        num_return_sequences: rows returned for each prompt.
        use_cache: False computes every step from the start: slow, and the same.
        prefill_chunk_size: the prompt enters the cache in chunks of this many tokens.

    Logits, in the order in which they are applied:
        sequence_bias: ((ids, bias), ...): added to the last id's logit where the ids before it have just been made.
        diversity_penalty: see above.
        encoder_repetition_penalty, repetition_penalty: a positive logit of a token of the prompt, or of the row so
            far, is divided by it and a negative one multiplied (the encoder's: the other way round).
        no_repeat_ngram_size, encoder_no_repeat_ngram_size: no ngram of this size twice in a row, or again from the
            prompt.
        bad_words_ids: sequences that are never completed; one that is just an eos is skipped.
        forced_bos_token_id: the only second token of a row whose prompt is one token.
        forced_eos_token_id: the only last token, at max_length.
        remove_invalid_values: NaN becomes 0 and infinities float32's extremes; otherwise they are an error.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens eos grows by factor ** more.
        suppress_tokens, begin_suppress_tokens: never chosen; not chosen as first new token.
        temperature: divides the logits; 0 is greedy. top_k: the k best and all that equal the k-th (0: all).
        top_p: the fewest best tokens with that much probability. min_p: those with at least min_p times the best's.
        typical_p: arXiv:2202.00666. epsilon_cutoff, eta_cutoff: arXiv:2210.15191.
        renormalize_logits: log_softmax at the end.

    Output:
        return_dict_in_generate: a `GenerateOutput` and not just its sequences.
        output_scores, output_logits, output_hidden_states, output_attentions: what it holds besides.
        extra: unknown keys of generation_config.json, kept and written back.

    Raises:
        ConfigError: a field breaks its rule or has no effect. The message names the field, the rule and the value.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: tuple[str, ...] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    do_sample: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4
    num_return_sequences: int = 1
    use_cache: bool = True
    prefill_chunk_size: int | None = None

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    renormalize_logits: bool = False

    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _given: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, **fields: Any) -> Self:
        """A config that knows which fields it was given; see `named`."""
        self = object.__new__(cls)
        object.__setattr__(self, "_given", frozenset(fields))
        return self

    def __post_init__(self) -> None:
        self._settle_null()
        for field, settle in _SETTLE.items():
            if getattr(self, field) is not None:
                object.__setattr__(self, field, settle(field, getattr(self, field)))
        object.__setattr__(self, "extra", dict(self.extra))
        for field, (holds, rule) in _RULES.items():
            if not holds(getattr(self, field)):
                _refuse(field, rule, getattr(self, field))
        self._require_together()

    def __repr__(self) -> str:
        told = {name: getattr(self, name) for name in _DEFAULTS} | ({"extra": self.extra} if self.extra else {})
        changed = (f"{name}={value!r}" for name, value in told.items() if value != _DEFAULTS.get(name))
        return f"{type(self).__name__}({', '.join(changed)})"

    def _repr_html_(self) -> str:
        """The fields that are not as by default, for a notebook."""
        rows = [(name, brief(value)) for name in _DEFAULTS if (value := getattr(self, name)) != _DEFAULTS[name]]
        return html_table(type(self).__name__, rows, ("field", "value"))

    def __hash__(self) -> int:
        return hash(self.to_json())

    # ---- what follows from the fields

    @property
    def named(self) -> dict[str, Any]:
        """The fields that it was made with, whether or not their values are the defaults; `extra` is none."""
        return {field: getattr(self, field) for field in _DEFAULTS if field in self._given}

    @property
    def strategy(self) -> Strategy:
        """Which loop runs. Sampling at temperature 0 is greedy."""
        if self.penalty_alpha:
            return "contrastive"
        if self.num_beams > 1:
            return "group_beam" if self.num_beam_groups > 1 else "beam_sample" if self.do_sample else "beam"
        return "sample" if self.do_sample and self.temperature > 0 else "greedy"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """eos_token_id as a tuple: empty for None."""
        return _as_tuple(self.eos_token_id)

    @property
    def padding_id(self) -> int | None:
        """What fills a row after its end: pad_token_id, else the first eos, else None."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_token_ids), None)

    def total_length(self, prompt_columns: int, n_positions: int) -> int:
        """Columns of the longest result, for a prompt of `prompt_columns`.

        Raises:
            InputError: the model has fewer positions, or there is no room for one new token.

        >>> GenerationConfig(max_new_tokens=7).total_length(5, 2048)
        12
        """
        if self.max_new_tokens is not None:
            field, total = "max_new_tokens", prompt_columns + self.max_new_tokens
        elif self.max_length is not None:
            field, total = "max_length", self.max_length
        else:
            field, total = "input_ids", min(prompt_columns + 20, n_positions)
        if total > n_positions:
            raise InputError(
                "longer than the model's positions",
                where=field,
                expected=f"at most n_positions = {n_positions} columns",
                found=f"{prompt_columns} of the prompt + {total - prompt_columns} new",
            )
        if total <= prompt_columns:
            raise InputError(
                "leaves no room for a new token",
                where=field,
                expected=f"above the prompt's {prompt_columns}",
                found=total,
            )
        return total

    def check_vocabulary(self, vocab_size: int) -> None:
        """Make sure that every token id that generation reads is one that the model has.

        Raises:
            InputError: naming the field and the id. pad_token_id may lie outside: it only fills.
        """
        ids: dict[str, Iterable[int]] = {
            "eos_token_id": self.eos_token_ids,
            "forced_bos_token_id": _as_tuple(self.forced_bos_token_id),
            "forced_eos_token_id": _as_tuple(self.forced_eos_token_id),
            "suppress_tokens": self.suppress_tokens or (),
            "begin_suppress_tokens": self.begin_suppress_tokens or (),
            "bad_words_ids": (i for word in self.bad_words_ids or () for i in word),
            "sequence_bias": (i for sequence, _ in self.sequence_bias or () for i in sequence),
        }
        for field, values in ids.items():
            for value in values:
                if value >= vocab_size:
                    raise InputError("no such token", where=field, expected=f"0 to {vocab_size - 1}", found=value)

    def require_defaults(self, fields: Iterable[str], needed: str, *, but: Iterable[str] = ()) -> None:
        """Make sure that `fields`, which have no effect without `needed`, hold their defaults.

        Raises:
            ConfigError: naming the first that does not.
        """
        for field in fields:
            value = getattr(self, field)
            greedy = field == "temperature" and value == 0 and self.num_beams == 1
            if field not in but and not greedy and value != _DEFAULTS[field]:
                raise ConfigError(
                    f"has no effect without {needed}",
                    where=field,
                    expected=_spelt(_DEFAULTS[field]),
                    found=_spelt(value),
                )

    # ---- copies, and generation_config.json

    def replace(self, **changes: Unpack[GenerationFields]) -> GenerationConfig:
        """A copy with some fields changed, validated anew.

        max_length and max_new_tokens replace each other. Where do_sample, num_beams or penalty_alpha changes, the
        fields that the new strategy does not read go back to their defaults unless they are named too.

        Raises:
            ConfigError: an unknown or unsupported field, or one that breaks its rule.
        """
        changed = _known_members(changes)
        for one, other in (("max_length", "max_new_tokens"), ("max_new_tokens", "max_length")):
            if changed.get(one) is not None:
                changed.setdefault(other, None)
        merged = {field: changed.get(field, getattr(self, field)) for field in _DEFAULTS}
        reset: list[str] = []
        if "do_sample" in changed and not merged["do_sample"]:
            reset += [f for f in _SAMPLING_ONLY if f != "top_k" or not merged["penalty_alpha"]]
        if "num_beams" in changed and merged["num_beams"] == 1:
            reset += _BEAMS_ONLY
        forgotten = {field: _DEFAULTS[field] for field in reset if field not in changed}
        copy = dataclasses.replace(self, **changed, **forgotten)
        object.__setattr__(copy, "_given", (self._given | changed.keys()) - forgotten.keys())
        return copy

    @classmethod
    def from_dict(cls, members: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> GenerationConfig:
        """The config that the members of a generation_config.json describe; `file` is what errors name.

        Raises:
            ConfigError: a misspelt or unsupported key, or a field that breaks its rule.
        """
        with naming_file(file):
            fields = {key: value for key, value in members.items() if key in _DEFAULTS or key in UNSUPPORTED}
            extra = {key: value for key, value in members.items() if key not in fields}
            for key in extra.keys() - _METADATA:
                if meant := _did_you_mean(key):
                    raise ConfigError("unknown key", where=shown(key), hint=meant)
            return cls(**_known_members(fields), extra=extra)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """The config in `path`: a generation_config.json, or the folder that holds one."""
        path = Path(path)
        if path.is_dir():
            path = path / GENERATION_CONFIG_FILE
        return cls.from_dict(read_json_object(path, error=ConfigError), file=path)

    @classmethod
    def from_model_config(cls, config: GPTJConfig) -> GenerationConfig:
        """The defaults for a model that brings no generation_config.json: its bos, eos and pad ids.

        An eos or bos that its vocabulary does not have is left out: it could never be made.
        """
        eos = tuple(i for i in config.eos_token_ids if i < config.vocab_size)
        bos = config.bos_token_id
        return cls(
            bos_token_id=bos if bos is not None and bos < config.vocab_size else None,
            eos_token_id=None if not eos else eos[0] if len(eos) == 1 else eos,
            pad_token_id=config.pad_token_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """The members of generation_config.json: the fields that are not at their defaults, and `extra` as it came."""
        members = {
            field: getattr(self, field) for field, default in _DEFAULTS.items() if getattr(self, field) != default
        }
        return {**self.extra, **members}

    def to_json(self) -> str:
        """The text of generation_config.json: sorted keys, two spaces, a newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    # ---- rules

    def _settle_null(self) -> None:
        """Give a field that was set to None, where that is transformers' way to say "off", its default."""
        for field, default in _DEFAULTS.items():
            if getattr(self, field) is None and default is not None:
                object.__setattr__(self, field, 0 if field == "top_k" else default)

    def _require_together(self) -> None:
        """Refuse fields that contradict each other, or that have no effect beside the others."""
        if self.max_length is not None and self.max_new_tokens is not None:
            _refuse("max_length", "unset, since max_new_tokens is set", self.max_length)
        contrastive = bool(self.penalty_alpha)
        if contrastive and (self.do_sample or self.num_beams > 1 or self.top_k < 2):
            _refuse("penalty_alpha", "do_sample false, num_beams 1 and top_k above 1 beside it", self.penalty_alpha)
        if not self.do_sample:
            allowed = ("top_k",) if contrastive else ()
            self.require_defaults(_SAMPLING_ONLY, "do_sample", but=allowed)
        if self.num_beams == 1:
            self.require_defaults(_BEAMS_ONLY, "num_beams above 1")
        elif self.temperature == 0:
            _refuse("temperature", "above 0 beside num_beams above 1", self.temperature)
        self._require_groups()
        self._require_counts()
        if not self.return_dict_in_generate:
            self.require_defaults(_OUTPUTS, "return_dict_in_generate")
        if self.prefill_chunk_size is not None and (contrastive or self.output_hidden_states or self.output_attentions):
            rule = "null beside hidden states or attentions of the prompt"
            _refuse("prefill_chunk_size", rule, self.prefill_chunk_size)
        if self.exponential_decay_length_penalty is not None and not self.eos_token_ids:
            _refuse(
                "exponential_decay_length_penalty", "an eos_token_id beside it", self.exponential_decay_length_penalty
            )

    def _require_groups(self) -> None:
        groups = self.num_beam_groups
        if groups == 1:
            self.require_defaults(("diversity_penalty",), "num_beam_groups above 1")
            return
        if self.num_beams % groups:
            _refuse("num_beam_groups", f"a divisor of num_beams = {self.num_beams}", groups)
        if self.do_sample:
            _refuse("num_beam_groups", "1 beside do_sample", groups)
        if self.diversity_penalty == 0:
            _refuse("diversity_penalty", "above 0, or all groups are the same", self.diversity_penalty)

    def _require_counts(self) -> None:
        rows = self.num_return_sequences
        if self.strategy in ("greedy", "contrastive") and rows > 1:
            _refuse("num_return_sequences", f"1 for {self.strategy}, which has one answer", rows)
        if self.num_beams > 1 and rows > self.num_beams:
            _refuse("num_return_sequences", f"at most num_beams = {self.num_beams}", rows)
        if self.prompt_lookup_num_tokens is None:
            self.require_defaults(("max_matching_ngram_size",), "prompt_lookup_num_tokens")
        elif self.strategy not in ("greedy", "sample"):
            _refuse("prompt_lookup_num_tokens", f"null beside {self.strategy}", self.prompt_lookup_num_tokens)


_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(GenerationConfig) if field.name != "extra"
}


def _spelt(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def _refuse(field: str, rule: str, value: object) -> NoReturn:
    raise ConfigError("breaks its rule", where=field, expected=rule, found=_spelt(value))


def _as_tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _did_you_mean(key: str) -> str:
    """`Did you mean top_k?` where `key` is one slip away from a field, else nothing."""
    close = difflib.get_close_matches(key, _DEFAULTS.keys() | UNSUPPORTED.keys(), n=1, cutoff=0.8)
    return f"Did you mean {close[0]}?" if close else ""


def _known_members(members: Mapping[str, Any]) -> dict[str, Any]:
    """`members` without the unsupported fields that hold their default; refuses the others, and unknown ones."""
    known = {}
    for key, value in members.items():
        if key in UNSUPPORTED:
            default, reason = UNSUPPORTED[key]
            if value is not None and value != default:
                raise ConfigError(f"not supported: {reason}", where=key, expected=_spelt(default), found=_spelt(value))
        elif key in _DEFAULTS or key == "extra":
            known[key] = value
        else:
            raise ConfigError("no such field", where=shown(key), hint=_did_you_mean(key) or None)
    return known


# ---- the fields' own rules


def _is_int(value: object, lowest: int = 0, highest: int = _LARGEST_COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(_is_int(i, 0, _LARGEST_TOKEN_ID) for i in value)


def _is_token_id_or_ids(value: object) -> bool:
    return value is None or _is_int(value, 0, _LARGEST_TOKEN_ID) or _is_token_ids(value)


def _listed(field: str, value: Any) -> Any:
    """A list, set or array of whole numbers as a tuple of ints; anything else as it came, for the rule to judge."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return tuple(int(i) if isinstance(i, np.integer) else i for i in items)
    return int(value) if isinstance(value, np.integer) else value


def _listed_words(field: str, value: Any) -> Any:
    return tuple(_listed(field, word) for word in value) if isinstance(value, list | tuple) else value


def _listed_biases(field: str, value: Any) -> Any:
    """A dict {(ids): bias} or a list [[ids, bias], ...] as ((ids, bias), ...)."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        return tuple((_listed(field, ids), bias) for ids, bias in pairs)
    except (TypeError, ValueError):
        return value


def _listed_strings(field: str, value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value


_SETTLE = {
    "eos_token_id": _listed,
    "forced_eos_token_id": _listed,
    "suppress_tokens": _listed,
    "begin_suppress_tokens": _listed,
    "exponential_decay_length_penalty": _listed,
    "bad_words_ids": _listed_words,
    "sequence_bias": _listed_biases,
    "stop_strings": _listed_strings,
}
"""How a list is brought into the form that is kept."""


def _is_biases(value: object) -> bool:
    pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    if not isinstance(value, tuple) or not value or not pairs:
        return False
    once = len({pair[0] for pair in value}) == len(value)
    return once and all(_is_token_ids(ids) and _is_number(bias) for ids, bias in value)


def _is_decay(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_int(value[0]) and _is_number(value[1]) and value[1] > 0


_Rule = tuple[Any, str]  # (does the value hold?, the rule in words)


def _whole(lowest: int, *, null: bool = False) -> _Rule:
    words = f"a whole number, {lowest} or above"
    return (lambda v: (null and v is None) or _is_int(v, lowest)), ("null or " if null else "") + words


def _number(words: str, holds: Any, *, null: bool = False) -> _Rule:
    return (lambda v: (null and v is None) or (_is_number(v) and holds(v))), ("null or " if null else "") + words


_FLAG: _Rule = ((lambda v: isinstance(v, bool)), "true or false")
_TOKEN: _Rule = ((lambda v: v is None or _is_int(v, 0, _LARGEST_TOKEN_ID)), "null or a token id, 0 or above")
_TOKEN_OR_TOKENS: _Rule = (_is_token_id_or_ids, "null, a token id, 0 or above, or a list of them")
_TOKENS: _Rule = ((lambda v: v is None or _is_token_ids(v)), "null or a list of token ids, 0 or above")
_POSITIVE = _number("a finite number above 0", lambda v: v > 0)
_CUTOFF = _number("a number, 0 to below 1", lambda v: 0 <= v < 1)
_MASS = _number("a number above 0, at most 1", lambda v: 0 < v <= 1)

_RULES: dict[str, _Rule] = {
    "max_length": _whole(1, null=True),
    "max_new_tokens": _whole(1, null=True),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0, null=True),
    "max_time": _number("seconds, above 0", lambda v: v > 0, null=True),
    "stop_strings": (
        lambda v: v is None or (isinstance(v, tuple) and bool(v) and all(isinstance(s, str) and s for s in v)),
        "null or strings that are not empty",
    ),
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN_OR_TOKENS,
    "pad_token_id": _TOKEN,
    "do_sample": _FLAG,
    "num_beams": _whole(1),
    "num_beam_groups": _whole(1),
    "diversity_penalty": _number("a finite number, 0 or above", lambda v: v >= 0),
    "length_penalty": _number("a finite number", lambda v: True),
    "early_stopping": (lambda v: isinstance(v, bool) or v == "never", 'true, false or "never"'),
    "penalty_alpha": _number("a number, 0 to 1", lambda v: 0 <= v <= 1, null=True),
    "prompt_lookup_num_tokens": _whole(1, null=True),
    "max_matching_ngram_size": _whole(1, null=True),
    "num_assistant_tokens": _whole(1),
    "num_assistant_tokens_schedule": (lambda v: v in _SCHEDULES, "one of " + ", ".join(_SCHEDULES)),
    "assistant_confidence_threshold": _number("a number, 0 to 1", lambda v: 0 <= v <= 1),
    "num_return_sequences": _whole(1),
    "use_cache": _FLAG,
    "prefill_chunk_size": _whole(1, null=True),
    "sequence_bias": (
        lambda v: v is None or _is_biases(v),
        "null or pairs of token ids, each sequence once, and a finite bias",
    ),
    "encoder_repetition_penalty": _POSITIVE,
    "repetition_penalty": _POSITIVE,
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "bad_words_ids": (
        lambda v: v is None or (isinstance(v, tuple) and bool(v) and all(_is_token_ids(word) for word in v)),
        "null or lists of token ids, 0 or above",
    ),
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _TOKEN_OR_TOKENS,
    "remove_invalid_values": _FLAG,
    "exponential_decay_length_penalty": (
        lambda v: v is None or _is_decay(v),
        "null or [start, factor], start 0 or above, factor above 0",
    ),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "temperature": _number(
        f"0 (greedy), or {_TEMPERATURES[0]:g} to {_TEMPERATURES[1]:g}",
        lambda v: v == 0 or _TEMPERATURES[0] <= v <= _TEMPERATURES[1],
    ),
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

assert _RULES.keys() == _DEFAULTS.keys()
