"""The results of scoring: each token's log-likelihood, and the usual measures of one text or of several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gptj.errors.brief import brief_fields

__all__ = ["Measure", "Score"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """The likelihood of so many tokens.

    Attributes:
        tokens: how many were scored.
        log_likelihood: the sum of theirs, natural logarithms.
        n_bytes: the bytes in UTF-8 of the text that they spell; None where it is not known.
    """

    tokens: int
    log_likelihood: float
    n_bytes: int | None

    @classmethod
    def of(cls, scores: Iterable[Score]) -> Measure:
        """The measure of all of these as one."""
        measures = [score.measure for score in scores]
        sizes = [measure.n_bytes for measure in measures]
        return cls(
            sum(measure.tokens for measure in measures),
            math.fsum(measure.log_likelihood for measure in measures),
            None if None in sizes else sum(size for size in sizes if size is not None),
        )

    @property
    def perplexity(self) -> float:
        """e to the mean loss of a token; NaN where there is no token, infinity where it is beyond a float."""
        if not self.tokens:
            return math.nan
        try:
            return math.exp(-self.log_likelihood / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits by the text's bytes, which no tokenizer changes; None where those are not known, or none."""
        return -self.log_likelihood / math.log(2) / self.n_bytes if self.n_bytes else None


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The likelihood of a text, or of a continuation of one.

    Attributes:
        token_ids: int64 (n,), the tokens that were scored.
        log_likelihoods: float64 (n,), of each token after those before it.
        greedy: bool (n,), whether the token is the one that a greedy choice takes: the likeliest, and of several that
            are equally likely the lowest id.
        n_bytes: the bytes in UTF-8 of the text that they spell; None where it is not known.
    """

    token_ids: NDArray[np.int64]
    log_likelihoods: NDArray[np.float64]
    greedy: NDArray[np.bool_]
    n_bytes: int | None = None

    def __repr__(self) -> str:
        return brief_fields(self, ("token_ids", "log_likelihood", "n_bytes"))

    @property
    def measure(self) -> Measure:
        """All of it in three numbers."""
        return Measure(len(self.token_ids), math.fsum(self.log_likelihoods), self.n_bytes)

    @property
    def log_likelihood(self) -> float:
        """The sum of the tokens'; 0 where there is none."""
        return self.measure.log_likelihood

    @property
    def is_greedy(self) -> bool:
        """Whether a greedy choice takes every one of the tokens."""
        return bool(self.greedy.all())

    @property
    def perplexity(self) -> float:
        """e to the mean loss of a token; see `Measure.perplexity`."""
        return self.measure.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits by the text's bytes; see `Measure.bits_per_byte`."""
        return self.measure.bits_per_byte
