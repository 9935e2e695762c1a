"""Heads on the blocks: next-token logits, one label a row, the ends of a span; each with its loss.

Losses are float32 at least, a label of -100 counts nowhere, and the values are the same in all three backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gptj.calls import inputs
from gptj.calls.outputs import (
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    object_or_tuple,
)
from gptj.calls.prepared import refusal
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.generation import GenerationConfig
from gptj.generation.typed import ReturnDict, same_as, typed_call
from gptj.tf.arguments import batch_and_length, check_traced_ids, host, sizes
from gptj.tf.copies import count_copies, count_over_copies
from gptj.tf.generate import GenerationMixin
from gptj.tf.inference import InferenceMixin
from gptj.tf.layers import Linear, at_least_float32
from gptj.tf.model import GPTJModel
from gptj.tf.weights import PretrainedModel


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The mean over the labels that are not -100 of -log softmax(logits)[label], a scalar; 0 where there is none.

    Args:
        logits: (n, classes), float32 at least.
        labels: (n,).
    """
    counted = labels != inputs.IGNORED_LABEL
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(counted, labels, 0), logits)
    count = tf.reduce_sum(tf.cast(counted, logits.dtype))
    return tf.reduce_sum(tf.where(counted, losses, 0)) / count_over_copies(count)


@keras.saving.register_keras_serializable("gptj")
# Differs: Keras has no types, so a checker finds in a class after it nothing that it knows.
class GPTJForCausalLM(GenerationMixin, InferenceMixin, PretrainedModel):
    """GPT-J with the language-modelling head: a weight and, unlike GPT-2's, a bias.

    Args:
        config, dtype, param_dtype, seed, name, _do_init: as for `GPTJModel`.
    """

    head = "causal_lm"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        name: str | None = None,
        _do_init: bool = True,
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, seed=seed, name=name)
        policy = self.dtype_policy
        self.transformer: Any = GPTJModel(config, dtype=policy, seed=seed, name="transformer", _do_init=False)
        self.transformer._inside = True
        self.lm_head = Linear(name="lm_head", dtype=policy)
        if _do_init:
            self.initialise(dtype=policy, seed=seed)

    def tie_weights(self) -> None:
        """Make lm_head.weight the embedding's, where the config says so; lm_head.bias stays its own."""
        shared = self.transformer.wte.weight
        if self.config.tie_word_embeddings and self.lm_head.weight is not shared:
            if self.lm_head.weight is not None:
                del self.lm_head.weight  # or Keras would go on counting it
            self.lm_head.weight = shared

    @typed_call
    def call(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        training: bool | None = False,
    ) -> CausalLMOutputWithPast[tf.Tensor] | tuple[Any, ...]:
        """The logits of every next token, and with labels the loss.

        Args:
            labels: (b, t) token ids, -100 where none counts; shifted inside, so they are the input ids themselves.

        The other arguments are `GPTJModel.call`'s.
        """
        if self._is_prepared and training:
            raise refusal("training")
        others = past_key_values, token_type_ids, head_mask, inputs_embeds
        outputs: Any
        if self._is_prepared and tf.executing_eagerly() and all(argument is None for argument in others):
            outputs = self._compute_prepared(
                input_ids, attention_mask, position_ids, use_cache, output_attentions, output_hidden_states
            )
            logits = outputs.logits
        else:
            outputs = self.transformer.call(
                input_ids,
                past_key_values,
                attention_mask,
                token_type_ids,
                position_ids,
                head_mask,
                inputs_embeds,
                use_cache,
                output_attentions,
                output_hidden_states,
                return_dict=True,
                training=training,
            )
            logits = at_least_float32(self.lm_head(outputs.last_hidden_state))
        loss = None if labels is None else self._loss(logits, labels)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return object_or_tuple(output, return_dict, default=self.config.return_dict)

    if TYPE_CHECKING:

        @same_as(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `call`."""

    def _loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The mean loss of predicting each label from the position before it."""
        following = tf.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=inputs.IGNORED_LABEL)
        flat = tf.reshape(logits, (-1, self.config.vocab_size))  # logits[:, :-1] would be a copy
        return cross_entropy(flat, tf.reshape(following, (-1,)))

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> None:
        settled = self._convert_arguments((), {**given, "labels": labels})
        self._check(settled)
        labels = settled.pop("labels", None)
        hidden = self.transformer._run(**settled, taps=collector).last_hidden_state
        if collector.asks("logits", "loss"):
            logits = at_least_float32(self.lm_head(hidden))
            collector(logits=logits, loss=None if labels is None else self._loss(logits, labels))

    def _differentiate(self, given: dict[str, Any], labels: Any) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """The loss in evaluation mode, and its gradient by every parameter."""
        self._refuse_cut("a gradient")
        with tf.GradientTape() as tape:
            loss = self(**given, labels=labels, training=False).loss
        variables = self.trainable_variables
        found = tape.gradient(loss, variables)
        names = (variable.path.split("/", 1)[1].replace("/", ".") for variable in variables)
        return loss, {name: tf.convert_to_tensor(slope) for name, slope in zip(names, found, strict=True)}

    def _compiled_taps(self, given: dict[str, Any], labels: Any) -> dict[str, tf.Tensor]:
        """All taps of arrays, from one program of `tf.function` that XLA compiles."""
        tensors = {name: tf.constant(values) for name, values in (given | {"labels": labels}).items()}
        taps: dict[str, tf.Tensor] = tf.function(self.taps, jit_compile=True)(**tensors)
        return taps

    def _check(self, given: Mapping[str, Any]) -> None:
        super()._check(given)
        if (labels := given.get("labels")) is not None:
            check_traced_ids(labels, where="labels")
            if (values := host(labels)) is not None:
                inputs.check_labels(values, batch_and_length(given), self.config.vocab_size)

    def get_config(self) -> dict[str, Any]:
        """The settings that Keras saves beside the weights; see `from_config`."""
        generation = self.generation_config
        return {**super().get_config(), "generation_config": None if generation is None else generation.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GPTJForCausalLM:
        """A model with start values, as `get_config` described it."""
        members = dict(config) if isinstance(config, dict) else config
        generation = members.pop("generation_config", None) if isinstance(config, dict) else None
        model: GPTJForCausalLM = super().from_config(members)
        model.generation_config = None if generation is None else GenerationConfig.from_dict(generation)
        return model


@keras.saving.register_keras_serializable("gptj")
class GPTJForSequenceClassification(PretrainedModel):
    """GPT-J that gives each row one vector of label scores, read at its last token that is not padding.

    Args:
        config, dtype, param_dtype, seed, name, _do_init: as for `GPTJModel`.
    """

    head = "sequence_classification"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        name: str | None = None,
        _do_init: bool = True,
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, seed=seed, name=name)
        policy = self.dtype_policy
        self.transformer: Any = GPTJModel(config, dtype=policy, seed=seed, name="transformer", _do_init=False)
        self.transformer._inside = True
        self.score = Linear(name="score", dtype=policy)
        if _do_init:
            self.initialise(dtype=policy, seed=seed)

    @typed_call
    def call(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        training: bool | None = False,
    ) -> SequenceClassifierOutputWithPast[tf.Tensor] | tuple[Any, ...]:
        """The label scores of each row (b, num_labels), and with labels the loss.

        Args:
            labels: (b,) class ids, (b,) or (b, num_labels) numbers for regression, or (b, num_labels) of 0 and 1 for
                multi-label. `config.problem_type` says which; where it is None, one label means regression, whole
                numbers mean single-label and floats mean multi-label.

        The other arguments are `GPTJModel.call`'s.

        Raises:
            InputError: more than one row and no pad_token_id to find their ends by.
        """
        outputs = self.transformer.call(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            training=training,
        )
        scores = at_least_float32(self.score(outputs.last_hidden_state))
        logits = tf.gather(scores, self._last_tokens(input_ids, scores), batch_dims=1)
        output = SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return object_or_tuple(output, return_dict, default=self.config.return_dict)

    if TYPE_CHECKING:

        @same_as(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `call`."""

    def _last_tokens(self, ids: tf.Tensor | None, scores: tf.Tensor) -> tf.Tensor:
        """The place of each row's rightmost token that is not padding, (b,); the last place where ids are not known."""
        b, t, _ = sizes(scores)
        if ids is None or self.config.pad_token_id is None:
            return tf.fill((b,), t - 1)
        return tf.reduce_max(tf.where(ids != self.config.pad_token_id, tf.range(t), 0), -1)

    def _loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        problem = inputs.problem_type(self.config, whole=labels.dtype.is_integer)
        if problem == "single_label_classification":
            return cross_entropy(logits, tf.cast(tf.reshape(labels, (-1,)), tf.int64))
        targets = tf.cast(tf.reshape(labels, sizes(logits)), logits.dtype)
        regression = problem == "regression"
        losses = tf.square(logits - targets) if regression else tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
        if count_copies() == 1:
            return tf.reduce_mean(losses)
        return tf.reduce_sum(losses) / count_over_copies(tf.cast(tf.size(losses), losses.dtype))

    def _check(self, given: Mapping[str, Any]) -> None:
        super()._check(given)
        batch, _ = batch_and_length(given)
        inputs.check_row_ends(self.config, batch=batch, has_ids="input_ids" in given)
        if (labels := given.get("labels")) is not None and None not in (batch, *labels.shape):
            problem = inputs.problem_type(self.config, whole=tf.as_dtype(labels.dtype).is_integer)
            inputs.check_class_labels(self.config, problem, host(labels), tuple(labels.shape), batch)


@keras.saving.register_keras_serializable("gptj")
class GPTJForQuestionAnswering(PretrainedModel):
    """GPT-J that scores every token as the start and as the end of an answer.

    Args:
        config, dtype, param_dtype, seed, name, _do_init: as for `GPTJModel`.
    """

    head = "question_answering"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        name: str | None = None,
        _do_init: bool = True,
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, seed=seed, name=name)
        policy = self.dtype_policy
        self.transformer: Any = GPTJModel(config, dtype=policy, seed=seed, name="transformer", _do_init=False)
        self.transformer._inside = True
        self.qa_outputs = Linear(name="qa_outputs", dtype=policy)
        if _do_init:
            self.initialise(dtype=policy, seed=seed)

    @typed_call
    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        training: bool | None = False,
    ) -> QuestionAnsweringModelOutput[tf.Tensor] | tuple[Any, ...]:
        """The scores of each token as start and as end, (b, t) each, and with both positions the loss.

        Args:
            start_positions, end_positions: (b,) or (b, 1). Below 0 counts as 0; at t or beyond, the answer is outside
                and the row counts nowhere. The loss is the mean of the two cross entropies.

        The other arguments are `GPTJModel.call`'s.
        """
        outputs = self.transformer.call(
            input_ids,
            None,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            training=training,
        )
        start_logits, end_logits = tf.unstack(at_least_float32(self.qa_outputs(outputs.last_hidden_state)), axis=-1)
        loss = None
        if start_positions is not None:
            starts = cross_entropy(start_logits, self._places(start_positions, start_logits))
            ends = cross_entropy(end_logits, self._places(end_positions, end_logits))
            loss = (starts + ends) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return object_or_tuple(output, return_dict, default=self.config.return_dict)

    if TYPE_CHECKING:

        @same_as(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `call`."""

    def _places(self, positions: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Positions as labels (b,): below 0 is 0, at t or beyond is ignored."""
        places = tf.maximum(tf.cast(tf.reshape(positions, (-1,)), tf.int64), 0)
        return tf.where(places < tf.cast(sizes(logits)[1], tf.int64), places, inputs.IGNORED_LABEL)

    def _check(self, given: Mapping[str, Any]) -> None:
        super()._check(given)
        inputs.check_both_ends(given.get("start_positions"), given.get("end_positions"))
        batch, _ = batch_and_length(given)
        for where in ("start_positions", "end_positions"):
            if (places := given.get(where)) is not None and None not in (batch, *places.shape):
                inputs.check_places(host(places), tuple(places.shape), batch, where=where)
