"""A PyTorch model as a program for other tools: torch.export's, and ONNX through torch.onnx.

Both are one call of the model over a cache of any length, 0 among them, for any batch and number of new tokens. The
cache's arrays are inputs and outputs, with the names that Optimum gives to ONNX decoders.

Differs: torch.export and ONNX are PyTorch's, a SavedModel is TensorFlow's (`tf/export.py`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptj.calls.outputs import KVCache
from gptj.errors import InputError

__all__ = ["PROGRAM_FILE", "cache_names", "export_program", "write_onnx", "write_torch_export"]

PROGRAM_FILE = "model.pt2"
ONNX_FILE = "model.onnx"

LARGEST_BATCH = 2**16
"""The most rows of a call; a program's sizes are bounded."""


def cache_names(n_layer: int, of: str) -> list[str]:
    """The names of a cache's arrays: `past_key_values.0.key`, `past_key_values.0.value`, and so on."""
    return [f"{of}.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


class Step(nn.Module):
    """A call of the model with flat inputs and outputs.

    Args:
        model: a GPTJForCausalLM in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The logits (b, t, v), and the keys and values of all tokens so far, layer by layer.

        Args:
            input_ids: int64 (b, t), the new tokens.
            attention_mask: int64 (b, past + t) of 0 and 1.
            position_ids: int64 (b, t).
            past: keys and values (b, h, past, d) of each layer in turn.
        """
        cache = KVCache(tuple(past[::2]), tuple(past[1::2]), past[0].shape[2])
        outputs = self.model(
            input_ids,
            cache,
            attention_mask,
            position_ids=position_ids,
            use_cache=True,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        kept = outputs.past_key_values
        return outputs.logits, *(x for pair in zip(kept.keys, kept.values, strict=True) for x in pair)


def _example(model: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs that the model is traced with, and which of their axes may be of any size."""
    config, weight = model.config, model.transformer.wte.weight
    b, t, past = 2, 3, 4  # neither 0 nor 1, which a trace would take for constants
    whole = torch.zeros(b, past + t, dtype=torch.int64, device=weight.device)
    cache = [
        torch.zeros(b, config.n_head, past, config.head_dim, dtype=weight.dtype, device=weight.device)
        for _ in range(2 * config.n_layer)
    ]
    inputs = (whole[:, :t].clone(), torch.ones_like(whole), whole[:, :t].clone(), cache)
    rows, new = (
        torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
        torch.export.Dim("new", min=1, max=config.n_positions),
    )
    held = torch.export.Dim("past", min=0, max=config.n_positions)
    axes = (
        {0: rows, 1: new},
        {0: rows, 1: torch.export.Dim.DYNAMIC},
        {0: rows, 1: new},
        [{0: rows, 2: held}] * len(cache),
    )
    return inputs, axes


def _check(model: Any) -> None:
    if model.config.n_positions < 8:
        raise InputError("too few positions to be traced", where="n_positions", expected="8 or more")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own warnings: of what a later version will do otherwise, and of libraries that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def export_program(model: Any) -> Any:
    """The model's `Step` as a `torch.export.ExportedProgram`.

    Args:
        model: a GPTJForCausalLM that is not prepared for inference.
    """
    _check(model)
    inputs, axes = _example(model.eval())
    with _quiet():
        return torch.export.export(Step(model), inputs, dynamic_shapes=axes, strict=False)


def write_torch_export(model: Any, folder: Path) -> None:
    """Write the program as `PROGRAM_FILE` into the folder, for torch.export.load and for AOTInductor."""
    program = export_program(model)
    with _quiet():
        torch.export.save(program, folder / PROGRAM_FILE)


@torch.no_grad()
def write_onnx(model: Any, folder: Path) -> None:
    """Write the model as `ONNX_FILE`, its weights beside it, into the folder.

    Raises:
        InputError: parameters in bfloat16, in which onnxruntime has no products of matrices on a CPU.
    """
    _check(model)
    if model.dtype == torch.bfloat16:
        hint = "Say --dtype float32, or float16 for a GPU"
        raise InputError("bfloat16, which onnxruntime does not multiply", where="dtype", hint=hint)
    inputs, axes = _example(model.eval())
    n_layer = model.config.n_layer
    with _quiet():
        program = torch.onnx.export(
            Step(model),
            inputs,
            input_names=["input_ids", "attention_mask", "position_ids", *cache_names(n_layer, "past_key_values")],
            output_names=["logits", *cache_names(n_layer, "present")],
            dynamic_shapes=axes,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        mask = next(given for given in program.model.graph.inputs if given.name == "attention_mask")
        mask.shape[1] = "past + new"  # which a trace names after itself
        program.save(folder / ONNX_FILE, external_data=True)
