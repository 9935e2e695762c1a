"""The three backends as the tests see them: one way to load, call, differentiate and train, whichever it is.

What differs here is what differs for every user of these frameworks: how a gradient is asked for. What a model
is called and what its call takes and returns is the same, and the tests use it as it is.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

import gptj
from gptj.backends import BACKENDS
from gptj.schema import HEADS, Head

FLOAT64_RELATIVE = 1e-9
"""Of the largest value: some 50 sums of 100 terms in another order cost 1e-14; 1e-9 still sees every mistake."""

FLOAT32_ABSOLUTE = 2e-5
"""On logits of size 5: the original's own two routes differ by 3.8e-6, transformers by 3.3e-6."""


def named_backends() -> tuple[str, ...]:
    """The backends under test: GPTJ_TEST_BACKENDS, with commas between. An unknown name is an error."""
    names = tuple(name for name in os.environ.get("GPTJ_TEST_BACKENDS", "").split(",") if name)
    unknown = set(names) - set(BACKENDS)
    if unknown:
        raise ValueError(f"GPTJ_TEST_BACKENDS names {sorted(unknown)}; there are {', '.join(BACKENDS)}")
    return names


def close(got: np.ndarray, expected: np.ndarray, dtype: str) -> bool:
    """Whether `got` is `expected` within what `dtype` allows. NaN is never close."""
    assert got.shape == expected.shape, f"{got.shape} is not {expected.shape}"
    bound = FLOAT64_RELATIVE * np.abs(expected).max() if dtype == "float64" else FLOAT32_ABSOLUTE
    return bool(np.abs(got - expected).max() <= bound)


class Wing:
    """One backend under test."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = gptj.backend(name)

    def __repr__(self) -> str:
        return self.name

    def model(self, head: Head) -> Any:
        """The class with this head."""
        return getattr(self.module, HEADS[head])

    def numpy(self, value: Any) -> np.ndarray:
        """The wing's array in NumPy, 16-bit floats widened."""
        array = np.asarray(self.module.to_numpy(value))
        return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind != "i" else array

    def call(self, model: Any, *arguments: Any, **options: Any) -> Any:
        """A call without a gradient."""
        with self.no_gradient():
            return model(*arguments, **options)

    def no_gradient(self) -> Any:
        if self.name == "pt":
            import torch

            return torch.no_grad()
        return contextlib.nullcontext()

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        """Every parameter by its name in the wing itself."""
        if self.name == "pt":
            named = dict(model.named_parameters())
        elif self.name == "tf":
            named = {v.path.split("/", 1)[1].replace("/", "."): v for v in model.trainable_variables}
        else:
            named = dict(_flat(model.params))
        return {name: self.numpy(value) for name, value in named.items()}

    def gradients(self, model: Any, **arguments: Any) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a call in training mode and its gradient by every parameter."""
        if self.name == "pt":
            model.train()
            model.zero_grad(set_to_none=True)
            loss = model(**arguments).loss
            loss.backward()
            grads: Any = {name: p.grad for name, p in model.named_parameters()}
            model.eval()
        elif self.name == "tf":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = model(**arguments, training=True).loss
            variables = model.trainable_variables
            found = tape.gradient(loss, variables)
            grads = {
                v.path.split("/", 1)[1].replace("/", "."): tf.convert_to_tensor(g)
                for v, g in zip(variables, found, strict=True)
            }
        else:
            import jax

            def loss_of(params: Any) -> Any:
                return model(**arguments, params=params, train=True, dropout_rng=jax.random.key(0)).loss

            loss, tree = jax.value_and_grad(loss_of)(model.params)
            grads = dict(_flat(tree))
        return float(self.numpy(loss)), {name: self.numpy(g) for name, g in grads.items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> Any:
    """Pairs of a dotted path and an array."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
