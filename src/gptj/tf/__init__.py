"""GPT-J in TensorFlow, as Keras 3 models. The same rooms and names as `gptj.pt` and `gptj.flax`.

Table of contents:

    GPTJModel                        the blocks                                       model.py
    GPTJForCausalLM                  next-token logits, loss, generate                heads.py
    GPTJForSequenceClassification    one label a row                                  heads.py
    GPTJForQuestionAnswering         start and end of a span                          heads.py
    from_pretrained, save_pretrained, to_numpy, from_numpy                            weights.py
    Decoder                          the compiled steps under generate                generate.py

The classes have transformers' names too, TFGPTJModel and so on: the same objects.
"""

import os

from gptj.backends import require
from gptj.errors import BackendError

require("tf")


def _require_tensorflow_under_keras(found: str) -> None:
    """Raise a BackendError unless `found`, the framework that Keras runs on, is TensorFlow."""
    if found != "tensorflow":
        raise BackendError(
            "Keras runs on another framework",
            where="gptj.tf",
            expected="tensorflow",
            found=found,
            hint='Before Keras is imported, set KERAS_BACKEND=tensorflow, or "backend": "tensorflow" in keras.json',
        )


# Before the import too: Keras imports the framework that it is told to, which may not be installed.
_require_tensorflow_under_keras(os.environ.get("KERAS_BACKEND") or "tensorflow")

try:
    import keras
except ImportError as error:
    _require_tensorflow_under_keras(str(error))  # keras.json names a framework that is not installed
    raise

_require_tensorflow_under_keras(keras.backend.backend())

from gptj.config import GPTJConfig  # noqa: E402
from gptj.tf.generate import Decoder  # noqa: E402
from gptj.tf.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification  # noqa: E402
from gptj.tf.model import GPTJModel  # noqa: E402
from gptj.tf.weights import from_numpy, to_numpy  # noqa: E402

TFGPTJModel = GPTJModel
TFGPTJForCausalLM = GPTJForCausalLM
TFGPTJForSequenceClassification = GPTJForSequenceClassification
TFGPTJForQuestionAnswering = GPTJForQuestionAnswering

__all__ = [
    "Decoder",
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "TFGPTJForCausalLM",
    "TFGPTJForQuestionAnswering",
    "TFGPTJForSequenceClassification",
    "TFGPTJModel",
    "from_numpy",
    "to_numpy",
]
