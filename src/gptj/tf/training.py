"""Keras' training, prediction and export of the models here: checked data, the model's own loss, outputs by name.

Differs: Keras has a training loop of its own, so its models know their loss, predict in batches, save themselves.
PyTorch and Flax leave the loop to the user, and have no such file.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gptj.calls.outputs import BaseModelOutputWithPast, ModelOutput, QuestionAnsweringModelOutput
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.tf.arguments import assert_arguments
from gptj.tf.copies import check_fit, count_copies


def check_data_first(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keras' fit, evaluate or predict, but with the data checked on the host before anything is compiled.

    Differs: Keras compiles its steps with XLA, which drops the assertions that a graph has in place of errors.
    """

    takes_labels = "y" in inspect.signature(run).parameters

    @functools.wraps(run)
    def checked(self: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        with self.distribute_strategy.scope():
            check_fit()
        labels = (args[0] if args else kwargs.get("y")) if takes_labels else None
        return run(self, self._check_data(x, labels), *args, **kwargs)

    return checked


class TrainableModel(keras.Model):
    """A Keras model whose `fit`, `evaluate`, `predict` and `export` know the models here; see `PretrainedModel`."""

    _traced_config: GPTJConfig | None = None

    def _forget_traces(self) -> None:
        """Let the steps be traced anew where the config is another than when they were: they hold its flags."""
        if self._traced_config != self.config:
            self.train_function = self.test_function = self.predict_function = None
            self._traced_config = copy.deepcopy(self.config)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras' own, traced anew where the config was changed."""
        self._forget_traces()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        """Keras' own, traced anew where the config was changed."""
        self._forget_traces()
        return super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Keras' own, traced anew where the config was changed."""
        self._forget_traces()
        return super().make_predict_function(force)

    fit = check_data_first(keras.Model.fit)
    evaluate = check_data_first(keras.Model.evaluate)
    predict = check_data_first(keras.Model.predict)

    def _check_data(self, x: Any, labels: Any) -> Any:
        """`x`, once its arrays are checked; a dataset such that it checks each batch when it comes."""
        if isinstance(x, tf.data.Dataset):
            return x.map(self._check_batch, num_parallel_calls=tf.data.AUTOTUNE)
        if all(isinstance(array, np.ndarray) or tf.is_tensor(array) for array in _arrays(x)):
            arrays = all(isinstance(array, np.ndarray) or tf.is_tensor(array) for array in _arrays(labels))
            given = self._with_labels(x, labels) if labels is not None and self._own_loss and arrays else x
            self._check(self._convert_arguments((given,), {}))
        return x

    @tf.autograph.experimental.do_not_convert
    def _check_batch(self, *batch: Any) -> Any:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch if len(batch) > 1 else batch[0])
        given = self._convert_arguments((self._with_labels(x, y) if y is not None and self._own_loss else x,), {})
        self._check(given)
        assert_arguments(self.config, given)
        return batch if len(batch) > 1 else batch[0]

    @property
    def _own_loss(self) -> bool:
        """Whether `compile` was given no loss: then y are the model's own labels."""
        return bool(self.compiled) and self._compile_loss is None

    def _with_labels(self, x: Any, y: Any) -> dict[str, Any]:
        """The arguments of a call by name, with y under the names of the model's labels.

        Raises:
            InputError: the model has no labels, or y are not as many as it has.
        """
        parameters = inspect.signature(self.call).parameters
        names = [name for name in ("labels", "start_positions", "end_positions") if name in parameters]
        values = dict(y) if isinstance(y, Mapping) else dict(zip(names, _arrays(y), strict=False))
        if not names or values.keys() != set(names) or len(values) != len(_arrays(y)):
            expected = " and ".join(names) or "a loss given to compile: this class has none of its own"
            raise InputError("not the model's labels", where="y", expected=expected, found=f"{len(_arrays(y))} arrays")
        named = dict(x) if isinstance(x, Mapping) else self._by_name(_arrays(x))
        if given_twice := [name for name in names if named.get(name) is not None]:
            raise InputError("labels in x and in y", where=given_twice[0], hint="Give them once")
        return {**named, **values}

    def train_step(self, data: Any) -> Any:
        """One step of `fit`; see `compute_loss`."""
        return super().train_step(self._add_labels(data))

    def test_step(self, data: Any) -> Any:
        """One step of `evaluate`; see `compute_loss`."""
        return super().test_step(self._add_labels(data))

    def _add_labels(self, data: Any) -> Any:
        """A batch, with y among the call's arguments too where the loss is the model's own."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or not self._own_loss:
            return data
        return self._with_labels(x, y), y, sample_weight

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss that `compile` was given, of y; where it was given none, the model's own, of y or the labels in x.

        Raises:
            InputError: a loss or weights were given without a y that they apply to, or there are no labels at all.
        """
        own: Any = getattr(y_pred, "loss", None)
        if own is None and y is None:
            raise InputError("no labels to train on", where="x", hint="Put them into x, or pass them as y")
        if y is not None and not self._own_loss:
            return super().compute_loss(x, y, _predictions(y_pred, like=y), sample_weight, training)
        if self._compile_loss is not None or sample_weight is not None:
            problem = "the labels are inside x" if y is None else "the loss is the model's own"
            hint = "Pass the labels as y and a loss to compile, or neither a loss nor weights for the model's own"
            raise InputError(f"a loss or weights, but {problem}", where="compile", hint=hint)
        # Keras adds the copies' gradients, and multiplies the loss that it shows.
        return tf.add_n([own, *(tf.cast(loss, own.dtype) for loss in self.losses)]) / count_copies()

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Keras' metrics of y and what answers it: the logits, or a start and an end."""
        return super().compute_metrics(x, y, _predictions(y_pred, like=y), sample_weight)

    def predict_step(self, data: Any) -> Any:
        """The outputs of one batch, those whose first axis is the batch: neither cache nor loss."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        options = {"use_cache": False} if "use_cache" in inspect.signature(self.call).parameters else {}
        outputs = self(x, training=False, **options)
        if not isinstance(outputs, ModelOutput):
            return outputs
        return type(outputs)(**{name: value for name, value in outputs.items() if name != "loss"})

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a SavedModel that serves {"input_ids", "attention_mask"} of any sizes, without this library.

        `input_signature` may say otherwise: a list of one dict of `tf.TensorSpec` by argument. Other formats are
        Keras' own.
        """
        if format != "tf_saved_model":
            super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)
            return
        ids = {name: tf.TensorSpec((None, None), tf.int64, name=name) for name in ("input_ids", "attention_mask")}

        def serve(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
            outputs = self.predict_step((arguments,))
            return {name: value for name, value in outputs.items() if tf.is_tensor(value)}

        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint("serve", serve, input_signature or [ids])
        archive.write_out(os.fspath(filepath), verbose=bool(verbose))


def _predictions(y_pred: Any, *, like: Any) -> Any:
    """The part of a model's output that a Keras loss or metric compares with y: the logits, or a start and an end."""
    if not isinstance(y_pred, ModelOutput):
        return y_pred
    if isinstance(y_pred, QuestionAnsweringModelOutput):
        pair = y_pred.start_logits, y_pred.end_logits
        return dict(zip(("start_positions", "end_positions"), pair, strict=True)) if isinstance(like, Mapping) else pair
    return y_pred["last_hidden_state" if isinstance(y_pred, BaseModelOutputWithPast) else "logits"]


def _arrays(data: Any) -> list[Any]:
    """The arrays of Keras' x or y: of a dict, of a list, or the one that it is."""
    return list(data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else [data])
