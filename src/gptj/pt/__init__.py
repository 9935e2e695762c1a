"""GPT-J in PyTorch. The same rooms and names as `gptj.tf` and `gptj.flax`.

Table of contents:

    GPTJModel                        the blocks                                       model.py
    GPTJForCausalLM                  next-token logits, loss, generate                heads.py
    GPTJForSequenceClassification    one label a row                                  heads.py
    GPTJForQuestionAnswering         start and end of a span                          heads.py
    from_pretrained, save_pretrained, to_numpy, from_numpy                            weights.py
    Decoder                          the compiled steps under generate                generate.py
"""

from gptj.backends import require

require("pt")

from gptj.config import GPTJConfig  # noqa: E402 - the missing framework must be named before it is imported
from gptj.pt.generate import Decoder  # noqa: E402
from gptj.pt.heads import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification  # noqa: E402
from gptj.pt.model import GPTJModel  # noqa: E402
from gptj.pt.weights import from_numpy, to_numpy  # noqa: E402

__all__ = [
    "Decoder",
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "from_numpy",
    "to_numpy",
]
