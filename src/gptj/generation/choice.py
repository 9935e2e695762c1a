"""A row's token without its scores: greedy or drawn, on the host or from what a device selected.

Nobody reads the scores of all tokens, so none are made: of the row's logits a few are changed by the processors, and
the token is the best of the candidates, or drawn from them. Where that cannot be proved to be the definition's token
there is no answer, and the caller computes the definition (`processors`, `filters` and `draw` over the whole row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.generation.candidates import FEW, Candidates, Draws, HostRow, RowLogits, find_candidates, is_cut_simply
from gptj.generation.changes import Change, Changed
from gptj.generation.config import GenerationConfig
from gptj.generation.held import HeldLogits, HeldRow
from gptj.generation.processors import FewTokens, Processor, Row

__all__ = ["Choice"]

MOST_NAMED = 4096
"""Tokens that one processor changes of a row; with more, the row itself is as soon changed, or fetched."""


class Choice:
    """Chooses tokens for a config.

    Args:
        config: whether and how to draw.
        vocab_size: v.
        processors: what is done to logits before that.
    """

    def __init__(self, config: GenerationConfig, vocab_size: int, processors: Sequence[Processor]) -> None:
        self._draws = Draws(config, vocab_size) if is_cut_simply(config) else None
        # What renormalizes may make two logits equal, of which the lower id is the better.
        self._greedy = config.strategy != "sample" and not config.renormalize_logits
        self._temperature = config.temperature if config.strategy == "sample" else 1.0
        self._vocab_size = vocab_size
        self._processors = tuple(processors)

    def on_host(self, logits: NDArray[Any], row: Row, uniform: float, number: int) -> int | None:
        """The token of a row's logits (v,), float32 or float64.

        Args:
            logits: what the model gave.
            row: as the processors see it.
            uniform: the number that it is drawn with.
            number: which of the rows it is.
        """
        changes = self._changes(row)
        if changes == []:
            return self._token(HostRow(logits), uniform, number)
        if changes is not None:
            tokens = Changed.named(changes)
            token = self._token(HostRow(logits, Changed.by(changes, tokens, logits[tokens])), uniform, number)
            if token is not None:
                return token
        scores = logits.astype(np.float64)
        for process in self._processors:
            scores = process(row, scores)
        return self._token(HostRow(scores), uniform, number)

    def on_device(self, held: HeldLogits, rows: Mapping[int, Row], uniforms: Mapping[int, float]) -> dict[int, int]:
        """The tokens of those rows of `held` (b, v) that the best of their logits decide."""
        drawn = self._draws
        if drawn is None and not self._greedy:
            return {}
        count, weigh = (FEW, False) if drawn is None else (2 * drawn.count, not drawn.cuts_to_k)
        found: dict[int, int] = {}
        for number, row in self._select(held, rows, count, weigh=weigh).items():
            token = self._token(row, uniforms.get(number, 0.0), number)
            if token is not None:
                found[number] = token
        return found

    def chances(
        self, logits: NDArray[Any] | HeldLogits, rows: Mapping[int, Row], tokens: Mapping[int, int]
    ) -> dict[int, float]:
        """A lower bound of the probability of each row's token among all; 0 where the candidates do not tell."""
        sources: Mapping[int, RowLogits]
        if isinstance(logits, HeldLogits):
            sources = self._select(logits, rows, FEW, weigh=True)
        else:
            changed = {number: self._changed_logits(row, logits[number]) for number, row in rows.items()}
            sources = {number: HostRow(logits[number], those) for number, those in changed.items() if those is not None}
        return {number: self._chance(sources[number], tokens[number]) if number in sources else 0.0 for number in rows}

    def _chance(self, logits: RowLogits, token: int) -> float:
        found = logits.candidates(FEW)
        places = np.flatnonzero(found.ids == token)
        if not len(places):
            return 0.0
        best = float(found.values.max())
        rest, error = logits.rest(found, best, self._temperature)
        weights = np.exp((found.values - best) / self._temperature)
        return float(weights[places[0]] / (weights.sum() + rest + error)) * (1 - 1e-9)

    def _select(self, held: HeldLogits, rows: Mapping[int, Row], count: int, *, weigh: bool) -> dict[int, HeldRow]:
        """Let the device select candidates, for the rows whose logits are finite and of which few are changed."""
        changes = {number: those for number, row in rows.items() if (those := self._changes(row)) is not None}
        if not changes:
            return {}
        named = {number: Changed.named(those) for number, those in changes.items()}
        width = max(map(len, named.values()))
        asked = np.zeros((held.shape[0], 1 << (width - 1).bit_length() if width else 0), np.int64)
        for number, tokens in named.items():
            asked[number, : len(tokens)] = tokens
        selected = held.best(min(count, self._vocab_size), asked, self._temperature if weigh else None)
        found = {}
        for number, tokens in named.items():
            if selected.finite[number]:
                before = selected.named[number, : len(tokens)]
                changed = Changed.by(changes[number], tokens, before) if len(tokens) else None
                found[number] = HeldRow(selected, number, self._vocab_size, changed)
        return found

    def _changed_logits(self, row: Row, logits: NDArray[Any]) -> Changed | None:
        changes = self._changes(row)
        if changes is None:
            return None
        tokens = Changed.named(changes)
        return Changed.by(changes, tokens, logits[tokens])

    def log_probabilities(self, logits: NDArray[Any], row: Row, count: int) -> Candidates | None:
        """Some `count` of the best of log_softmax(logits) (v,), changed; None where a processor takes the whole row.

        What is no candidate is below the bound, or rounded up to it.
        """
        changes = self._changes(row)
        if changes is None:
            return None
        tokens = Changed.named(changes)
        largest = float(logits.max())
        total = np.log(np.exp(logits.astype(np.float64) - largest).sum())  # float64, to the bit as `log_softmax` has it
        found = find_candidates(logits, min(count + min(len(tokens), count), self._vocab_size))
        found = Candidates(found.ids, (found.values - largest) - total, float((found.bound - largest) - total))
        before = (logits[tokens].astype(np.float64) - largest) - total
        return found.changed(Changed.by(changes, tokens, before))

    def _changes(self, row: Row) -> list[Change] | None:
        """The processors' changes to a row, of few tokens each; None where one of them takes the whole row."""
        changes = []
        for process in self._processors:
            change = process.change(row) if isinstance(process, FewTokens) else None
            if change is None or len(change.tokens) > MOST_NAMED:
                return None
            if len(change.tokens):
                changes.append(change)
        return changes

    def _token(self, row: RowLogits, uniform: float, number: int) -> int | None:
        if self._draws is not None:
            return self._draws.token(row, uniform, row=number)
        return row.best() if self._greedy else None
