"""Scoring: the log-likelihood of texts and of continuations, written once in NumPy, for all three backends.

Table of contents:

    Score, Measure                     the results, one text's and several texts'  result
    Window, windows_of                 a long text in parts that a model can read  windows
    score_windows                      batches, and the logits of what is needed   likelihood
    Scores                             `score` as a method of a model              mixin
"""

from __future__ import annotations

from gptj.scoring.likelihood import Progress
from gptj.scoring.mixin import Scores
from gptj.scoring.result import Measure, Score
from gptj.scoring.windows import Window, windows_of

__all__ = ["Measure", "Progress", "Score", "Scores", "Window", "windows_of"]
