"""A step of fine-tuning in TensorFlow: loss and gradient under a Keras policy, Keras' AdamW with torch's epsilon."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from numpy.typing import NDArray

from gptj.finetune.settings import BETA_1, BETA_2, EPSILON, Settings
from gptj.tf.heads import GPTJForCausalLM
from gptj.tf.weights import from_numpy, to_numpy


def open_model(directory: str | os.PathLike[str], settings: Settings) -> GPTJForCausalLM:
    """The model in a folder as it is to be trained: without dropout, its parameters in float32 where they are."""
    # Differs: what is computed in is settled when a Keras model is made.
    policy = settings.dtype if settings.dtype == settings.kept_dtype else f"mixed_{settings.dtype}"
    model: GPTJForCausalLM = GPTJForCausalLM.from_pretrained(
        directory, dtype=policy, mmap=False, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    )
    return model


def trained_parameters(model: GPTJForCausalLM) -> dict[str, Any]:
    """The parameters that are trained, by their names in files: the adapter's at work, or all."""
    if (name := model.active_adapter) is not None:
        found: dict[str, Any] = {}
        for row in model._adapters.by_name[name].rows:
            layer: Any = model.base_model
            for part in row.module.split("."):
                layer = layer[int(part)] if part.isdecimal() else getattr(layer, part)
            added = layer.lora.at_work
            found |= {row.a.name: added.a, row.b.name: added.b}
        return found
    return {v.path.split("/", 1)[1].replace("/", "."): v for v in model.trainable_variables}


# Differs: PyTorch and optax add epsilon to the root of the corrected second moment, Keras to that of the other.
class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW, whose epsilon is beside the corrected root, and whose corrections are computed in float64."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move a variable, once Keras has let it decay."""
        place = self._get_variable_index(variable)
        first, second = self._momentums[place], self._velocities[place]
        count = tf.cast(self.iterations + 1, tf.float64)
        of_first, of_second = (
            tf.cast(1 - tf.constant(beta, tf.float64) ** count, gradient.dtype) for beta in (self.beta_1, self.beta_2)
        )
        first.assign(first * self.beta_1 + gradient * (1 - self.beta_1))
        second.assign(second * self.beta_2 + gradient * gradient * (1 - self.beta_2))
        root = tf.sqrt(second) / tf.sqrt(of_second) + self.epsilon
        variable.assign_sub(tf.cast(learning_rate, gradient.dtype) / of_first * (first / root))


class TrainingStep:
    """See `gptj.finetune.loop.TrainingStep`.

    Mixed precision is a Keras policy, whose variables are float32; beside an adapter the model's own dtype is that of
    computing.
    """

    def __init__(self, model: GPTJForCausalLM, settings: Settings) -> None:
        self.model = model
        self.parameters = trained_parameters(model)
        self.optimizer = AdamW(
            learning_rate=1.0, weight_decay=settings.weight_decay, beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON
        )
        self.optimizer.exclude_from_weight_decay([v for v in self.parameters.values() if len(v.shape) <= 1])
        self.optimizer.build(list(self.parameters.values()))
        # Differs: gradients are values, which each compiled function takes and gives.
        self._gradients: list[tf.Tensor] | None = None
        self._accumulate = tf.function(self._loss_and_gradients)
        self._update = tf.function(self._apply)
        self._evaluate = tf.function(lambda ids, labels: self._loss(ids, labels, training=False))

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""
        given = (tf.convert_to_tensor(ids), tf.convert_to_tensor(labels), tf.constant(factor, tf.float32))
        loss, gradients = self._accumulate(*given)
        before = self._gradients
        self._gradients = gradients if before is None else [a + b for a, b in zip(before, gradients, strict=True)]
        return float(loss)

    def gradient_norm(self) -> float:
        """The norm of the whole gradient."""
        return float(tf.linalg.global_norm(self._gradients))

    def update(self, rate: float, *, factor: float) -> None:
        """One update of AdamW by `factor` times the gradient, which is then none again."""
        self.optimizer.learning_rate = rate
        self._update(self._gradients, tf.constant(factor, tf.float32))
        self.discard()

    def discard(self) -> None:
        """Let the gradient be none again, without an update."""
        self._gradients = None

    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""
        return float(self._evaluate(tf.convert_to_tensor(ids), tf.convert_to_tensor(labels)))

    def trained_model(self) -> GPTJForCausalLM:
        """The model, with its parameters as they are trained by now."""
        return self.model

    def read(self, name: str) -> NDArray[Any]:
        """A trained parameter by its name, in float32."""
        return to_numpy(self.parameters[name])

    def moments(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """AdamW's moments: "first.NAME" and "second.NAME" for each trained parameter."""
        for name, variable in self.parameters.items():
            place = self.optimizer._get_variable_index(variable)
            yield f"first.{name}", to_numpy(self.optimizer._momentums[place])
            yield f"second.{name}", to_numpy(self.optimizer._velocities[place])

    def restore(self, moments: Mapping[str, NDArray[Any]], *, updates: int) -> None:
        """Go on from these moments, after so many updates."""
        self.optimizer.iterations.assign(updates)
        for name, variable in self.parameters.items():
            place = self.optimizer._get_variable_index(variable)
            self.optimizer._momentums[place].assign(from_numpy(moments[f"first.{name}"]))
            self.optimizer._velocities[place].assign(from_numpy(moments[f"second.{name}"]))

    def _loss(self, ids: tf.Tensor, labels: tf.Tensor, *, training: bool) -> tf.Tensor:
        return self.model(ids, labels=labels, use_cache=False, training=training).loss

    def _loss_and_gradients(
        self, ids: tf.Tensor, labels: tf.Tensor, factor: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        variables = list(self.parameters.values())
        with tf.GradientTape() as tape:
            loss = self._loss(ids, labels, training=True)
            scaled = loss * factor
        gradients = tape.gradient(scaled, [variable.value for variable in variables])
        return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def _apply(self, gradients: list[tf.Tensor], factor: tf.Tensor) -> None:
        self.optimizer.apply([gradient * factor for gradient in gradients], list(self.parameters.values()))
