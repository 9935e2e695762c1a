"""The losses of a GPT-J's heads in NumPy, in the dtype of the logits that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptj.config.labels import IGNORED_LABEL
from gptj.errors import InputError

__all__ = ["causal_lm_loss", "classification_loss", "question_answering_loss", "token_losses"]

Array = NDArray[Any]


def token_losses(logits: ArrayLike, labels: ArrayLike) -> Array:
    """-log softmax(logits)[label] of every position, unshifted; 0 where the label is ignored (-100).

    Args:
        logits: (..., classes).
        labels: (...,) class numbers.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    above = logits - logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(above).sum(-1))
    counted = labels != IGNORED_LABEL
    chosen = np.take_along_axis(above, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return np.where(counted, log_sum - chosen, np.zeros((), logits.dtype))


def _mean_loss(logits: ArrayLike, labels: ArrayLike) -> float:
    """The mean of `token_losses` over what is not ignored; 0 where everything is, in every backend, never NaN."""
    counted = int((np.asarray(labels) != IGNORED_LABEL).sum())
    return float(token_losses(logits, labels).sum()) / max(counted, 1)


def causal_lm_loss(logits: ArrayLike, labels: ArrayLike) -> float:
    """The mean loss of predicting each label from the position before it.

    Args:
        logits: (b, t, v).
        labels: (b, t), as long as the inputs: the shift is done here. -100 is not counted.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    return _mean_loss(logits[:, :-1], labels[:, 1:])


def classification_loss(logits: ArrayLike, labels: ArrayLike, *, problem_type: str) -> float:
    """The mean loss of `Oracle.classify`'s logits (b, labels) under one of the config's problem types.

    regression: squared error against (b,) or (b, labels); single_label_classification: cross entropy against
    (b,); multi_label_classification: binary cross entropy against (b, labels) of 0 and 1.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if problem_type == "regression":
        return float(((logits - labels.reshape(logits.shape)) ** 2).mean())
    if problem_type == "single_label_classification":
        return _mean_loss(logits, labels.reshape(-1))
    if problem_type == "multi_label_classification":
        return float((np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))).mean())
    raise InputError("no such problem type", where="problem_type", found=problem_type)


def question_answering_loss(start: ArrayLike, end: ArrayLike, starts: ArrayLike, ends: ArrayLike) -> float:
    """The mean of the start's and the end's cross entropy; a place outside the t tokens is not counted.

    Args:
        start, end: (b, t) logits.
        starts, ends: (b,) places. As in transformers, below 0 means 0, and t or above means "not in this text".
    """
    losses = []
    for logits, places in ((np.asarray(start), np.asarray(starts)), (np.asarray(end), np.asarray(ends))):
        t = logits.shape[1]
        places = np.clip(places.reshape(-1), 0, t)
        losses.append(_mean_loss(logits, np.where(places == t, IGNORED_LABEL, places)))
    return sum(losses) / 2
