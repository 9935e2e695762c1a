"""Scoring: the log-likelihood of texts and of continuations, written once in NumPy, for all three backends.

Table of contents:

    Score, Measure                     the results, one text's and several texts'  result
    Sequenced, sequence_of             texts as token ids, and what comes before   sequences
    Window, windows_of                 a long text in parts that a model can read  windows
    score_sequences                    batches, and the logits of what is needed   likelihood
    Scores                             `score` as a method of a model              mixin
"""

from __future__ import annotations

from gptj.generation.scoring.likelihood import Progress, score_sequences
from gptj.generation.scoring.mixin import Scores
from gptj.generation.scoring.result import Measure, Score
from gptj.generation.scoring.sequences import Prefix, Sequenced, prefix_of, sequence_of
from gptj.generation.scoring.windows import Window, limits_of, windows_of

__all__ = [
    "Measure",
    "Prefix",
    "Progress",
    "Score",
    "Scores",
    "Sequenced",
    "Window",
    "limits_of",
    "prefix_of",
    "score_sequences",
    "sequence_of",
    "windows_of",
]
