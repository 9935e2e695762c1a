"""For every field of GenerationConfig: a setting without it and one with it, between which a caller sees a difference.

`tests/core` walks the table over the toy decoder and checks that no field is missing; a backend's test can walk it
over a model of its own.
"""

from __future__ import annotations

from typing import Any

SAMPLE = {"do_sample": True, "top_k": 0}
BEAM = {"num_beams": 3}
FULL = {"return_dict_in_generate": True}

TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_length": ({}, {"max_length": 9, "max_new_tokens": None}),
    "max_new_tokens": ({}, {"max_new_tokens": 3}),
    "min_length": ({"sequence_bias": [[[3], 50.0]]}, {"min_length": 8}),
    "min_new_tokens": ({"sequence_bias": [[[3], 50.0]]}, {"min_new_tokens": 3}),
    "max_time": ({}, {"max_time": 1e-9}),
    "eos_token_id": ({"sequence_bias": [[[3], 50.0]], "eos_token_id": None}, {"eos_token_id": 3}),
    "pad_token_id": ({"eos_token_id": list(range(12))}, {"pad_token_id": 13}),
    "do_sample": ({}, {"do_sample": True}),
    "num_beams": ({}, {"num_beams": 4}),
    "num_beam_groups": ({"num_beams": 4}, {"num_beam_groups": 2, "diversity_penalty": 5.0, "num_return_sequences": 4}),
    "diversity_penalty": (
        {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 0.1, "num_return_sequences": 4},
        {"diversity_penalty": 20.0},
    ),
    "length_penalty": ({**BEAM, "sequence_bias": [[[3], 2.0]]}, {"length_penalty": 9.0}),
    "early_stopping": ({**BEAM, "sequence_bias": [[[3], 2.0]], "length_penalty": 9.0}, {"early_stopping": True}),
    "penalty_alpha": ({}, {"penalty_alpha": 0.9, "top_k": 5}),
    "num_return_sequences": (SAMPLE, {"num_return_sequences": 2}),
    "sequence_bias": ({}, {"sequence_bias": [[[5], 50.0]]}),
    "encoder_repetition_penalty": ({}, {"encoder_repetition_penalty": 50.0}),
    "repetition_penalty": ({}, {"repetition_penalty": 50.0}),
    "no_repeat_ngram_size": ({}, {"no_repeat_ngram_size": 1}),
    "encoder_no_repeat_ngram_size": ({"sequence_bias": [[[1], 50.0]]}, {"encoder_no_repeat_ngram_size": 1}),
    "bad_words_ids": ({"sequence_bias": [[[5], 50.0]]}, {"bad_words_ids": [[5]]}),
    "forced_bos_token_id": ({"one_token_prompt": True}, {"forced_bos_token_id": 6}),
    "forced_eos_token_id": ({}, {"forced_eos_token_id": 9}),
    "exponential_decay_length_penalty": ({}, {"exponential_decay_length_penalty": [0, 50.0]}),
    "suppress_tokens": ({"sequence_bias": [[[5], 50.0]]}, {"suppress_tokens": [5]}),
    "begin_suppress_tokens": ({"sequence_bias": [[[5], 50.0]]}, {"begin_suppress_tokens": [5]}),
    "temperature": (SAMPLE, {"temperature": 50.0}),
    "top_k": ({"do_sample": True, "temperature": 50.0}, {"top_k": 1}),
    "top_p": ({**SAMPLE, "temperature": 50.0}, {"top_p": 0.01}),
    "min_p": ({**SAMPLE, "temperature": 50.0}, {"min_p": 1.0}),
    "typical_p": ({**SAMPLE, "temperature": 50.0}, {"typical_p": 0.01}),
    "epsilon_cutoff": ({**SAMPLE, "temperature": 5.0}, {"epsilon_cutoff": 0.9}),
    "eta_cutoff": ({**SAMPLE, "temperature": 5.0}, {"eta_cutoff": 0.9}),
}
"""The sequences differ (where both are at eos 3, pad 0, 8 new tokens, the same seed and prompts of 4 tokens)."""

OUTPUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "output_scores": (FULL, {"output_scores": True}, "scores"),
    "output_logits": (FULL, {"output_logits": True}, "logits"),
    "output_hidden_states": (FULL, {"output_hidden_states": True}, "hidden_states"),
    "output_attentions": (FULL, {"output_attentions": True}, "attentions"),
    "renormalize_logits": ({**FULL, "output_scores": True}, {"renormalize_logits": True}, "scores"),
}
"""The named part of the output differs."""

CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "use_cache": ({}, {"use_cache": False}),
    "prefill_chunk_size": ({}, {"prefill_chunk_size": 2}),
    "prompt_lookup_num_tokens": ({}, {"prompt_lookup_num_tokens": 2}),
    "max_matching_ngram_size": ({"prompt_lookup_num_tokens": 4}, {"max_matching_ngram_size": 1}),
    "num_assistant_tokens": ({"assistant": True, "assistant_confidence_threshold": 0.0}, {"num_assistant_tokens": 2}),
    "num_assistant_tokens_schedule": (
        {"assistant": True, "num_assistant_tokens": 1, "assistant_confidence_threshold": 0.0},
        {"num_assistant_tokens_schedule": "heuristic"},
    ),
    "assistant_confidence_threshold": (
        {"assistant": True, "assistant_confidence_threshold": 0.0},
        {"assistant_confidence_threshold": 1.0},
    ),
}
"""The tokens are the same and the calls of the decoder differ: these fields are about the way, not the answer."""

ELSEWHERE = {
    "stop_strings": "test_a_stop_string_ends_a_row_with_the_token_that_completes_it",
    "remove_invalid_values": "test_invalid_values_may_be_repaired_instead",
    "return_dict_in_generate": "a model's `generate` reads it; here the outputs depend on it",
    "bos_token_id": "kept for other tools; GPT-J puts nothing before a prompt, in transformers neither",
    "extra": "keys that are not ours",
}
"""Fields whose effect is shown elsewhere, or who have none by their documented meaning."""
