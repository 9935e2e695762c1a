"""GPT-J in TensorFlow, as Keras 3 models. The same rooms and names as `gptj.pt` and `gptj.flax`.

Table of contents:

    GPTJModel                        the blocks                                       model.py
    GPTJForCausalLM                  next-token logits, loss, generate                heads.py
    GPTJForSequenceClassification    one label a row                                  heads.py
    GPTJForQuestionAnswering         start and end of a span                          heads.py
    from_pretrained, save_pretrained, to_numpy, from_numpy, on_device                 weights.py
    Decoder                          the compiled steps under generate                generate.py
    GPTJTokenizer                    the core's, whose calls give TensorFlow's tensors
    GPTJConfig, GenerationConfig, GPTJError, errors, backend, installed_backends      the core's own

The classes have transformers' names too, TFGPTJModel and so on: the same objects.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

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

from gptj import __version__, backend, errors, installed_backends  # noqa: E402
from gptj.backends import asked_by_import, missing_name  # noqa: E402
from gptj.config import GPTJConfig  # noqa: E402
from gptj.errors import GPTJError  # noqa: E402
from gptj.generation import GenerationConfig  # noqa: E402
from gptj.text import tokenizer  # noqa: E402
from gptj.tf.generate import Decoder  # noqa: E402
from gptj.tf.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification  # noqa: E402
from gptj.tf.model import GPTJModel  # noqa: E402
from gptj.tf.weights import from_numpy, on_device, to_numpy  # noqa: E402


class GPTJTokenizer(tokenizer.GPTJTokenizer):
    """Text to token ids and back: `gptj.GPTJTokenizer`, whose calls give TensorFlow's tensors unless told otherwise."""

    default_tensors = "tf"


TFGPTJModel = GPTJModel
TFGPTJForCausalLM = GPTJForCausalLM
TFGPTJForSequenceClassification = GPTJForSequenceClassification
TFGPTJForQuestionAnswering = GPTJForQuestionAnswering

__all__ = [
    "Decoder",
    "GPTJConfig",
    "GPTJError",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "GPTJTokenizer",
    "GenerationConfig",
    "TFGPTJForCausalLM",
    "TFGPTJForQuestionAnswering",
    "TFGPTJForSequenceClassification",
    "TFGPTJModel",
    "__version__",
    "backend",
    "errors",
    "from_numpy",
    "installed_backends",
    "on_device",
    "to_numpy",
]


if not TYPE_CHECKING:  # a checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> Any:
        """Nothing: the error of a name that is not here, with the one that may be meant (PEP 562)."""
        raise missing_name(sys.modules[__name__], name, __all__, by_import=asked_by_import())
