"""A drawn token from as little of the vocabulary as proves that the rest cannot change it.

The definition of a drawn token is `filters` and then `draw`: the cuts one after another over all logits, then the
inverse of the cumulative distribution, in float64. Two shorter ways give the same token:

* From the candidates: some dozens or hundreds of best logits are sorted and summed in float64, and what lies outside of
  them is one number, its share of the probability, summed in float32 with an error that is known.
* Where many tokens share the probability, from sums of all weights by narrow intervals of their logits: only the
  interval where a decision falls is sorted.

Each decision (which token is the last that a cut keeps, where the uniform number falls) is taken only where the sums'
errors cannot turn it. Otherwise there is no answer, and the caller computes the definition. So the token is the
definition's in every case, ties included.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.generation.changes import Changed
from gptj.generation.config import GenerationConfig

__all__ = [
    "FEW",
    "Candidates",
    "Draws",
    "HostRow",
    "RowLogits",
    "Sums",
    "find_candidates",
    "is_cut_simply",
    "weight_below",
]

Floats = NDArray[np.float64]

FEW = 16
"""Candidates of a greedy choice: more tokens hardly ever share the largest logit, or are made smaller."""

FEWEST = 512
"""Candidates where no top_k says how many matter: they hold nearly all of a trained model's probability."""

REST_ERROR = 4e-5
"""Of the rest's sum. An exponent is rounded twice in float32, 2**-24 of at most 104 each, beyond which e**-x is 0 in
float32; exp itself and the sum of 50,400 numbers add less than 1e-5."""

SUM_ERROR = 1e-11
"""Of a sum of float64 numbers in another order: 50,400 roundings of 2**-53 are 6e-12."""

INTERVALS = 4096
"""Of the exponents: of 50,400 tokens that are spread evenly, a dozen fall into one."""

LARGEST_EXPONENT = 40.0
"""Weights below e**-40 of the best's share one interval: those of a whole vocabulary are less than 1e-12 together."""

DEEPER = (1.25, -0.1)
"""How much deeper than top_p went in a row's last step its next one looks at first: times the exponent, and beyond."""

GROUPS = 8
"""Groups of logits a candidate wanted: with many more groups than candidates, few groups hold two of them."""


def is_cut_simply(config: GenerationConfig) -> bool:
    """Whether this config draws, and cuts what it draws from by temperature, top_k, top_p and min_p alone."""
    others = config.typical_p < 1 or config.epsilon_cutoff or config.eta_cutoff or config.renormalize_logits
    return config.strategy == "sample" and not others


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The best of a row's logits.

    Attributes:
        ids: token ids (n,), in no order.
        values: their logits, float64 (n,).
        bound: each candidate is above it, and no other token is; -inf where all others are.
    """

    ids: NDArray[np.intp]
    values: Floats
    bound: float

    def changed(self, changed: Changed) -> Candidates:
        """The best, after some tokens' logits were changed."""
        stays, enters = ~changed.holds(self.ids), changed.after > self.bound
        return Candidates(
            np.concatenate([self.ids[stays], changed.tokens[enters]]),
            np.concatenate([self.values[stays], changed.after[enters]]),
            self.bound,
        )

    def best(self) -> int | None:
        """The best of all tokens, the lower id among equals; None where no candidate is left."""
        return int(self.ids[self.values == self.values.max()].min()) if len(self.ids) else None


def find_candidates(logits: NDArray[Any], count: int) -> Candidates:
    """At least `count` of the best of `logits` (v,), or all that are not -inf.

    The logits are looked at in groups: the count-th largest of the groups' maxima is a border that at least `count`
    logits reach, and not many more.
    """
    columns = min(len(logits), GROUPS * count)
    grouped = len(logits) // columns * columns
    maxima = logits[:grouped].reshape(-1, columns).max(axis=0)
    if grouped < len(logits):
        maxima = np.concatenate([maxima, logits[grouped:]])
    lowest = logits.dtype.type(-np.inf)
    border = np.partition(maxima, -count)[-count] if count < len(maxima) else lowest
    bound = np.nextafter(border, lowest)
    ids = np.flatnonzero(logits > bound)
    return Candidates(ids, logits[ids].astype(np.float64), float(bound))


class RowLogits(Protocol):
    """A row's logits, wherever they are, with what few tokens' were changed to."""

    def best(self) -> int | None:
        """The best token, the lower id among equals; None where that cannot be told."""

    def candidates(self, count: int) -> Candidates:
        """Some of the best, `count` of them if that is at hand."""

    def rest(self, found: Candidates, best: float, temperature: float) -> tuple[float, float]:
        """The sum of exp((logit - best) / temperature) of all that are not in `found`, and by how much it may err."""

    def whole(self) -> NDArray[Any] | None:
        """The logits (v,), float32 or float64, where they are at hand."""


class HostRow:
    """A row's logits on the host.

    Args:
        logits: float32 or float64 (v,), -inf for never, without NaN and +inf.
        changed: what some of them were changed to.
    """

    def __init__(self, logits: NDArray[Any], changed: Changed | None = None) -> None:
        self._logits = logits
        self._changed = changed

    def best(self) -> int | None:
        """The best token, or None where all are -inf, or the best were changed."""
        logits, changed = self._logits, self._changed
        token = int(np.argmax(logits))
        if changed is None or not len(changed.tokens):
            return token if logits[token] > -np.inf else None
        if changed.holds(np.array([token]))[0]:
            return self.candidates(FEW).best()
        other = int(np.argmax(changed.after))
        beats = (changed.after[other], -changed.tokens[other]) > (logits[token], -token)
        return int(changed.tokens[other]) if beats else token

    def candidates(self, count: int) -> Candidates:
        """At least `count` of the best, or fewer where they were changed."""
        if self._changed is None:
            return find_candidates(self._logits, count)
        count = min(count + min(len(self._changed.tokens), count), len(self._logits))
        return find_candidates(self._logits, count).changed(self._changed)

    def rest(self, found: Candidates, best: float, temperature: float) -> tuple[float, float]:
        """As `RowLogits.rest`, summed in float32."""
        logits, changed = self._logits, self._changed
        near = logits.dtype.type(best)
        with np.errstate(over="ignore", invalid="ignore"):
            exponents = (logits - near).astype(np.float32, copy=False)
            if temperature != 1:
                exponents /= np.float32(temperature)
            weights = np.exp(exponents, out=exponents)
            weights[found.ids] = 0
            if changed is None:
                weight = float(weights.sum())
                return weight, weight * REST_ERROR
            weights[changed.tokens] = 0
            weight = float(weights.sum()) * _exp((float(near) - best) / temperature)
        return weight + weight_below(changed.after, found.bound, best, temperature), weight * REST_ERROR

    def whole(self) -> NDArray[Any]:
        """The logits, with the changes."""
        changed = self._changed
        if changed is None or not len(changed.tokens):
            return self._logits
        logits = self._logits.astype(np.float64)
        logits[changed.tokens] = changed.after
        return logits


def weight_below(logits: Floats, bound: float, best: float, temperature: float) -> float:
    """The sum of exp((logit - best) / temperature) of the logits that are no higher than `bound`."""
    return float(_exp((logits[logits <= bound] - best) / temperature).sum())


def _exp(exponents: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(exponents)


class Draws:
    """Draws tokens for a config that `is_cut_simply`.

    Args:
        config: its temperature, top_k, top_p and min_p.
        vocab_size: v.
    """

    def __init__(self, config: GenerationConfig, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._k = config.top_k if 0 < config.top_k < vocab_size else None
        # Rows whose last token took all of the vocabulary, and most likely will again; and how deep top_p went there.
        self._many: dict[int, float] = {}
        # Arrays of a vocabulary's size are kept from one token to the next: the system's pages cost more than the sums.
        self._weights = np.empty(vocab_size)
        self._exponents = np.empty(vocab_size)
        self._near = np.empty((2, vocab_size))
        self._scaled = np.empty(vocab_size)
        self._intervals = np.empty(vocab_size, np.int64)

    @property
    def cuts_to_k(self) -> bool:
        """Whether top_k leaves fewer tokens than there are."""
        return self._k is not None

    @property
    def count(self) -> int:
        """How many candidates decide nearly always."""
        return min(FEWEST if self._k is None else self._k + 8, self._vocab_size)

    def token(self, logits: RowLogits, uniform: float, *, row: int) -> int | None:
        """The token that the cuts and `uniform` choose, or None where the definition must say.

        Args:
            logits: the row's.
            uniform: the number of this row and step, 0 to below 1.
            row: whose logits they are.
        """
        many = row in self._many
        for from_all in (many, not many):
            token = self._from_all(logits.whole(), uniform, row) if from_all else self._from_best(logits, uniform)
            if token is not None:
                if not from_all:
                    self._many.pop(row, None)
                return token
        return None

    def _from_best(self, logits: RowLogits, uniform: float) -> int | None:
        """The token, from the candidates."""
        config, k = self._config, self._k
        found = logits.candidates(self.count)
        if not len(found.ids):
            return None
        with np.errstate(over="ignore"):
            values, bound = found.values / config.temperature, found.bound / config.temperature
        order = np.lexsort((found.ids, -values))
        ids, values = found.ids[order], values[order]
        if not np.isfinite(values[0]):
            return None
        complete = found.bound == -np.inf
        if k is not None and not (complete and len(values) <= k):
            if not complete and not (len(values) >= k and values[k - 1] > bound):
                return None  # what is no candidate may be the k-th, or equal it
            values, complete = values[values >= values[k - 1]], True
        weights = np.exp(values - values[0])
        rest = error = 0.0
        if not complete:
            best = float(found.values[order[0]])
            rest, error = logits.rest(found, best, config.temperature)
            error += rest * 2**-52 * abs(float(values[0]))  # the definition divides by the temperature, then subtracts
        if config.top_p < 1:
            last = _place(weights, rest, error, config.top_p)
            if last is None or not (complete or values[last] > bound):
                return None
            weights, rest, error = weights[: last + 1], 0.0, 0.0
        if config.min_p:
            kept = _count_above_min_p(weights, rest, config.min_p)
            if kept is None:
                return None
            weights, rest, error = weights[:kept], 0.0, 0.0
        place = _place(weights, rest, error, uniform)
        # Divided by the temperature, what is no candidate may equal the last of them.
        return None if place is None or not (complete or values[place] > bound) else int(ids[place])

    def _from_all(self, logits: NDArray[Any] | None, uniform: float, row: int) -> int | None:
        """The token, from the sums of all weights by intervals; None with top_k and min_p too, and without logits."""
        config, exponents = self._config, self._exponents
        if logits is None or self._k is not None or config.min_p:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(exponents, logits)  # a quotient into it would be float32's where the logits are
            best = np.float64(logits.max())
            if config.temperature != 1:
                exponents /= config.temperature
                best /= config.temperature
            exponents -= best
        if not np.isfinite(best):
            return None
        np.exp(exponents, out=self._weights)
        total = float(self._weights.sum())
        error = total * SUM_ERROR
        sums = self._sums_above(self._many.get(row, -np.inf), config.top_p * total + error, logits)
        depth = -np.inf
        if config.top_p < 1:
            border = sums.find(config.top_p * total, error)
            if border is None:
                return None
            total, depth = border.held, border.exponent
        found = sums.find(uniform * total, error)
        if found is None:
            return None
        self._many[row] = DEEPER[0] * depth + DEEPER[1]
        return found.token

    def _sums_above(self, depth: float, needed: float, logits: NDArray[Any]) -> Sums:
        """The sums of the weights whose exponents are above `depth`, if they are more than `needed`; else of all."""
        exponents, weights, temperature = self._exponents, self._weights, self._config.temperature
        if depth > -np.inf:
            near = np.flatnonzero(exponents > depth)
            at = slice(len(near))
            held = np.take(weights, near, out=self._near[1, at], mode="clip")
            if held.sum() > needed:
                above = np.take(exponents, near, out=self._near[0, at], mode="clip")
                return Sums(near, logits, temperature, above, held, self._scaled[at], self._intervals[at])
        return Sums(None, logits, temperature, exponents, weights, self._scaled, self._intervals)


@dataclasses.dataclass(frozen=True)
class Found:
    """The place at which a sum of weights, best first, passes a target.

    Attributes:
        token: the first up to which more than the target is held.
        held: how much that is.
        exponent: of the token's weight.
    """

    token: int
    held: float
    exponent: float


class Sums:
    """Weights by narrow intervals of their exponents.

    Args:
        tokens: ids that rise (n,); None for all.
        logits: of all tokens (v,). Different ones may have one exponent, where what is subtracted is much larger.
        temperature: of the exponents.
        exponents, weights: of `tokens` (n,), of which the largest exponent is 0.
        scaled, intervals: memory to compute in, (n,) each.
    """

    def __init__(
        self,
        tokens: NDArray[np.intp] | None,
        logits: NDArray[Any],
        temperature: float,
        exponents: Floats,
        weights: Floats,
        scaled: Floats,
        intervals: NDArray[np.int64],
    ) -> None:
        self._tokens, self._logits, self._temperature = tokens, logits, temperature
        self._exponents, self._weights, self._intervals = exponents, weights, intervals
        lowest = min(float(exponents.min()), -1e-300)
        if lowest < -LARGEST_EXPONENT:
            lowest = -LARGEST_EXPONENT
            exponents = np.maximum(exponents, lowest, out=scaled)
        count = min(INTERVALS, len(weights) // 4 + 1)
        np.multiply(exponents, (count - 1) / lowest, out=scaled)
        np.copyto(intervals, scaled, casting="unsafe")
        self._held = np.cumsum(np.bincount(intervals, weights, count))

    def find(self, target: float, error: float) -> Found | None:
        """The first token, best first, up to which more than `target` is held.

        None where the sums, which err by `error`, are too near to tell which.
        """
        interval = int(np.searchsorted(self._held, target))
        if interval == len(self._held):
            return None
        before = float(self._held[interval - 1]) if interval else 0.0
        places = np.flatnonzero(self._intervals == interval)
        tokens = places if self._tokens is None else self._tokens[places]
        with np.errstate(over="ignore"):
            order = np.argsort(-(self._logits[tokens].astype(np.float64) / self._temperature), kind="stable")
        sums = before + np.cumsum(self._weights[places[order]])
        place = _surely(sums, target, error, before=before if interval else None)
        if place is None:
            return None
        found = order[place]
        return Found(int(tokens[found]), float(sums[place]), float(self._exponents[places[found]]))


def _surely(held: Floats, target: float, error: float, *, before: float | None = None) -> int | None:
    """The first place of the rising sums that is above `target`, or None where an error of `error` could move it.

    `before` is the sum before the first place, None where that is exactly 0.
    """
    place = int(np.searchsorted(held, target, side="right"))
    if place == len(held) or held[place] - target <= error:
        return None
    below = held[place - 1] if place else before
    return None if below is not None and target - below <= error else place


def _count_above_min_p(weights: Floats, rest: float, share: float) -> int | None:
    """How many of the sorted weights are at least `share` of the first."""
    kept = int((weights >= share).sum())
    near = np.abs(weights - share) <= share * SUM_ERROR
    return None if near.any() or (rest and kept == len(weights)) else kept


def _place(weights: Floats, rest: float, error: float, share: float) -> int | None:
    """The first of the sorted weights up to which more than `share` of all is held.

    It is the last that top_p keeps, and the one that a uniform number falls on. `rest` errs by `error` at most.
    """
    held = np.cumsum(weights)
    total = float(held[-1]) + rest
    error += total * SUM_ERROR
    return _surely(held, share * total, error) if np.isfinite(error) else None
