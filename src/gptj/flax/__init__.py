"""GPT-J in Flax. The same rooms and names as `gptj.pt` and `gptj.tf`.

Table of contents:

    GPTJModel                        the blocks                                       model.py
    GPTJForCausalLM                  next-token logits, loss, generate                heads.py
    GPTJForSequenceClassification    one label a row                                  heads.py
    GPTJForQuestionAnswering         start and end of a span                          heads.py
    from_pretrained, save_pretrained, to_numpy, from_numpy                            weights.py
    Decoder                          the compiled steps under generate                generate.py

`FlaxGPTJModel` and its three siblings are the same classes by transformers' names.
"""

from gptj.backends import require

require("flax")

from gptj.config import GPTJConfig  # noqa: E402 - the missing framework must be named before it is imported
from gptj.flax.generate import Decoder  # noqa: E402
from gptj.flax.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification  # noqa: E402
from gptj.flax.model import GPTJModel  # noqa: E402
from gptj.flax.weights import from_numpy, to_numpy  # noqa: E402

FlaxGPTJModel = GPTJModel
FlaxGPTJForCausalLM = GPTJForCausalLM
FlaxGPTJForSequenceClassification = GPTJForSequenceClassification
FlaxGPTJForQuestionAnswering = GPTJForQuestionAnswering

__all__ = [
    "Decoder",
    "FlaxGPTJForCausalLM",
    "FlaxGPTJForQuestionAnswering",
    "FlaxGPTJForSequenceClassification",
    "FlaxGPTJModel",
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "from_numpy",
    "to_numpy",
]
