"""GenerationConfig: how text is made, before any model: validated, generation_config.json in and out.

Field names and defaults are transformers' (4.57, `GenerationConfig`), and so are the meanings unless a field's
line below begins with "Differs". Nothing is ignored. What a call says (the constructor, `replace`) is refused where
it has no effect beside the other fields (a beam option without beams, a temperature without sampling) or is not
honoured here at all (`UNSUPPORTED`), with the reason. What a file says (`from_file`, `from_dict`) is warned of and
kept in `extra`: it takes effect once a call asks for what it waits for, and where it would change the text and cannot
be honoured, `generate` refuses until the call says otherwise.

So that an override of a call stays one word, `replace` returns to their defaults those fields that only the
former strategy read: `GenerationConfig(do_sample=True, top_p=0.9).replace(do_sample=False)` is plain greedy.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Unpack

from gptj.config import GPTJConfig
from gptj.config.rules import plain, spelt
from gptj.config.settings import Settings
from gptj.errors import ConfigError, GPTJError, InputError, shown, warn_of
from gptj.errors.brief import brief, html_table
from gptj.generation.fields import GenerationFields
from gptj.generation.rules import (
    ASSISTANT_FIELDS,
    BEAMS_ONLY,
    CONVERTERS,
    RULES,
    SAMPLING_ONLY,
    UNSUPPORTED,
    did_you_mean,
    known_members,
)
from gptj.generation.stored import drop_ids_beyond, find_unhonoured, fit, read_members
from gptj.generation.together import check_together, refuse

__all__ = ["ASSISTANT_FIELDS", "GENERATION_CONFIG_FILE", "UNSUPPORTED", "GenerationConfig", "Strategy"]

GENERATION_CONFIG_FILE = "generation_config.json"

Strategy = Literal["greedy", "sample", "beam", "beam_sample", "group_beam", "contrastive"]
"""The values of `GenerationConfig.strategy`; "greedy" and "sample" may also be assisted."""


@dataclasses.dataclass(kw_only=True, repr=False)
class GenerationConfig(Settings):
    """The settings of generation: how the next tokens are chosen, and when to stop.

    Lists may be given as lists; they are kept as tuples. A field can be assigned, which means what `replace` means.

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
        extra: members of generation_config.json that are no fields here, that wait for another field, or that break
            their rule: kept and written back.

    Raises:
        ConfigError: a field breaks its rule or has no effect. The message names the field, the rule and the value.
    """

    FILE: ClassVar[str] = GENERATION_CONFIG_FILE

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
        """A config that knows which fields it was given; see `named`.

        Raises:
            ConfigError: there is no such field, or it is one of transformers' that is not honoured here.
        """
        for name in known_members(_DEFAULTS, fields).keys() ^ fields.keys():
            raise ConfigError(f"not supported: {UNSUPPORTED[name][1]}", where=name, hint="Leave it out")
        self = object.__new__(cls)
        object.__setattr__(self, "_given", frozenset(fields))
        return self

    def __post_init__(self) -> None:
        self._convert_null()
        for field in _DEFAULTS:
            object.__setattr__(self, field, plain(getattr(self, field)))
        for field, convert in CONVERTERS.items():
            if getattr(self, field) is not None:
                object.__setattr__(self, field, convert(field, getattr(self, field)))
        object.__setattr__(self, "extra", dict(self.extra))
        for field, (holds, rule) in RULES.items():
            if not holds(getattr(self, field)):
                refuse(field, rule, getattr(self, field))
        check_together(self)

    def __repr__(self) -> str:
        told = {name: getattr(self, name) for name in _DEFAULTS} | ({"extra": self.extra} if self.extra else {})
        changed = (f"{name}={value!r}" for name, value in told.items() if value != _DEFAULTS.get(name))
        return f"{type(self).__name__}({', '.join(changed)})"

    def _repr_html_(self) -> str:
        """The fields that are not as by default, for a notebook."""
        rows = [(name, brief(value)) for name in _DEFAULTS if (value := getattr(self, name)) != _DEFAULTS[name]]
        return html_table(type(self).__name__, rows, ("field", "value"))

    def __hash__(self) -> int:
        return hash(type(self))  # every field can be assigned, and a key must not be lost by that

    def _is_plain(self, name: str) -> bool:
        return name in _DEFAULTS or name in UNSUPPORTED or name == "extra"

    def _with(self, name: str, value: Any) -> GenerationConfig:
        if self._is_plain(name):
            return self.replace(**{name: value})
        if meant := did_you_mean(_DEFAULTS, name):
            raise ConfigError("no such field", where=shown(name), hint=meant)
        return self._with_extra(name, value)

    # ---- what follows from the fields

    @property
    def named(self) -> dict[str, Any]:
        """The fields that it was made with, whether or not their values are the defaults; `extra` is none."""
        return {field: getattr(self, field) for field in _DEFAULTS if field in self._given}

    @property
    def strategy(self) -> Strategy:
        """The loop that runs. Sampling at temperature 0 is greedy."""
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
        """The id that fills a row after its end: pad_token_id, else the first eos, else None."""
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

    def check_honoured(self) -> None:
        """Make sure that nothing that the model's generation_config.json asks for would be left out in silence.

        Raises:
            ConfigError: the first member that would change the text and is not supported or breaks its rule.
        """
        for error in find_unhonoured(self):
            raise error

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
                    expected=spelt(_DEFAULTS[field]),
                    found=spelt(value),
                )

    # ---- copies, and generation_config.json

    @classmethod
    def of(cls, value: Any) -> GenerationConfig:
        """The config of a call: a GenerationConfig as it is, or one of a dict's fields, every one of them checked.

        Raises:
            ConfigError: an unknown or unsupported field, or one that breaks its rule.
            InputError: neither.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return cls().replace(**value)
        expected = "a GenerationConfig, or a dict of its fields"
        raise InputError("cannot be used", where="generation_config", expected=expected, found=shown(value))

    def replace(self, /, **fields: Unpack[GenerationFields]) -> GenerationConfig:  # type: ignore[override]
        """A copy with some fields changed, validated anew.

        max_length and max_new_tokens replace each other. Where do_sample, num_beams or penalty_alpha changes, the
        fields that the new strategy does not read go back to their defaults unless they are named too. What a file
        said and had no effect so far takes effect where it now has one.

        Raises:
            ConfigError: an unknown or unsupported field, or one that breaks its rule.
        """
        named = set(fields)
        changes = known_members(_DEFAULTS, fields)
        for one, other in (("max_length", "max_new_tokens"), ("max_new_tokens", "max_length")):
            if changes.get(one) is not None:
                changes.setdefault(other, None)
                named.add(other)
        merged = {field: changes.get(field, getattr(self, field)) for field in _DEFAULTS}
        reset: list[str] = []
        if "do_sample" in changes and not merged["do_sample"]:
            reset += [f for f in SAMPLING_ONLY if f != "top_k" or not merged["penalty_alpha"]]
        if "num_beams" in changes and merged["num_beams"] == 1:
            reset += BEAMS_ONLY
        forgotten = {field: _DEFAULTS[field] for field in reset if field not in changes}
        extra = changes.pop("extra", self.extra)
        if not isinstance(extra, Mapping):
            raise ConfigError("breaks its rule", where="extra", expected="a mapping", found=spelt(extra))
        waiting = {key: value for key, value in extra.items() if key in _DEFAULTS and key not in named}
        rest = {key: value for key, value in extra.items() if key not in _DEFAULTS and key not in named}
        for field in ASSISTANT_FIELDS:
            if field in waiting:
                rest[field] = waiting.pop(field)
        copy, left = fit(type(self), merged | changes | forgotten, waiting, rest)
        given = (self._given | named | waiting.keys()) - forgotten.keys() - left.keys()
        object.__setattr__(copy, "_given", given)
        return copy

    def over(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """`extra` of a config that this one changes: without what this one was told otherwise, and with its own."""
        return {**{key: value for key, value in extra.items() if key not in self._given}, **self.extra}

    def with_assistant(self) -> GenerationConfig:
        """A copy for a call with an assistant model, which the file's settings of one have waited for."""
        waiting = {key: value for key, value in self.extra.items() if key in ASSISTANT_FIELDS}
        rest = {key: value for key, value in self.extra.items() if key not in waiting}
        return fit(type(self), {field: getattr(self, field) for field in _DEFAULTS}, waiting, rest)[0]

    @classmethod
    def from_dict(
        cls, members: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None, vocab_size: int | None = None
    ) -> GenerationConfig:
        """The config that the members of a generation_config.json describe; `file` is what warnings name.

        What has no effect, is misspelt or breaks its rule is kept in `extra` and warned of (`CheckpointWarning`). null
        is the default. With `vocab_size`, ids beyond it are left out and warned of.
        """
        config = read_members(cls, members, file=file)
        return config if vocab_size is None else drop_ids_beyond(config, vocab_size, file=file)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, vocab_size: int | None = None) -> GenerationConfig:
        """The config in `path`: a generation_config.json, or the folder that holds one. See `from_dict`.

        Raises:
            ConfigError: not JSON, or no object.
        """
        path, members = cls.read_members(path)
        return cls.from_dict(members, file=path, vocab_size=vocab_size)

    @classmethod
    def of_folder(cls, directory: Path, vocab_size: int) -> GenerationConfig | None:
        """The config in a model's folder, None where it has none.

        As in transformers, a file that cannot be read does not keep the model from being opened: that is said, and the
        defaults stand in its place.
        """
        path = directory / GENERATION_CONFIG_FILE
        if not os.path.lexists(path):
            return None
        try:
            return cls.from_file(directory, vocab_size=vocab_size)
        except GPTJError as error:
            hint = "Mend or remove the file, or give each call a generation_config"
            problem = f"cannot be read, so the defaults take its place: {error.problem}"
            warn_of(problem, **error.facts(file=path, hint=hint))
            return None

    @classmethod
    def from_model_config(cls, config: GPTJConfig) -> GenerationConfig:
        """The defaults for a model that brings no generation_config.json: its bos, eos and pad ids.

        An eos or bos that its vocabulary does not have is left out: it could never be made.
        """
        eos = tuple(i for i in config.eos_token_ids if i < config.vocab_size)
        bos, pad = config.bos_token_id, config.pad_token_id
        if not RULES["pad_token_id"][0](pad):
            warn_of("no token's: left out", where="pad_token_id", expected=RULES["pad_token_id"][1], found=pad)
            pad = None
        return cls(
            bos_token_id=bos if bos is not None and bos < config.vocab_size else None,
            eos_token_id=None if not eos else eos[0] if len(eos) == 1 else eos,
            pad_token_id=pad,
        )

    def to_dict(self) -> dict[str, Any]:
        """The members of generation_config.json: the fields that are not at their defaults, and `extra` as it came."""
        members = {
            field: getattr(self, field) for field, default in _DEFAULTS.items() if getattr(self, field) != default
        }
        return {**self.extra, **members}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`, which leaves out defaults already."""
        return self.to_dict()

    def to_json(self) -> str:
        """The text of generation_config.json: sorted keys, two spaces, a newline at the end."""
        return self.to_json_string()

    # ---- rules

    def _convert_null(self) -> None:
        """Give a field that was set to None, where that is transformers' way to say "off", its default."""
        for field, default in _DEFAULTS.items():
            if getattr(self, field) is None and default is not None:
                off = 0 if field == "top_k" and self.do_sample else default
                object.__setattr__(self, field, off)


_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(GenerationConfig) if field.name != "extra"
}


def _as_tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
