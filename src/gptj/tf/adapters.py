"""LoRA adapters in TensorFlow: the pairs of matrices beside a layer, and the hooks of `gptj.pretrained.adapted`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from gptj.adapters import TARGETS, AdapterConfig, AdapterRow


def add_low_rank(x: tf.Tensor, y: tf.Tensor, a: Any, b: Any, scale: Any) -> tf.Tensor:
    """`y` (..., out) + scale B A `x` (..., in), in the matrices' own precision, rounded once."""
    a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
    narrow = tf.matmul(tf.reshape(tf.cast(x, a.dtype), (-1, a.shape[1])), a, transpose_b=True)
    added = tf.convert_to_tensor(scale, a.dtype) * tf.matmul(narrow, b, transpose_b=True)
    return tf.cast(tf.cast(y, a.dtype) + tf.reshape(added, tf.shape(y)), y.dtype)


class LowRank:
    """scale B A of one adapter beside one matrix.

    Args:
        row: its place, and the scale.
        a, b: A (r, in) and B (out, r).
        dropout: of A's input in training.
    """

    # Differs: no layer, since Keras would go on counting one that is taken away; `LowRanks` holds the variables.
    def __init__(self, row: AdapterRow, a: NDArray[Any], b: NDArray[Any], dropout: float) -> None:
        self.a, self.b = (
            keras.Variable(array, dtype=array.dtype.name, autocast=False, name=leaf)
            for leaf, array in (("a", a), ("b", b))
        )
        self.scale, self.rate = row.scale, dropout
        self.place = TARGETS.index(row.module.split(".", 2)[2])

    def values(self) -> tuple[tf.Variable, tf.Variable, tf.Tensor]:
        """A, B and the scale, as `add_low_rank` takes them."""
        return self.a.value, self.b.value, tf.constant(self.scale, self.a.dtype)

    def __call__(self, x: tf.Tensor, y: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        """`y` with what the adapter makes of `x` added; with a seed, elements of `x` are dropped."""
        if seed is not None and self.rate:
            # Differs: of the block's seed, as every dropout here; the place keeps two matrices from dropping alike.
            folded = tf.random.experimental.stateless_fold_in(seed, 1 + self.place)
            x = tf.nn.experimental.stateless_dropout(tf.cast(x, self.a.dtype), self.rate, folded)
        return add_low_rank(x, y, self.a, self.b, self.scale)


class LowRanks(keras.layers.Layer):
    """The adapters held beside one matrix, by name, of which one at most is at work."""

    def __init__(self) -> None:
        super().__init__(name="lora", autocast=False)
        self.active: str | None = None
        self.held: dict[str, LowRank] = {}
        self.built = True

    def call(self, x: tf.Tensor, y: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        """`y` (..., out), the product of `x` (..., in), with what the adapter at work adds."""
        added = self.at_work
        return y if added is None else added(x, y, seed)

    @property
    def at_work(self) -> LowRank | None:
        """The adapter at work, None where it adds nothing to this matrix."""
        return None if self.active is None else self.held.get(self.active)

    def hold(self, name: str, added: LowRank) -> None:
        """Keep an adapter under a name, its variables among the layer's own."""
        self.held[name] = added
        setattr(self, f"{name} a", added.a)
        setattr(self, f"{name} b", added.b)

    def drop(self, name: str) -> None:
        """Let an adapter go."""
        if self.held.pop(name, None) is not None:
            for leaf in ("a", "b"):
                # Differs: Keras' own way collects all garbage once a variable, seconds for an adapter of many.
                self._untrack_variable(getattr(self, f"{name} {leaf}"))
                super(keras.layers.Layer, self).__delattr__(f"{name} {leaf}")


class AdapterMixin:
    """The hooks of `gptj.pretrained.adapted.Adapted`: an adapter's matrices are variables of the layers."""

    def _hold_adapter(
        self, name: str, config: AdapterConfig, arrays: list[tuple[AdapterRow, NDArray[Any], NDArray[Any]]]
    ) -> None:
        model: Any = self
        for row, a, b in arrays:
            layer: Any = model.base_model
            with contextlib.ExitStack() as path:
                for scope in (model.name, *row.module.split("."), "lora"):
                    path.enter_context(keras.name_scope(scope))
                for part in row.module.split("."):
                    layer = layer[int(part)] if part.isdecimal() else getattr(layer, part)
                if layer.lora is None:
                    layer.lora = LowRanks()
                path.enter_context(keras.name_scope(name))
                layer.lora.hold(name, LowRank(row, a, b, float(config.lora_dropout)))
        if config.lora_dropout and model.base_model.seed_generator is None:
            model.base_model.seed_generator = keras.random.SeedGenerator(model.seed)

    def _read_adapter(self, name: str, row: AdapterRow) -> tuple[NDArray[Any], NDArray[Any]]:
        layer: Any = self.base_model  # type: ignore[attr-defined]
        for part in row.module.split("."):
            layer = layer[int(part)] if part.isdecimal() else getattr(layer, part)
        added = layer.lora.held[name]
        return np.asarray(added.a.numpy()), np.asarray(added.b.numpy())

    def _activate_adapter(self, name: str | None) -> None:
        model: Any = self
        for beside in self._beside_all():
            beside.active = name
        for part in (model, model.base_model):
            part._traced_config = None  # Keras' own steps hold the adapter that they were traced with

    def _drop_adapter(self, name: str) -> None:
        for beside in self._beside_all():
            beside.drop(name)

    def _let_adapter_train(self, name: str, trains: bool) -> None:
        for beside in self._beside_all():
            if (added := beside.held.get(name)) is not None:
                added.a.trainable = added.b.trainable = trains

    def _freeze_base(self) -> dict[str, bool]:
        model: Any = self
        before = {variable.path: variable.trainable for variable in model.weights}
        for variable in model.weights:
            variable.trainable = False
        return before

    def _let_base_train(self, before: dict[str, bool]) -> None:
        model: Any = self
        for variable in model.weights:
            variable.trainable = before.get(variable.path, True)

    def _beside_all(self) -> Iterator[LowRanks]:
        """The adapters beside each matrix that has some."""
        for block in self.base_model.h:  # type: ignore[attr-defined]
            attn, mlp = block.attn, block.mlp
            for linear in (attn.k_proj, attn.v_proj, attn.q_proj, attn.out_proj, mlp.fc_in, mlp.fc_out):
                if linear.lora is not None:
                    yield linear.lora
