"""A TensorFlow model on several devices: what of `gptj.sharding` there is here, and the way where there is none.

Differs: Keras cuts no model on TensorFlow: `keras.distribution` does nothing there, without a word, so a model is not
made while one is set. Copies of a whole model train under tf.distribute's MirroredStrategy.
"""

from __future__ import annotations

from typing import Any

import keras

from gptj.errors import InputError
from gptj.sharding import Placement, Strategy


def choose_placement(mesh: Any, strategy: Strategy) -> Placement:
    """Refuse: a model is whole here.

    Raises:
        InputError: always, with the way to do it.
    """
    raise InputError(
        "TensorFlow holds a model whole",
        where="mesh",
        expected="gptj.pt or gptj.flax",
        hint="The same folder opens there; copies train here under tf.distribute.MirroredStrategy",
    )


def refuse_distribution() -> None:
    """Refuse to make a model while `keras.distribution` is set, which TensorFlow would ignore.

    Raises:
        InputError: one is set.
    """
    chosen = keras.distribution.distribution()
    if chosen is not None:
        raise InputError(
            "does nothing on Keras' TensorFlow backend",
            where="keras.distribution",
            expected="None",
            found=type(chosen).__name__,
            hint="keras.distribution.set_distribution(None); see docs/scale.md for what there is",
        )
