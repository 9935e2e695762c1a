"""gptj: an independent GPT-J for PyTorch, TensorFlow and Flax, proven to give the same answer in all three.

Table of contents:

    GPTJConfig                                   what a model is                      gptj.config
    backend, installed_backends                  choosing a framework                 gptj.backends
    GPTJModel, GPTJForCausalLM,                  the chosen backend's classes         gptj.pt, gptj.tf, gptj.flax
      GPTJForSequenceClassification,
      GPTJForQuestionAnswering
    GenerationConfig                             how text is made                     gptj.generation
    GPTJTokenizer                                text to token ids and back           gptj.tokenizer
    GPTJError and its tree                       everything that can go wrong         gptj.errors
    schema, checkpoint, rotary, inputs, parity   the rooms behind them

Importing this module loads no framework: a model class is looked up in the chosen backend when it is asked
for (`from gptj import GPTJForCausalLM`), and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptj.backends import backend, installed_backends
from gptj.config import GPTJConfig
from gptj.errors import GPTJError
from gptj.schema import HEADS

if TYPE_CHECKING:
    from gptj.generation import GenerationConfig
    from gptj.tokenizer import GPTJTokenizer

__version__ = "0.1.0"

_CORE = {"GenerationConfig": "gptj.generation", "GPTJTokenizer": "gptj.tokenizer"}
_MODELS = tuple(HEADS.values())

__all__ = [
    "GPTJConfig",
    "GPTJError",
    "GPTJTokenizer",
    "GenerationConfig",
    "__version__",
    "backend",
    "installed_backends",
]


def __getattr__(name: str) -> Any:
    """A core class from its module, or a model class from the chosen backend (PEP 562)."""
    if name in _CORE:
        import importlib

        return getattr(importlib.import_module(_CORE[name]), name)
    if name in _MODELS:
        return getattr(backend(), name)
    raise AttributeError(f"module 'gptj' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODELS})
