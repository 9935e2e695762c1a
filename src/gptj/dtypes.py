"""The floating-point types of parameters, by one name each, however a framework spells them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from gptj.errors import InputError, shown

__all__ = ["PARAMETER_DTYPES", "dtype_name", "numpy_dtype"]

PARAMETER_DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The types that parameters may have."""


def dtype_name(value: Any) -> str:
    """The name in `PARAMETER_DTYPES` of a dtype: a name, or NumPy's, torch's, TensorFlow's or jax's own object.

    Raises:
        InputError: it is no such type.
    """
    text = value if isinstance(value, str) else str(getattr(value, "name", None) or getattr(value, "__name__", value))
    name = text.removeprefix("torch.")
    if name not in PARAMETER_DTYPES:
        raise InputError("no parameter dtype", where="dtype", expected=" or ".join(PARAMETER_DTYPES), found=shown(text))
    return name


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
