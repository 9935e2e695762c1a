"""The rules that hold between the fields of a `GenerationConfig`; each field's own are in `rules.py`."""

from __future__ import annotations

from typing import Any, NoReturn

from gptj.config.rules import spelt
from gptj.errors import ConfigError
from gptj.generation.rules import BEAMS_ONLY, SAMPLING_ONLY

__all__ = ["check_together", "refuse"]

_OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


def check_together(config: Any) -> None:
    """Refuse fields of a `GenerationConfig` that contradict each other, or that have no effect beside the others.

    Raises:
        ConfigError: naming the field, the rule and the value.
    """
    if config.max_length is not None and config.max_new_tokens is not None:
        refuse("max_length", "unset, since max_new_tokens is set", config.max_length)
    for least, most in (("min_length", "max_length"), ("min_new_tokens", "max_new_tokens")):
        low, high = getattr(config, least), getattr(config, most)
        if low is not None and high is not None and low > high:
            refuse(least, f"at most {most} = {high}", low)
    contrastive = bool(config.penalty_alpha)
    if contrastive and (config.do_sample or config.num_beams > 1 or config.top_k < 2):
        refuse("penalty_alpha", "do_sample false, num_beams 1 and top_k above 1 beside it", config.penalty_alpha)
    if not config.do_sample:
        allowed = ("top_k",) if contrastive else ()
        config.require_defaults(SAMPLING_ONLY, "do_sample", but=allowed)
    if config.num_beams == 1:
        config.require_defaults(BEAMS_ONLY, "num_beams above 1")
    elif config.temperature == 0:
        refuse("temperature", "above 0 beside num_beams above 1", config.temperature)
    _check_groups(config)
    _check_counts(config)
    if not config.return_dict_in_generate:
        config.require_defaults(_OUTPUTS, "return_dict_in_generate")
    if config.prefill_chunk_size is not None and (
        contrastive or config.output_hidden_states or config.output_attentions
    ):
        rule = "null beside hidden states or attentions of the prompt"
        refuse("prefill_chunk_size", rule, config.prefill_chunk_size)
    if config.exponential_decay_length_penalty is not None and not config.eos_token_ids:
        refuse("exponential_decay_length_penalty", "an eos_token_id beside it", config.exponential_decay_length_penalty)


def _check_groups(config: Any) -> None:
    """Refuse groups of beams that cannot be, or that would all be the same."""
    groups = config.num_beam_groups
    if groups == 1:
        config.require_defaults(("diversity_penalty",), "num_beam_groups above 1")
        return
    if config.num_beams % groups:
        refuse("num_beam_groups", f"a divisor of num_beams = {config.num_beams}", groups)
    if config.do_sample:
        refuse("num_beam_groups", "1 beside do_sample", groups)
    if config.diversity_penalty == 0:
        refuse("diversity_penalty", "above 0, or all groups are the same", config.diversity_penalty)


def _check_counts(config: Any) -> None:
    """Refuse more answers than there are, and guesses where none can be made."""
    rows = config.num_return_sequences
    if config.strategy in ("greedy", "contrastive") and rows > 1:
        refuse("num_return_sequences", f"1 for {config.strategy}, which has one answer", rows)
    if config.num_beams > 1 and rows > config.num_beams:
        refuse("num_return_sequences", f"at most num_beams = {config.num_beams}", rows)
    if config.prompt_lookup_num_tokens is None:
        config.require_defaults(("max_matching_ngram_size",), "prompt_lookup_num_tokens")
    elif config.strategy not in ("greedy", "sample"):
        refuse("prompt_lookup_num_tokens", f"null beside {config.strategy}", config.prompt_lookup_num_tokens)


def refuse(field: str, rule: str, value: object) -> NoReturn:
    """Raise the error of a field that breaks a rule."""
    raise ConfigError("breaks its rule", where=field, expected=rule, found=spelt(value))
