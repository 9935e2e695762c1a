"""Copies of a whole TensorFlow model that train together, under a strategy of `tf.distribute`.

Differs: Keras and `tf.distribute` have the loops; here is what makes the copies' losses that of the whole batch.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from gptj.errors import InputError


def count_over_copies(count: tf.Tensor) -> tf.Tensor:
    """A scalar count, or under a strategy of `tf.distribute` the mean of every copy's: what a mean is taken over.

    The mean of the copies' losses, and of their gradients, is then that of the whole batch, however many labels each
    of them has.
    """
    copies = count_copies()
    if copies == 1:
        return tf.maximum(count, 1)
    context: Any = tf.distribute.get_replica_context()
    return tf.maximum(context.all_reduce(tf.distribute.ReduceOp.MEAN, count), 1 / copies)


def count_copies() -> int:
    """How many copies of a model compute this together: 1 outside of a strategy's `run`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def check_fit() -> None:
    """Refuse Keras' own loop where it is known to fail.

    Raises:
        InputError: the copies are those of several processes.
    """
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        raise InputError(
            "Keras' own loop fails on several processes",
            where="tf.distribute.MultiWorkerMirroredStrategy",
            expected="strategy.run over a step of your own",
            hint="docs/scale.md has it, in a dozen lines",
        )
