"""Changes of the logits before a token is chosen: one small pure function a field, and their order.

Each function takes one row's logits (v,) in float64 and returns new ones; what was passed in is not changed. They
see a row's own tokens, without the padding before it, so a row gives the same in every batch; only `max_length`
and `min_length`, which count columns, see the padding. Order and meaning are transformers' (4.57,
`_get_logits_processor`), except that probabilities are summed in float64 and that ties are settled: among equal
logits the lower id counts as the better one. (top_k, epsilon_cutoff and eta_cutoff need no such rule: whatever
equals the last one kept is kept.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.errors import InputError, shown
from gptj.generation.changes import Change, decay, decline, lift, repeats, repetition, suppression
from gptj.generation.config import GenerationConfig
from gptj.generation.sampling import best, best_counts, log_softmax, softmax

__all__ = [
    "AllowedTokens",
    "FewTokens",
    "Processor",
    "Row",
    "bias_sequences",
    "decay_length",
    "diversify",
    "forbid_ngrams",
    "force",
    "keep_above_epsilon",
    "keep_above_eta",
    "keep_allowed",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "keep_typical",
    "penalize_repetition",
    "processors",
    "repair",
    "suppress",
]

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row as a processor sees it.

    Attributes:
        ids: its tokens so far, without padding, (n,).
        prompt: how many of them are the prompt's.
        columns: how many columns the sequences have, padding included.
        taken: in diverse beam search, the tokens that earlier groups took at this step.
        number: which prompt it continues.
        given: its ids with the padding before them.
    """

    ids: Ids
    prompt: int
    columns: int
    taken: Ids | None = None
    number: int = 0
    given: Ids | None = None

    @property
    def made(self) -> int:
        """How many tokens have been made."""
        return len(self.ids) - self.prompt


Processor = Callable[[Row, Floats], Floats]


@dataclasses.dataclass(frozen=True)
class FewTokens:
    """A processor that changes few tokens' logits, and each by itself.

    Attributes:
        change: the change that it makes in a row; None where it makes another, which takes the whole row.
        otherwise: that other one.
    """

    change: Callable[[Row], Change | None]
    otherwise: Processor | None = None

    def __call__(self, row: Row, logits: Floats) -> Floats:
        """The whole row (v,), changed."""
        change = self.change(row)
        if change is not None:
            return change.of(logits)
        assert self.otherwise is not None
        return self.otherwise(row, logits)


AllowedTokens = Callable[[int, Ids], Sequence[int]]
"""`prefix_allowed_tokens_fn(prompt, ids)`: the prompt's number and a row's ids so far, padding included, to the ids
that may come next."""


def processors(
    config: GenerationConfig, total_length: int, allowed: AllowedTokens | None = None
) -> tuple[Processor, ...]:
    """The processors that `config` asks for, in the order of their application, without the draws' own (`filters`).

    Args:
        config: its fields.
        total_length: columns of the longest result, for forced_eos_token_id.
        allowed: the caller's prefix_allowed_tokens_fn.
    """
    c, eos, chosen = config, config.eos_token_ids, []

    def add(wanted: Any, processor: Processor) -> None:
        if wanted:
            chosen.append(processor)

    def few(wanted: Any, change: Callable[[Row], Change]) -> None:
        add(wanted, FewTokens(change))

    def only(tokens: tuple[int, ...], when: Callable[[Row], bool]) -> None:
        add(tokens, FewTokens(lambda row: None if when(row) else suppression(()), lambda row, x: force(x, tokens)))

    few(c.sequence_bias, lambda row: lift(row.ids, c.sequence_bias or ()))
    few(c.diversity_penalty, lambda row: decline(() if row.taken is None else row.taken, c.diversity_penalty))
    few(
        c.encoder_repetition_penalty != 1,
        lambda row: repetition(row.ids[: row.prompt], 1 / c.encoder_repetition_penalty),
    )
    few(c.repetition_penalty != 1, lambda row: repetition(row.ids, c.repetition_penalty))
    few(c.no_repeat_ngram_size, lambda row: repeats(row.ids, c.no_repeat_ngram_size, row.ids))
    few(
        c.encoder_no_repeat_ngram_size,
        lambda row: repeats(row.ids, c.encoder_no_repeat_ngram_size, row.ids[: row.prompt]),
    )
    bad_words = tuple((word, -math.inf) for word in c.bad_words_ids or () if len(word) > 1 or word[0] not in eos)
    few(bad_words, lambda row: lift(row.ids, bad_words))
    few(c.min_length and eos, lambda row: suppression(eos if row.columns < c.min_length else ()))
    few(c.min_new_tokens and eos, lambda row: suppression(eos if row.made < (c.min_new_tokens or 0) else ()))
    if allowed is not None:
        chosen.append(lambda row, x: keep_allowed(x, allowed(row.number, row.ids if row.given is None else row.given)))
    only(_as_ids(c.forced_bos_token_id), lambda row: len(row.ids) == 1)
    only(_as_ids(c.forced_eos_token_id), lambda row: row.columns == total_length - 1)
    add(c.remove_invalid_values, lambda row, x: repair(x))
    few(c.exponential_decay_length_penalty, lambda row: _decay(c, row))
    suppressed = suppression(c.suppress_tokens or ())
    few(c.suppress_tokens, lambda row: suppressed)
    few(c.begin_suppress_tokens, lambda row: _suppress_at_start(c, row))
    return tuple(chosen)


def filters(config: GenerationConfig) -> tuple[Processor, ...]:
    """The draws' own processors that `config` asks for, applied after all others: temperature, the cuts, log_softmax.

    In a beam search each cut keeps enough tokens for one that is not an eos.
    """
    c, chosen = config, []
    least = max(2, len(c.eos_token_ids) + 1) if c.num_beams > 1 else 1

    def add(wanted: Any, processor: Processor) -> None:
        if wanted:
            chosen.append(processor)

    if c.do_sample and c.temperature > 0:
        add(c.temperature != 1, lambda row, x: x / c.temperature)
        add(c.top_k, lambda row, x: keep_top_k(x, max(c.top_k, least)))
        add(c.top_p < 1, lambda row, x: keep_top_p(x, c.top_p, least))
        add(c.min_p is not None, lambda row, x: keep_min_p(x, c.min_p or 0.0, least))
        add(c.typical_p < 1, lambda row, x: keep_typical(x, c.typical_p, least))
        add(c.epsilon_cutoff, lambda row, x: keep_above_epsilon(x, c.epsilon_cutoff, least))
        add(c.eta_cutoff, lambda row, x: keep_above_eta(x, c.eta_cutoff, least))
    add(c.renormalize_logits, lambda row, x: log_softmax(x))
    return tuple(chosen)


# ---- logits of certain tokens


def bias_sequences(ids: Ids, logits: Floats, biases: Iterable[tuple[tuple[int, ...], float]]) -> Floats:
    """Each bias added to its sequence's last token, where the row ends with the tokens before it.

    >>> import numpy as np
    >>> bias_sequences(np.array([7, 1]), np.zeros(4), [((1, 2), 5.0), ((3,), -1.0), ((2, 0), 9.0)])
    array([ 0.,  0.,  5., -1.])
    """
    return lift(ids, biases).of(logits)


def penalize_repetition(ids: Ids, logits: Floats, penalty: float) -> Floats:
    """The logit of every token in `ids` divided by `penalty` if positive, else multiplied (arXiv:1909.05858).

    >>> import numpy as np
    >>> penalize_repetition(np.array([0, 1]), np.array([2.0, -2.0, 2.0]), 4.0)
    array([ 0.5, -8. ,  2. ])
    """
    return repetition(ids, penalty).of(logits)


def forbid_ngrams(ids: Ids, logits: Floats, size: int, *, made_from: Ids | None = None) -> Floats:
    """-inf for every token that would complete an ngram of `made_from`, by default of the row itself.

    >>> import numpy as np
    >>> forbid_ngrams(np.array([3, 1, 2, 3]), np.zeros(4), 2)  # 3, 1 was there
    array([  0., -inf,   0.,   0.])
    """
    return repeats(ids, size, ids if made_from is None else made_from).of(logits)


def suppress(logits: Floats, tokens: Sequence[int] | Ids) -> Floats:
    """-inf for `tokens`."""
    return suppression(tokens).of(logits)


def force(logits: Floats, tokens: Sequence[int]) -> Floats:
    """0 for `tokens` and -inf for all others."""
    result = np.full_like(logits, -np.inf)
    result[list(tokens)] = 0
    return result


def keep_allowed(logits: Floats, tokens: Sequence[int]) -> Floats:
    """-inf for all but `tokens`.

    Raises:
        InputError: there are none, or they are no token ids.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() >= len(logits):
        raise InputError(
            "allowed something else than tokens",
            where="prefix_allowed_tokens_fn",
            expected=f"a list of ids, each 0 to {len(logits) - 1}",
            found=shown(tokens),
        )
    return _keep_ids(logits, ids)


def repair(logits: Floats) -> Floats:
    """NaN as 0 and infinities as float32's extremes."""
    return np.nan_to_num(logits, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)


def decay_length(logits: Floats, eos: Sequence[int], factor: float, beyond: int) -> Floats:
    """The eos logits raised by |logit| * (factor ** beyond - 1), `beyond` tokens after the start of the decay.

    >>> import numpy as np
    >>> decay_length(np.array([-2.0, 1.0]), [0], 1.5, 2)
    array([0.5, 1. ])
    """
    return decay(eos, factor, beyond).of(logits)


def diversify(logits: Floats, chosen: Sequence[int] | Ids, penalty: float) -> Floats:
    """`penalty` subtracted once for each time that a token is in `chosen`, what earlier groups took at this step."""
    return decline(chosen, penalty).of(logits)


# ---- which tokens may be drawn


def keep_top_k(logits: Floats, k: int) -> Floats:
    """-inf for all that are below the k-th largest; its equals stay. With k above the vocabulary, all stay."""
    if k >= len(logits):
        return logits
    border = np.partition(logits, -k)[-k]
    return _keep(logits, logits >= border)


def keep_top_p(logits: Floats, mass: float, least: int = 1) -> Floats:
    """-inf for the least probable tokens, as many as hold at most 1 - `mass` together (arXiv:1904.09751).

    >>> import numpy as np
    >>> keep_top_p(np.log([0.125, 0.5, 0.25, 0.125]), 0.7).round(3)
    array([  -inf, -0.693, -1.386,   -inf])
    """
    probabilities = softmax(logits)
    for count in best_counts(len(logits)):
        order = best(logits, count)
        held_by_better = np.concatenate([[0.0], np.cumsum(probabilities[order[:-1]])])
        if held_by_better[-1] >= mass and count >= least:
            break
    stays = 1 - held_by_better > 1 - mass
    stays[:least] = True
    return _keep_ids(logits, order[stays])


def keep_min_p(logits: Floats, share: float, least: int = 1) -> Floats:
    """-inf for tokens of less than `share` times the best one's probability (arXiv:2407.01082)."""
    probabilities = softmax(logits)
    stays = probabilities >= share * probabilities.max()
    if least > 1:
        stays[best(logits, least)] = True
    return _keep(logits, stays)


def keep_typical(logits: Floats, mass: float, least: int = 1) -> Floats:
    """-inf for all but the tokens whose surprise is nearest to the entropy, together at least `mass`.

    Locally typical sampling (arXiv:2202.00666). Among equally near tokens all stay.
    """
    kept = np.flatnonzero(logits > -np.inf)
    log_probabilities = log_softmax(logits[kept])
    probabilities = np.exp(log_probabilities)
    entropy = -(log_probabilities * probabilities).sum()
    distance = np.abs(-log_probabilities - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(probabilities[order]) < mass).sum()), len(order) - 1)
    stays = distance[order] <= distance[order][last]
    stays[:least] = True
    return _keep_ids(logits, kept[order[stays]])


def keep_above_epsilon(logits: Floats, epsilon: float, least: int = 1) -> Floats:
    """-inf for tokens less probable than `epsilon`, but for the `least` best and their equals (arXiv:2210.15191)."""
    return _keep(logits, (softmax(logits) >= epsilon) | _among_best(logits, least))


def keep_above_eta(logits: Floats, epsilon: float, least: int = 1) -> Floats:
    """As `keep_above_epsilon`, with the border min(epsilon, sqrt(epsilon) * exp(-entropy)) (arXiv:2210.15191)."""
    probabilities = softmax(logits)
    there = probabilities > 0
    entropy = -(probabilities[there] * np.log(probabilities[there])).sum()
    border = min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))
    return _keep(logits, (probabilities >= border) | _among_best(logits, least))


# ---- parts of the above


def _as_ids(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _decay(config: GenerationConfig, row: Row) -> Change:
    start, factor = config.exponential_decay_length_penalty or (0, 1.0)
    beyond = row.made - start
    return decay(config.eos_token_ids, factor, beyond) if beyond > 0 else suppression(())


def _suppress_at_start(config: GenerationConfig, row: Row) -> Change:
    # With a forced bos after a prompt of one token, the first token that is free is the second.
    start = 1 if row.prompt == 1 and config.forced_bos_token_id is not None else 0
    return suppression(config.begin_suppress_tokens or () if row.made == start else ())


def _among_best(logits: Floats, count: int) -> NDArray[np.bool_]:
    count = min(count, len(logits))
    return np.asarray(logits >= np.partition(logits, -count)[-count])


def _keep(logits: Floats, stays: NDArray[np.bool_]) -> Floats:
    return np.where(stays, logits, -np.inf)


def _keep_ids(logits: Floats, ids: NDArray[Any]) -> Floats:
    result = np.full_like(logits, -np.inf)
    result[ids] = logits[ids]
    return result
