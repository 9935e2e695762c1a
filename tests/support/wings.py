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
from gptj.config.schema import HEADS, Head

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

    def allow_float64(self) -> None:
        """In jax float64 is a mode of the whole process; where JAX_ENABLE_X64 was not set, this sets it."""
        if self.name == "flax":
            import jax

            jax.config.update("jax_enable_x64", True)

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

    def step(self, model: Any, kind: str, **arguments: Any) -> dict[str, np.ndarray]:
        """Every parameter after one step of the framework's own optimizer; see `stepped` for the constants."""
        if self.name == "pt":
            import torch

            adam = {"betas": (BETA_1, BETA_2), "eps": EPSILON, "weight_decay": DECAY}
            optimizer = (
                torch.optim.AdamW(model.parameters(), lr=RATE, **adam)
                if kind == "adamw"
                else torch.optim.SGD(model.parameters(), lr=RATE)
            )
            model.train()
            model(**arguments).loss.backward()
            optimizer.step()
            model.eval()
            return self.parameters(model)
        if self.name == "tf":
            import keras
            import tensorflow as tf

            # Keras adds epsilon before it corrects the second moment's bias, the others after.
            adam = {"beta_1": BETA_1, "beta_2": BETA_2, "epsilon": EPSILON * (1 - BETA_2) ** 0.5, "weight_decay": DECAY}
            chosen = keras.optimizers.AdamW(RATE, **adam) if kind == "adamw" else keras.optimizers.SGD(RATE)
            with tf.GradientTape() as tape:
                loss = model(**arguments, training=True).loss
            variables = model.trainable_variables
            chosen.apply(tape.gradient(loss, variables), variables)
            return self.parameters(model)
        import jax
        import optax

        adam = {"b1": BETA_1, "b2": BETA_2, "eps": EPSILON, "weight_decay": DECAY}
        chosen = optax.adamw(RATE, **adam) if kind == "adamw" else optax.sgd(RATE)
        gradient = jax.grad(lambda params: model(**arguments, params=params, train=True).loss)(model.params)
        updates, _ = chosen.update(gradient, chosen.init(model.params), model.params)
        return {name: self.numpy(value) for name, value in _flat(optax.apply_updates(model.params, updates))}


RATE, BETA_1, BETA_2, EPSILON, DECAY = 2**-10, 0.875, 0.96875, 2**-20, 2**-7
"""Powers of two and their sums, which float32 holds exactly: Keras keeps its learning rate in float32."""


def stepped(parameter: np.ndarray, gradient: np.ndarray, kind: str) -> np.ndarray:
    """A parameter after one step: SGD, or AdamW (Loshchilov and Hutter, arXiv:1711.05101) with both moments at zero."""
    if kind == "sgd":
        return parameter - RATE * gradient
    first, second = (1 - BETA_1) * gradient, (1 - BETA_2) * gradient**2
    ratio = (first / (1 - BETA_1)) / (np.sqrt(second / (1 - BETA_2)) + EPSILON)
    return parameter - RATE * (ratio + DECAY * parameter)


def _flat(tree: dict[str, Any], prefix: str = "") -> Any:
    """Pairs of a dotted path and an array."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
