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

from gptj.backends import require

require("tf")

import keras  # noqa: E402 - the missing framework must be named before it is imported

from gptj.errors import BackendError  # noqa: E402

if keras.backend.backend() != "tensorflow":
    raise BackendError(
        "Keras runs on another framework",
        where="gptj.tf",
        expected="tensorflow",
        found=keras.backend.backend(),
        hint='Before Keras is imported, set KERAS_BACKEND=tensorflow, or "backend": "tensorflow" in keras.json',
    )

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
