"""The arguments of calls, checked on the host, once for all backends.

check_call, check_ids, ...       token ids, masks, positions, labels, caches        calls.py
check_quantize, refusal, ...     devices, and what a prepared model does no more    prepared.py
"""

from gptj.inputs.calls import (
    IGNORED_LABEL,
    check_attention_mask,
    check_both_ends,
    check_cache_room,
    check_cache_size,
    check_call,
    check_class_labels,
    check_embeddings,
    check_embeds,
    check_functions,
    check_head_mask,
    check_ids,
    check_labels,
    check_length,
    check_method,
    check_places,
    check_positions,
    check_row,
    check_row_ends,
    integers,
    numbers,
    output_flags,
    part_of_a_model,
    problem_type,
)

__all__ = [
    "IGNORED_LABEL",
    "check_attention_mask",
    "check_both_ends",
    "check_cache_room",
    "check_cache_size",
    "check_call",
    "check_class_labels",
    "check_embeddings",
    "check_embeds",
    "check_functions",
    "check_head_mask",
    "check_ids",
    "check_labels",
    "check_length",
    "check_method",
    "check_places",
    "check_positions",
    "check_row",
    "check_row_ends",
    "integers",
    "numbers",
    "output_flags",
    "part_of_a_model",
    "problem_type",
]
