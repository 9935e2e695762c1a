"""The fields of `GenerationConfig` as the keywords of a call: a checker sees a misspelt one before anything runs.

They are those of the class, with lists where it takes lists; a test holds the two in step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

__all__ = ["Biases", "CallFields", "GenerationFields"]

Biases = Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]]
"""Sequences of token ids, and what is added to the logit of the last; pairs, or a dict."""


class CallFields(TypedDict, total=False):
    """Options of `generate` and `stream` beside their own arguments, without those that change the result's type."""

    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int | None
    max_time: float | None
    stop_strings: str | Sequence[str] | None
    bos_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    do_sample: bool
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: bool | str
    penalty_alpha: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    num_assistant_tokens: int
    num_assistant_tokens_schedule: str
    assistant_confidence_threshold: float
    num_return_sequences: int
    use_cache: bool
    prefill_chunk_size: int | None
    sequence_bias: Biases | None
    encoder_repetition_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    encoder_no_repeat_ngram_size: int
    bad_words_ids: Sequence[Sequence[int]] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    remove_invalid_values: bool
    exponential_decay_length_penalty: Sequence[float] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float | None
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    renormalize_logits: bool
    output_scores: bool
    output_logits: bool
    output_hidden_states: bool
    output_attentions: bool
    extra: Mapping[str, Any]


class GenerationFields(CallFields, total=False):
    """Every field."""

    return_dict_in_generate: bool
