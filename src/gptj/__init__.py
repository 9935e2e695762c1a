"""gptj: an independent GPT-J for PyTorch, TensorFlow and Flax, proven to give the same answer in all three.

Table of contents:

    GPTJConfig                                   the description of a model           gptj.config
    backend, installed_backends                  choosing a framework                 gptj.backends
    GPTJModel, GPTJForCausalLM,                  the chosen backend's classes         gptj.pt, gptj.tf, gptj.flax
      GPTJForSequenceClassification,
      GPTJForQuestionAnswering
    GenerationConfig                             how text is made                     gptj.generation
    GPTJTokenizer                                text to token ids and back           gptj.text.tokenizer
    GPTJError and its tree                       everything that can go wrong         gptj.errors
    schema, checkpoint, inputs, outputs, rotary, taps, parity  the rooms behind them

Importing this module loads no framework: a model class is looked up in the chosen backend when it is asked
for (`from gptj import GPTJForCausalLM`), and not before. Where none is chosen, the module has no such name, and
`from gptj import` says how to choose. A type checker, which cannot know the choice, takes PyTorch's classes; those
of another framework are typed where they are named: `from gptj.flax import GPTJForCausalLM`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gptj.backends import BACKENDS, backend, choose_backend, installed_backends
from gptj.errors import GPTJError

if TYPE_CHECKING:
    from gptj.config import GPTJConfig
    from gptj.generation import GenerationConfig
    from gptj.pt import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel
    from gptj.text.tokenizer import GPTJTokenizer

__version__ = "0.1.0"

_CORE = {"GPTJConfig": "gptj.config", "GenerationConfig": "gptj.generation", "GPTJTokenizer": "gptj.text.tokenizer"}
_MODELS = ("GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering")
_ROOMS = {name: f"gptj.{name}" for name in ("checkpoint", "errors", "generation", "outputs", "parity", "schema")}
_ROOMS |= {"inputs": "gptj.calls.inputs", "rotary": "gptj.config.rotary", "taps": "gptj.calls.taps"}

__all__ = [
    "GPTJConfig",
    "GPTJError",
    "GPTJTokenizer",
    "GenerationConfig",
    "__version__",
    "backend",
    "installed_backends",
]


# What a type checker may import from here by name; no part of __all__, which must not need a framework.
if TYPE_CHECKING:
    __all__ += ["GPTJForCausalLM", "GPTJForQuestionAnswering", "GPTJForSequenceClassification", "GPTJModel"]


if not TYPE_CHECKING:  # a checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> Any:
        """A core class from its module, or a model class from the chosen backend (PEP 562)."""
        import importlib

        if name in _CORE:
            return getattr(importlib.import_module(_CORE[name]), name)
        if name in _ROOMS:
            return importlib.import_module(_ROOMS[name])
        from gptj.backends import asked_by_import, missing_name, unchosen

        by_import = asked_by_import()
        if name not in _MODELS:
            wing = {"TF": "tf", "Fl": "flax"}.get(name[:2])
            known = name.removeprefix("TF").removeprefix("Flax") in _MODELS and wing is not None
            hint = f"Say from gptj.{wing} import {name}" if known else None
            if name in BACKENDS and not by_import:
                hint = f"Say import gptj.{name}"
            raise missing_name(sys.modules[__name__], name, [*__all__, *_MODELS], by_import=by_import, hint=hint)
        try:
            return getattr(backend(), name)
        except ImportError as error:
            if by_import:
                raise
            raise unchosen(name, error) from None


def __dir__() -> list[str]:
    """The names that can be had as things are: a backend's only where one is chosen. Nothing is imported for it."""
    try:
        choose_backend()
    except GPTJError:
        return sorted({*globals(), *__all__, *_ROOMS})
    return sorted({*globals(), *__all__, *_ROOMS, *_MODELS})
