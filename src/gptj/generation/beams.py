"""Beam search, beam sampling and diverse groups of beams.

The meaning is transformers' (4.57, `_beam_search`): num_beams running rows a prompt; at each step the best
K = max(2, 1 + number of eos) * num_beams continuations of all of them; of those, the ones that end are kept as
hypotheses if they are among the best num_beams, and the best num_beams that do not end run on. Two things differ.
A prompt (and a group of beams, arXiv:1610.02424) is a search of its own that closes on its own, so it gives the same
in every batch. And a beam that cannot be continued has log probability -inf, where transformers puts -1e9 and may
return one. Among equal scores the earlier beam, then the lower id, is the better; sums are float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.errors import GPTJError
from gptj.generation.candidates import Candidates
from gptj.generation.config import GenerationConfig
from gptj.generation.decoder import Step
from gptj.generation.output import GenerateOutput
from gptj.generation.sampling import best, draw_without_replacement, uniforms
from gptj.generation.session import Session

__all__ = ["search_beams"]

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class _Hypothesis:
    """A finished row: its score, its new tokens, and the session's row behind each of them."""

    score: float
    tokens: tuple[int, ...]
    rows: tuple[int, ...]


class _Search:
    """The beams of one prompt, or of one of its groups.

    Attributes:
        rows: the session's rows that these beams run in.
        log_probabilities: of the running beams, best first; -inf for one that cannot go on.
        trails: for each beam, its new tokens and the rows behind them.
        finished: at most as many hypotheses as there are beams, best first.
        closed: whether no running beam can still become a hypothesis.
    """

    def __init__(self, rows: Ids, config: GenerationConfig, most_new: int) -> None:
        self.rows = rows
        self.log_probabilities = np.full(len(rows), -np.inf)
        self.log_probabilities[0] = 0.0  # all beams begin equal: one of them is enough
        self.trails: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * len(rows)
        self.finished: list[_Hypothesis] = []
        self.closed = False
        self._config = config
        self._most_new = most_new

    @property
    def wanted(self) -> int:
        """K, how many continuations are looked at."""
        return max(2, 1 + len(self._config.eos_token_ids)) * len(self.rows)

    def candidates(self, scores: Floats, uniform: Floats | None) -> tuple[Ids, Ids, Floats]:
        """The K continuations to look at: their beams, tokens and log probabilities; drawn where `uniform` is given."""
        totals = (self.log_probabilities[:, None] + scores).reshape(-1)
        count = min(self.wanted, len(totals))
        chosen = best(totals, count) if uniform is None else draw_without_replacement(totals, count, uniform)
        chosen = chosen[totals[chosen] > -np.inf]
        beams, tokens = np.divmod(chosen, scores.shape[1])
        return beams, tokens, totals[chosen]

    def candidates_of(self, rows: Mapping[int, Candidates]) -> tuple[Ids, Ids, Floats] | None:
        """The same of the best of each beam's scores, by beam; None where what is not among these may be one of K."""
        before = self.log_probabilities
        every = np.concatenate([before[beam] + row.values for beam, row in rows.items()])
        beams = np.concatenate([np.full(len(row.ids), beam, np.int64) for beam, row in rows.items()])
        tokens = np.concatenate([row.ids for row in rows.values()]).astype(np.int64)
        chosen = np.lexsort((tokens, beams, -every))[: self.wanted]
        outside = max(before[beam] + row.bound for beam, row in rows.items())
        if len(chosen) < self.wanted or not every[chosen[-1]] > outside:
            return None
        return beams[chosen], tokens[chosen], every[chosen]

    def advance(self, beams: Ids, tokens: Ids, totals: Floats, ends: NDArray[np.bool_]) -> tuple[Ids, Ids]:
        """Keep the candidates that end as hypotheses and run on with the best others: their former beams and tokens."""
        count = len(self.rows)
        trails = [
            ((*self.trails[b][0], int(t)), (*self.trails[b][1], int(self.rows[b])))
            for b, t in zip(beams, tokens, strict=True)
        ]
        self._finish([(totals[n], *trails[n]) for n in np.flatnonzero(ends[:count])])
        going = np.flatnonzero(~ends)
        going = going[best(totals[going], min(count, len(going)))]
        dead = count - len(going)
        self.log_probabilities = np.concatenate([totals[going], np.full(dead, -np.inf)])
        self.trails = [trails[n] for n in going] + [((), ())] * dead
        self._close()
        return np.concatenate([beams[going], np.zeros(dead, np.int64)]), np.concatenate(
            [tokens[going], np.zeros(dead, np.int64)]
        )

    @property
    def _full(self) -> bool:
        return len(self.finished) == len(self.rows)

    def _finish(self, ended: list[tuple[float, tuple[int, ...], tuple[int, ...]]]) -> None:
        if self._full and self._config.early_stopping is True:
            return
        penalty = self._config.length_penalty
        new = [_Hypothesis(float(total / len(tokens) ** penalty), tokens, rows) for total, tokens, rows in ended]
        self.finished = sorted(self.finished + new, key=lambda h: -h.score)[: len(self.rows)]

    def _close(self) -> None:
        """Close the search if its best running beam cannot win any more, by early_stopping's idea of "can"."""
        if self._full and self._config.early_stopping is True:
            self.closed = True
            return
        made = len(self.trails[0][0])
        longest = self._config.early_stopping == "never" and self._config.length_penalty > 0
        length = self._most_new if longest else max(made, 1)
        reachable = self.log_probabilities[0] / length**self._config.length_penalty
        worst = self.finished[-1].score if self._full else -np.inf
        self.closed = not reachable > worst


def search_beams(session: Session) -> GenerateOutput[Any]:
    """The best num_return_sequences hypotheses of every prompt, best first.

    Raises:
        GPTJError: a prompt has fewer possible continuations than were asked for, or a logit is not finite.
    """
    config = session.config
    searches = _searches(session)
    decoder = session.decoder()
    result = session.prefill(decoder, copies=config.num_beams, want=session.want)
    steps: list[tuple[Step, Floats | None]] = []
    while True:
        scores, sources, tokens = _step(session, searches, result)
        if config.output_scores or config.output_logits or session.want:
            steps.append((result, scores))
        if session.ended.all():
            return _output(session, searches, steps)
        decoder.select(sources)
        session.ids = session.ids[sources]
        session.ids[:, session.columns] = tokens
        session.columns += 1
        result = decoder.step(tokens, want=session.want)


def _searches(session: Session) -> list[list[_Search]]:
    """For each prompt, a search for each group of its beams."""
    config = session.config
    rows = np.arange(len(session.ids)).reshape(len(session.prompt), config.num_beam_groups, -1)
    most_new = session.total_length - session.columns
    return [[_Search(group, config, most_new) for group in prompt] for prompt in rows]


def _step(session: Session, searches: list[list[_Search]], result: Step) -> tuple[Floats | None, Ids, Ids]:
    """Advance every open search by a token: the scores if asked for, the row that each row continues, and its token."""
    ids = session.ids[:, : session.columns]
    scores = np.full(result.logits.shape, -np.inf) if session.config.output_scores else None
    sources, tokens = np.arange(len(ids)), np.zeros(len(ids), np.int64)
    for number, groups in enumerate(searches):
        taken = np.zeros(0, np.int64)
        for search in groups:
            if search.closed:
                continue
            rows, mine = search.rows, None
            found = _from_best(session, search, result, taken)
            if found is None:
                mine = session.adjust(ids[rows], result.logits[rows], rows, taken=taken, normalize=True)
                found = search.candidates(mine, _uniform(session, number, mine.size))
                if scores is not None:
                    scores[rows] = mine
            beams, chosen, totals = found
            longer = np.concatenate([ids[rows[beams]], chosen[:, None]], axis=1)
            ends = np.zeros(0, bool)
            if len(longer):
                ends = session.stopper.ends(longer, None if mine is None else mine[beams])
            former, tokens[rows] = search.advance(beams, chosen, totals, ends)
            sources[rows] = rows[former]
            going = chosen[~np.isin(chosen, session.config.eos_token_ids)]  # also those that end by their length
            taken = np.concatenate([taken, going[: len(rows)]])
            session.ended[rows] = search.closed
    return scores, sources, tokens


def _from_best(session: Session, search: _Search, result: Step, taken: Ids) -> tuple[Ids, Ids, Floats] | None:
    """The K continuations from the best of each beam's scores, where nobody reads all; None where they may not do."""
    if session.scores_are_read or session.config.strategy == "beam_sample" or session.config.renormalize_logits:
        return None
    found = {}
    for beam, row in enumerate(search.rows.tolist()):
        logits = result.logits[row]
        session.refuse_non_finite(logits, row, session.index)
        if search.log_probabilities[beam] > -np.inf:
            some = session.best_log_probabilities(logits, row, search.wanted, taken=taken)
            if some is None:
                return None
            found[beam] = some
    return search.candidates_of(found) if found else None


def _uniform(session: Session, prompt: int, count: int) -> Floats | None:
    if session.config.strategy != "beam_sample":
        return None
    return uniforms(session.seeds[prompt], session.index, session.seed_rows[prompt], count)


def _output(
    session: Session, searches: list[list[_Search]], steps: list[tuple[Step, Floats | None]]
) -> GenerateOutput[Any]:
    """The best hypotheses of every prompt as rows."""
    config, width = session.config, session.prompt.shape[1]
    returned: list[_Hypothesis] = []
    for number, groups in enumerate(searches):
        finished = sorted((h for search in groups for h in search.finished), key=lambda h: -h.score)
        if len(finished) < config.num_return_sequences:
            raise GPTJError(
                "fewer continuations are possible than were asked for",
                where=f"prompt {number}",
                expected=f"num_return_sequences = {config.num_return_sequences}",
                found=len(finished),
            )
        returned += finished[: config.num_return_sequences]
    new = max(len(h.tokens) for h in returned)
    sequences = np.full((len(returned), width + new), session.pad, np.int64)
    sequences[:, :width] = np.repeat(session.prompt, config.num_return_sequences, axis=0)
    beam_indices = np.full((len(returned), new), -1, np.int64)
    for n, hypothesis in enumerate(returned):
        sequences[n, width : width + len(hypothesis.tokens)] = hypothesis.tokens
        beam_indices[n, : len(hypothesis.rows)] = hypothesis.rows
    asked: dict[str, Any] = {
        "logits": [step.logits for step, _ in steps] if config.output_logits else None,
        "scores": [s.astype(step.logits.dtype) for step, s in steps if s is not None] if config.output_scores else None,
        "hidden_states": [step.hidden_states for step, _ in steps] if config.output_hidden_states else None,
        "attentions": [step.attentions for step, _ in steps] if config.output_attentions else None,
    }
    kept: dict[str, Any] = {name: None if values is None else tuple(values) for name, values in asked.items()}
    return GenerateOutput(
        sequences=sequences,
        lengths=np.array([width + len(h.tokens) for h in returned], np.int64),
        seeds=session.seeds if config.do_sample else (),
        sequences_scores=np.array([h.score for h in returned]),
        beam_indices=beam_indices,
        **kept,
    )
