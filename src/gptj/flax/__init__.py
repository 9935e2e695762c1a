"""GPT-J in Flax. The same rooms and names as `gptj.pt` and `gptj.tf`.

Table of contents:

    GPTJModel                        the blocks                                       model.py
    GPTJForCausalLM                  next-token logits, loss, generate                heads.py
    GPTJForSequenceClassification    one label a row                                  heads.py
    GPTJForQuestionAnswering         start and end of a span                          heads.py
    from_pretrained, save_pretrained, to_numpy, from_numpy, on_device                 weights.py
    Decoder                          the compiled steps under generate                generate.py
    GPTJTokenizer                    the core's, whose calls give jax arrays
    GPTJConfig, GenerationConfig, GPTJError, errors, backend, installed_backends      the core's own

`FlaxGPTJModel` and its three siblings are the same classes by transformers' names.
"""

import sys
from typing import TYPE_CHECKING, Any

from gptj.backends import require

require("flax")

# The missing framework must be named before it is imported.
from gptj import __version__, backend, errors, installed_backends  # noqa: E402
from gptj.backends import asked_by_import, missing_name  # noqa: E402
from gptj.config import GPTJConfig  # noqa: E402
from gptj.errors import GPTJError  # noqa: E402
from gptj.flax.generate import Decoder  # noqa: E402
from gptj.flax.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification  # noqa: E402
from gptj.flax.model import GPTJModel  # noqa: E402
from gptj.flax.weights import from_numpy, on_device, to_numpy  # noqa: E402
from gptj.generation import GenerationConfig  # noqa: E402
from gptj.text import tokenizer  # noqa: E402


class GPTJTokenizer(tokenizer.GPTJTokenizer):
    """Text to token ids and back: `gptj.GPTJTokenizer`, whose calls give jax arrays unless told otherwise."""

    default_tensors = "jax"


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
    "GPTJError",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "GPTJTokenizer",
    "GenerationConfig",
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
