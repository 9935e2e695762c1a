"""Log-likelihoods of windows: batches sorted by length, and of their logits the rows that are needed, a few at a time.

GPT-J's logits are 200 kB a token. So a wing gives the last hidden states of a batch first, and then the logits of some
of their places; the sums over the vocabulary are in float64. Where the logits lie on a device, it adds parts of them
and the host their sums (see `generation.held`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.errors import GPTJError
from gptj.generation.held import HeldLogits
from gptj.generation.scoring.result import Score
from gptj.generation.scoring.sequences import Sequenced
from gptj.generation.scoring.windows import Limits, Window, windows_of

__all__ = ["TOKENS_AT_ONCE", "Progress", "ScoredModel", "likelihoods_of", "score_sequences", "score_windows"]

TOKENS_AT_ONCE = 2048
"""Tokens of a batch, padding included, where no batch size is said: a window of all positions, or more short ones.

The attention weights of 2,048 tokens in a row are 0.27 GB a layer at 6B, those of 16 rows of 128 a sixteenth of it.
"""

TOKENS_SORTED = 2**20
"""Tokens of windows that are held and sorted at once: a stride of 64 reads each of GPT-J's tokens 32 times."""

LOGITS_AT_ONCE = 2**23
"""Logits that are held at once: 34 MB in float32, 166 rows of GPT-J's vocabulary."""

DOUBLES_AT_ONCE = 2**20
"""Logits that are held in float64 at once."""

Progress = Callable[[int, int], None]
"""Is told after each batch how many tokens were scored, and of how many."""


class ScoredModel(Protocol):
    """The interface of a wing's model that scoring needs."""

    config: GPTJConfig

    def _last_states(self, token_ids: NDArray[np.int64]) -> Any:
        """The hidden states, from which `_logits_at` goes on, of ids (b, t) in evaluation, each row from position 0."""

    def _logits_at(self, states: Any, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Any:
        """The logits (n, v) of these places; a wing that compiles may give more rows behind them."""

    def _held(self, logits: Any) -> NDArray[Any] | HeldLogits:
        """The wing's logits (n, v), as NumPy where they are on the host."""


Likelihoods = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Of tokens (n,): their log-likelihoods, and whether a greedy choice takes them."""


def score_sequences(
    model: ScoredModel,
    sequences: Sequence[Sequenced],
    limits: Limits,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """The score of each sequence, in their order; the arguments are those of `Scores.score`, checked."""
    counts = [max(0, len(one.token_ids) - one.first) for one in sequences]
    total, done = sum(counts), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    windows = (window for one in sequences for window in windows_of(one.token_ids, one.first, limits))
    found = score_windows(model, windows, batch_size=batch_size, scored=tell)
    return [_join(one, count, found) for one, count in zip(sequences, counts, strict=True)]


def _join(sequence: Sequenced, count: int, found: Iterator[Likelihoods]) -> Score:
    """The score of a sequence of so many tokens from those of its windows, which come next."""
    values, greedy, start = np.empty(count), np.empty(count, bool), 0
    while start < count:
        its = next(found)
        end = start + len(its[0])
        values[start:end], greedy[start:end] = its
        start = end
    return Score(np.array(sequence.token_ids[sequence.first :], np.int64), values, greedy, sequence.n_bytes)


def score_windows(
    model: ScoredModel,
    windows: Iterable[Window],
    *,
    batch_size: int | None = None,
    scored: Callable[[int], None] = lambda count: None,
) -> Iterator[Likelihoods]:
    """The likelihoods of each window's targets, in the order of the windows.

    Windows are made as they are needed, and sorted among some `TOKENS_SORTED` tokens. Of those that read the same
    tokens, as the choices of one token do, one is read.

    Args:
        model: the model.
        windows: what is read and scored.
        batch_size: rows that are read at once; None: as many as `TOKENS_AT_ONCE` allows.
        scored: is told after each batch how many tokens it scored.

    Raises:
        GPTJError: a logit is not finite.
    """
    block, size = list[Window](), 0
    for window in windows:
        block.append(window)
        size += len(window.token_ids)
        if size >= TOKENS_SORTED:
            yield from _score_block(model, block, batch_size, scored)
            block, size = [], 0
    yield from _score_block(model, block, batch_size, scored)


def _score_block(
    model: ScoredModel, windows: Sequence[Window], batch_size: int | None, scored: Callable[[int], None]
) -> list[Likelihoods]:
    """The likelihoods of each window's targets, in the order of the windows."""
    found: list[Likelihoods] = [(np.zeros(0), np.zeros(0, bool))] * len(windows)
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, window in enumerate(windows):
        alike.setdefault(window.token_ids, []).append(number)
    for texts in _batches(sorted(alike, key=len, reverse=True), batch_size):
        numbers = [number for text in texts for number in alike[text]]
        values, greedy = _score_batch(model, texts, [[windows[n].targets for n in alike[text]] for text in texts])
        end = 0
        for number in numbers:
            its = slice(end, end := end + len(windows[number].targets))
            found[number] = values[its], greedy[its]
        scored(len(values))
    return found


def _score_batch(
    model: ScoredModel, texts: Sequence[tuple[int, ...]], targets: Sequence[Sequence[tuple[int, ...]]]
) -> Likelihoods:
    """The likelihoods of the targets of each text, one after another."""
    ids = np.zeros((len(texts), len(texts[0])), np.int64)
    places: list[tuple[int, int, int]] = []
    for row, (text, several) in enumerate(zip(texts, targets, strict=True)):
        ids[row, : len(text)] = text  # what fills a row stands behind it, where no token of it sees it
        for its in several:
            places += ((row, len(text) - len(its) + n, target) for n, target in enumerate(its))
    states = model._last_states(ids)
    rows, columns, following = np.array(places, np.int64).T
    values, greedy = np.empty(len(places)), np.empty(len(places), bool)
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(places), at_once):
        some = slice(start, start + at_once)
        logits = model._held(model._logits_at(states, rows[some], columns[some]))
        values[some], greedy[some] = likelihoods_of(logits, following[some])
    return values, greedy


def _batches(texts: Sequence[tuple[int, ...]], size: int | None) -> Iterator[Sequence[tuple[int, ...]]]:
    """The texts, the longest first, in batches of `size` or of `TOKENS_AT_ONCE`."""
    start = 0
    while start < len(texts):
        rows = max(1, TOKENS_AT_ONCE // len(texts[start])) if size is None else size
        yield texts[start : start + rows]
        start += rows


def likelihoods_of(logits: NDArray[Any] | HeldLogits, targets: NDArray[np.int64]) -> Likelihoods:
    """The likelihoods of one token a row.

    Args:
        logits: (m, v) with m >= n; rows behind the first n count for nothing.
        targets: (n,) token ids.

    Raises:
        GPTJError: a logit is not finite.
    """
    if isinstance(logits, HeldLogits):
        return _of_held(logits, targets)
    values, greedy = np.empty(len(targets)), np.empty(len(targets), bool)
    step = max(1, DOUBLES_AT_ONCE // logits.shape[1])
    for start in range(0, len(targets), step):
        some = slice(start, min(start + step, len(targets)))
        values[some], greedy[some] = _of_rows(logits[some].astype(np.float64), targets[some])
    return values, greedy


def _of_rows(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> Likelihoods:
    """The likelihoods from logits (n, v) in float64, which are used up."""
    best = logits.argmax(1)
    row = np.arange(len(targets))
    own, largest = logits[row, targets], logits[row, best]
    if not np.isfinite(logits).all():
        raise _not_finite()
    logits -= largest[:, None]
    return own - largest - np.log(np.exp(logits, out=logits).sum(1)), best == targets


def _of_held(logits: HeldLogits, targets: NDArray[np.int64]) -> Likelihoods:
    """The likelihoods from sums that the device makes, in which nothing is as long as the vocabulary."""
    count = min(2, logits.shape[1])
    named = np.zeros((logits.shape[0], 1), np.int64)
    named[: len(targets), 0] = targets
    selected = logits.best(count, named, 1.0)
    assert selected.rest is not None
    counted = slice(len(targets))
    if not selected.finite[counted].all():
        raise _not_finite()
    values, own = selected.values[counted].astype(np.float64), selected.named[counted, 0].astype(np.float64)
    above = values[:, 0] > values[:, -1]  # the rest is all that is no larger than the last
    total = selected.rest[counted].sum(1, dtype=np.float64) + above
    greedy = selected.ids[counted, 0] == targets
    tied = np.flatnonzero((count > 1) & ~above & (own == values[:, 0]))
    if len(tied):  # which of several that are equal the device names is left open
        greedy[tied] = logits.rows_on_host(tied)[: len(tied)].argmax(1) == targets[tied]
    return own - values[:, 0] - np.log(total), greedy


def _not_finite() -> GPTJError:
    return GPTJError("non-finite logits", where="score", hint="Check the weights, or compute in a wider dtype")
