"""What `prepare_for_inference` owes its callers in every wing: which arguments it takes, and what is over afterwards.

A prepared model has its weights in the layout, and where asked in the precision, that decoding is fastest in. The
parameters as the file has them are gone then, and with them everything that needs them; each such act is refused by
name, and nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Collection

from gptj.errors import InputError, shown
from gptj.schema import HEADS, Head

__all__ = ["QUANTIZATIONS", "check_inference", "check_quantize", "refusal"]

QUANTIZATIONS = ("int8", "int4")
"""Precisions of weights: 8 bits with a scale an output channel, 4 bits with a scale a group of neighbours."""


def check_quantize(quantize: str | None, honoured: Collection[str]) -> None:
    """Refuse a quantization that the wing does not have.

    Args:
        quantize: None for the parameters' own dtype, or a name.
        honoured: those of `QUANTIZATIONS` that the wing has.
    """
    if quantize is not None and quantize not in honoured:
        expected = " or ".join(("None", *honoured))
        raise InputError("no such quantization here", where="quantize", expected=expected, found=shown(quantize))


def check_inference(head: Head, inference: bool, quantize: str | None) -> None:
    """Refuse what `from_pretrained` cannot mean: a class without a fast path, quantize without inference."""
    if quantize is not None and not inference:
        raise InputError("given without inference", where="quantize", found=shown(quantize), hint="Add inference=True")
    if inference and head != "causal_lm":
        raise InputError(
            "this class cannot be prepared", where="inference", expected=HEADS["causal_lm"], found=HEADS[head]
        )


def refusal(act: str) -> InputError:
    """The error of an act that a prepared model cannot do any more: `raise refusal("save_pretrained")`."""
    return InputError(
        "the model is prepared for inference, and its parameters are no longer there as the file has them",
        where=act,
        hint="Load the folder once more, without inference=True and without prepare_for_inference",
    )
