"""How far two right answers may lie apart, a dtype at a time: named numbers, and where each comes from.

For a test of one's own, which has no oracle at hand; `gptj parity` derives its limits (`gptj.parity.perturbed`).

All are bounds on the largest absolute difference of logits between a backend and the float64 oracle on the same
(already rounded) weights. They were set on the revealing checkpoint, on which each classic mistake moves some logit
by 5.8e-4 or more (`tests/support/mutants.py`), and they follow the logits' size, since rounding errors do: measured on
the oracle itself in float32, the error is 3.1e-7 of the largest logit at width 48, 8.8e-7 at 768, 6.7e-7 at 2,048, and
the same at 3, 12 and 28 layers. So neither width nor depth is in the bounds.
"""

from __future__ import annotations

import dataclasses

from gptj.errors import InputError

__all__ = [
    "BFLOAT16_RELATIVE",
    "FLOAT16_RELATIVE",
    "FLOAT32_ABSOLUTE",
    "FLOAT32_LARGEST_LOGIT",
    "FLOAT64_RELATIVE",
    "Tolerance",
    "tolerance_of",
]

FLOAT64_RELATIVE = 1e-9
"""Of the largest logit. float64 rounds at 1.1e-16; what is measured is near 1e-15. A backend that slips into float32
anywhere is off by 1e-7, so anything between tells the two apart, and this is between."""

FLOAT32_ABSOLUTE = 2e-5
"""On logits of at most `FLOAT32_LARGEST_LOGIT`: 13 times the 1.5e-6 that float32 costs the oracle there, 5 times the
3.8e-6 by which two routes through the original implementation differ, a 29th of the smallest planted mistake."""

FLOAT32_LARGEST_LOGIT = 5.0
"""The revealing checkpoint's, rounded; a model with larger logits is allowed proportionally more."""

BFLOAT16_RELATIVE = 4e-2
"""Of the largest logit. bfloat16 rounds at 2^-8 = 3.9e-3 of a value, at every step of every block: ten such steps in
a row. At 3 layers Flax is off by 5.6e-3 of the largest logit, PyTorch by 7.1e-3, TensorFlow by 1.1e-2; PyTorch at 28
layers by 1.3e-2. Only gross mistakes show in bfloat16; parity is proven in float32 and float64."""

FLOAT16_RELATIVE = BFLOAT16_RELATIVE / 8
"""float16 has three more bits than bfloat16, so it rounds 8 times finer. PyTorch: 8.3e-4 at 3 layers, 1.5e-3 at 28."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The bounds for one dtype: `relative` of the largest value, and never less than `floor`."""

    dtype: str
    relative: float
    floor: float = 0.0

    def of_logits(self, largest: float) -> float:
        """The bound on logits, and on attention weights, where the largest reference logit is `largest`."""
        return max(self.relative * largest, self.floor)


def tolerance_of(dtype: str) -> Tolerance:
    """The bounds for parameters of `dtype`.

    Raises:
        InputError: there is none for it.

    >>> tolerance_of("float32").of_logits(4.8), round(tolerance_of("float32").of_logits(50.0), 9)
    (2e-05, 0.0002)
    """
    bounds = {
        "float64": Tolerance("float64", FLOAT64_RELATIVE),
        "float32": Tolerance("float32", FLOAT32_ABSOLUTE / FLOAT32_LARGEST_LOGIT, FLOAT32_ABSOLUTE),
        "bfloat16": Tolerance("bfloat16", BFLOAT16_RELATIVE),
        "float16": Tolerance("float16", FLOAT16_RELATIVE),
    }
    if dtype not in bounds:
        raise InputError("no tolerance", where="dtype", expected="one of " + ", ".join(bounds), found=dtype)
    return bounds[dtype]
