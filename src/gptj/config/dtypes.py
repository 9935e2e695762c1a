"""The floating-point types of parameters, by one name each, however a framework spells them."""

from __future__ import annotations

import contextlib
import difflib
from typing import Any

import ml_dtypes
import numpy as np

from gptj.errors import InputError, shown

__all__ = ["DTYPES_CALLED", "PARAMETER_DTYPES", "dtype_name", "numpy_dtype"]

PARAMETER_DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The types that parameters may have."""

DTYPES_CALLED = {
    "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32", "f32": "float32", "float": "float32",
    "single": "float32", "fp64": "float64", "f64": "float64", "double": "float64", "bf16": "bfloat16",
    "brain": "bfloat16",
}  # fmt: skip
"""Other names that people use for them, to guess what they mean."""


def dtype_name(value: Any) -> str:
    """The name in `PARAMETER_DTYPES` of a dtype: a name, or NumPy's, torch's, TensorFlow's or jax's own object.

    Raises:
        InputError: it is no such type.
    """
    text = value if isinstance(value, str) else str(getattr(value, "name", None) or getattr(value, "__name__", value))
    name = text.removeprefix("torch.")
    if name not in PARAMETER_DTYPES:
        close = difflib.get_close_matches(name.lower(), PARAMETER_DTYPES, n=1, cutoff=0.85)
        meant = DTYPES_CALLED.get(name.lower()) or next(iter(close), None)
        raise InputError(
            "no parameter dtype",
            where="dtype",
            expected=" or ".join(PARAMETER_DTYPES),
            found=shown(text),
            hint=None if meant is None else f"Did you mean {meant}?",
        )
    return name


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype of one of `PARAMETER_DTYPES`, given by name, NumPy dtype or scalar type; bfloat16 is ml_dtypes'.

    Raises:
        InputError: it is none of them.
    """
    by_name = isinstance(dtype, str) and dtype == "bfloat16"
    with contextlib.suppress(TypeError):
        found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if by_name else dtype)
        if found.name in PARAMETER_DTYPES and found.isnative:
            return found
    expected = " or ".join(PARAMETER_DTYPES)
    raise InputError("not a dtype of weights", where="dtype", expected=expected, found=shown(dtype))
