"""`prepare_for_inference` in every wing: the arguments that it takes, and the calls that it ends.

A prepared model has its weights in the layout, and where asked in the precision, that decoding is fastest in. The
parameters as the file has them may be gone then, so everything that needs them is over; each such act is refused by
name, the same acts in the same words in every wing, and nothing falls back in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from gptj.config.schema import HEADS, Head
from gptj.errors import InputError, shown

__all__ = [
    "DEVICES",
    "DEVICES_CALLED",
    "QUANTIZATIONS",
    "check_device",
    "check_inference",
    "check_quantize",
    "give_up",
    "refusal",
]

QUANTIZATIONS = ("int8", "int4")
"""Precisions of weights: 8 bits with a scale an output channel, 4 bits with a scale a group of neighbours."""


DEVICES = ("auto", "cpu", "cuda", "mps")
"""Devices that a model may be asked to run on; "auto" is the best that the framework sees."""

DEVICES_CALLED = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "metal": "mps", "apple": "mps", "default": "auto"}
"""Other names that people use for them, to guess what they mean."""


def check_device(name: str, there: Mapping[str, bool], framework: str) -> None:
    """Refuse a device that the framework does not see.

    Args:
        name: one of `DEVICES`, or one with a number, such as cuda:1.
        there: whether it sees each.
        framework: its name and version.
    """
    if name.partition(":")[0] not in DEVICES:
        meant = DEVICES_CALLED.get(name.partition(":")[0].lower())
        raise InputError(
            "no such device",
            where="device",
            expected="one of " + ", ".join(DEVICES),
            found=shown(name),
            hint=None if meant is None else f"Did you mean {meant}?",
        )
    if not there.get(name, name == "auto"):
        seen = ", ".join(kind for kind, seen in there.items() if seen)
        hint = "Install the framework's build for that device, and its driver, or say auto"
        raise InputError(f"{framework} sees no such device", where="device", expected=seen, found=name, hint=hint)


def check_quantize(quantize: str | None, honoured: Collection[str]) -> None:
    """Refuse a quantization that the wing does not have.

    Args:
        quantize: None for the parameters' own dtype, or a name.
        honoured: those of `QUANTIZATIONS` that the wing has.
    """
    if quantize is not None and quantize not in honoured:
        expected = " or ".join(("None", *honoured))
        raise InputError(
            "no such quantization here",
            where="quantize",
            expected=expected,
            found=shown(quantize),
            hint=None if honoured else "PyTorch alone quantizes: gptj.pt, or --backend pt",
        )


def check_inference(head: Head, inference: bool, quantize: str | None, *, is_cut: bool) -> None:
    """Refuse what `from_pretrained` cannot mean: a class without a fast path, quantize without inference.

    Args:
        is_cut: whether the model is to be cut across devices, which is neither prepared nor quantised.
    """
    if quantize is not None and is_cut:
        hint = "Leave it out, or load the model on one device with inference=True"
        raise InputError(
            "a model on several devices is not quantised", where="quantize", found=shown(quantize), hint=hint
        )
    if inference and is_cut:
        hint = "Leave inference=True out; tp is for inference already"
        raise InputError("a model on several devices cannot be prepared", where="inference", found=True, hint=hint)
    if quantize is not None and not inference:
        raise InputError("given without inference", where="quantize", found=shown(quantize), hint="Add inference=True")
    if inference and head != "causal_lm":
        raise InputError(
            "this class cannot be prepared", where="inference", expected=HEADS["causal_lm"], found=HEADS[head]
        )


def refusal(act: str) -> InputError:
    """The error of an act that a prepared model cannot do any more: `raise refusal("save_pretrained")`."""
    return InputError(
        "the model is prepared for inference, which cannot be undone",
        where=act,
        hint="Load the folder once more, without inference=True and without prepare_for_inference",
    )


def give_up(model: Any, acts: Mapping[str, str]) -> None:
    """From now on, refuse by name what a framework's own classes would do to a prepared model.

    Args:
        model: the object; its class stays as it is.
        acts: methods, and what each is called in the refusal.
    """
    for method, act in acts.items():
        setattr(model, method, functools.partial(_refuse, act))


def _refuse(act: str, *arguments: Any, **options: Any) -> Any:
    raise refusal(act)
