"""`score` as a method of a model: the same signature and meaning in the three wings.

A wing's mixin adds how a batch is read and how logits come of what was read.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.errors import InputError, shown
from gptj.generation.held import HeldLogits
from gptj.generation.scoring.likelihood import Progress, score_sequences
from gptj.generation.scoring.result import Score
from gptj.generation.scoring.sequences import Prefix, sequences_of
from gptj.generation.scoring.windows import limits_of

__all__ = ["Scores"]


class Scores:
    """Log-likelihoods of texts, a base class of the models with a language-model head."""

    config: GPTJConfig

    def _last_states(self, token_ids: NDArray[np.int64]) -> Any:
        """The hidden states, from which `_logits_at` goes on, of ids (b, t) in evaluation, each row from position 0."""
        raise NotImplementedError

    def _logits_at(self, states: Any, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Any:
        """The logits (n, v) of these places; a wing that compiles may give more rows behind them."""
        raise NotImplementedError

    def _host(self, array: Any) -> NDArray[Any]:
        raise NotImplementedError

    def _held(self, logits: Any, columns: int | None = None) -> NDArray[Any] | HeldLogits:
        raise NotImplementedError

    def _is_traced(self) -> bool:
        return False

    def _with(self, params: Any) -> Self:
        raise NotImplementedError

    def score(
        self,
        texts: Any,
        continuations: Any = None,
        *,
        tokenizer: Any = None,
        prefix_token_id: Prefix = "bos",
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
        params: Any = None,
        progress: Progress | None = None,
    ) -> list[Score]:
        """The log-likelihood of every token of each text, or of its continuation.

        Texts are read in batches sorted by length, and logits are made of the places that are scored alone, some at a
        time. A text longer than the model's positions is read in windows; each of its tokens is scored once.

        Args:
            texts: a text, a list of texts, a row of token ids, a list of rows, or an array (b, t) without padding.
            continuations: one a text, which then is what comes before it and is not scored itself. Spaces at the end
                of a text belong to its continuation. A text too long for the window loses its beginning.
            tokenizer: its `encode` makes token ids of texts.
            prefix_token_id: the token before each text, after which its first one is scored: an id, or "bos" for
                config.bos_token_id, else eos. None: nothing stands there, and the first token is not scored. Before a
                continuation it stands where the text is empty and the continuation does not begin with it.
            max_length: the most tokens of a window; None: config.n_positions.
            stride: the most tokens that a window after the first scores, after the others of it; None: all of them.
                A smaller one gives each token more context and takes longer.
            batch_size: rows that are read at once; None: 2,048 tokens' worth.
            params: in Flax, parameters in place of the model's own.
            progress: a function (tokens scored, of how many), called after every batch.

        Returns:
            A `Score` a text, in their order. The sums over the vocabulary are in float64.

        Raises:
            InputError: an argument breaks its rule, before anything is computed.
            GPTJError: a logit is not finite.
        """
        if self._is_traced():
            hint = "Call it outside of jax.jit, tf.function or torch.compile"
            raise InputError("scoring is a loop on the host", where="score", hint=hint)
        texts, continuations = self._listed(texts), self._listed(continuations)
        if progress is not None and not callable(progress):
            raise InputError("cannot be called", where="progress", expected="a function", found=shown(progress))
        sequences = sequences_of(self.config, texts, continuations, tokenizer, prefix_token_id)
        limits, batch_size = limits_of(self.config, max_length, stride), check_batch_size(batch_size)
        return score_sequences(self._with(params), sequences, limits, batch_size=batch_size, progress=progress)

    def _listed(self, value: Any) -> Any:
        """An argument whose arrays, of the wing's or NumPy's, are lists."""
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return (value if isinstance(value, np.ndarray | np.generic) else self._host(value)).tolist()
        return [self._listed(item) for item in value] if isinstance(value, list | tuple) else value


def check_batch_size(batch_size: int | None) -> int | None:
    """`batch_size`, None or at least 1."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError("out of range", where="batch_size", expected="1 or more", found=shown(batch_size))
    return batch_size
