"""Heads on the blocks: next-token logits, one label a row, the ends of a span; each with its loss.

Losses are float32 at least, a label of -100 counts nowhere, and the values are the same in all three backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from gptj.calls import inputs
from gptj.calls.outputs import CausalLMOutputWithPast, QuestionAnsweringModelOutput, SequenceClassifierOutputWithPast
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.flax.arguments import (
    as_array,
    as_ids,
    batch_and_length,
    choose_flags,
    collect_taps,
    compute,
    convert_arguments,
    host,
)
from gptj.flax.generate import GenerationMixin
from gptj.flax.inference import InferenceMixin
from gptj.flax.layers import Linear, at_least_float32
from gptj.flax.model import GPTJModule
from gptj.flax.weights import Params, PretrainedModel, flat
from gptj.generation.typed import ReturnDict, typed_call


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over the labels that are not -100 of -log softmax(logits)[label], a scalar; 0 where there is none.

    Args:
        logits: (..., classes), float32 at least.
        labels: (...).
    """
    counted = labels != inputs.IGNORED_LABEL
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    losses = jnp.log(jnp.exp(logits - peak).sum(-1, keepdims=True)) + (peak - chosen)
    total = jnp.where(counted, losses[..., 0], 0).sum()
    return total / jnp.maximum(counted.sum(), 1).astype(total.dtype)


class GPTJForCausalLMModule(nn.Module):
    """GPT-J with the language-modelling head as a pure function of its parameters.

    Args:
        config, dtype, param_dtype, gradient_checkpointing, parts: as for `GPTJModule`.
    """

    config: GPTJConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False
    parts: int = 1

    def setup(self) -> None:
        """Declare the blocks and the head."""
        config = self.config
        self.transformer = GPTJModule(config, self.dtype, self.param_dtype, self.gradient_checkpointing, self.parts)
        self.lm_head = Linear(
            config.n_embd,
            config.vocab_size,
            tied=config.tie_word_embeddings,
            deviation=config.initializer_range,
            param_dtype=self.param_dtype,
        )

    def __call__(
        self,
        input_ids: Array | None = None,
        past_key_values: Any = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        train: bool = False,
    ) -> CausalLMOutputWithPast:
        """The logits of every next token, and with labels the loss; see `GPTJForCausalLM.__call__`."""
        outputs = self.transformer(
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
            train,
        )
        logits, loss = self.next_tokens(outputs.last_hidden_state, labels)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def next_tokens(
        self, hidden: Array, labels: Array | None = None, only: Array | None = None
    ) -> tuple[Array, Array | None]:
        """The logits that follow the last hidden states (b, t, m), and with labels the loss.

        Args:
            only: a scalar: give the logits (b, v) of this place alone.
        """
        tied = self.transformer.wte.weight if self.config.tie_word_embeddings else None
        hidden = hidden if only is None else jnp.take(hidden, only, axis=1)
        logits = at_least_float32(self.lm_head(hidden, tied))
        loss = None
        if labels is not None:
            following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=inputs.IGNORED_LABEL)
            loss = cross_entropy(logits, following)  # logits[:, :-1] would be a copy
        return logits, loss


class GPTJForCausalLM(PretrainedModel, GenerationMixin, InferenceMixin):
    """GPT-J with the language-modelling head: a weight and, unlike GPT-2's, a bias.

    Args:
        config, input_shape, seed, dtype, _do_init, param_dtype: as for `GPTJModel`.
    """

    head = "causal_lm"
    module_class = GPTJForCausalLMModule

    @typed_call
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        *,
        token_type_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutputWithPast[Array] | tuple[Any, ...]:
        """The logits of every next token, and with labels the loss.

        Args:
            labels: (b, t) token ids, -100 where none counts; shifted inside, so they are the input ids themselves.

        The other arguments are `GPTJModel.__call__`'s.
        """
        arguments = convert_arguments(
            self.config,
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
        )
        if labels is not None:
            arguments["labels"] = self._checked_labels(labels, arguments)
        flags = choose_flags(self.config, use_cache, output_attentions, output_hidden_states, train)
        return compute(self, arguments, flags, return_dict=return_dict, params=params, dropout_rng=dropout_rng)

    def _checked_labels(self, labels: Any, arguments: Mapping[str, Any]) -> Any:
        labels = as_ids(labels, where="labels")
        inputs.check_labels(host(labels), batch_and_length(arguments), self.config.vocab_size)
        return labels

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> None:
        params = given["params"]
        given = {name: value for name, value in given.items() if name != "params"}
        arguments = convert_arguments(self.config, **given)
        labels = None if labels is None else self._checked_labels(labels, arguments)
        collect_taps(self, collector, arguments, labels, params)

    def _differentiate(self, given: dict[str, Any], labels: Any) -> tuple[Array, dict[str, Array]]:
        """The loss in evaluation mode, and its gradient by every parameter."""

        def loss_of(params: Params) -> Any:
            return self(**given, labels=labels, params=params).loss

        loss, slopes = jax.value_and_grad(loss_of)(self.params)
        return loss, flat(slopes)

    def _compiled_taps(self, given: dict[str, Any], labels: Any) -> dict[str, Array]:
        """All taps of arrays, from one program of `jax.jit`."""
        arrays = given | {"labels": labels}
        taps: dict[str, Array] = jax.jit(lambda params: self.taps(**arrays, params=params))(self.params)
        return taps


class GPTJForSequenceClassificationModule(nn.Module):
    """GPT-J with one vector of label scores a row, as a pure function of its parameters.

    Args:
        config, dtype, param_dtype, gradient_checkpointing, parts: as for `GPTJModule`.
    """

    config: GPTJConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False
    parts: int = 1

    def setup(self) -> None:
        """Declare the blocks and the head."""
        config = self.config
        self.transformer = GPTJModule(config, self.dtype, self.param_dtype, self.gradient_checkpointing, self.parts)
        self.score = Linear(
            config.n_embd,
            config.num_labels,
            use_bias=False,
            deviation=config.initializer_range,
            param_dtype=self.param_dtype,
        )

    def __call__(
        self,
        input_ids: Array | None = None,
        past_key_values: Any = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        train: bool = False,
    ) -> SequenceClassifierOutputWithPast:
        """The label scores of each row, and with labels the loss; see `GPTJForSequenceClassification.__call__`."""
        outputs = self.transformer(
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
            train,
        )
        scores = at_least_float32(self.score(outputs.last_hidden_state))
        logits = scores[jnp.arange(scores.shape[0]), self._last_tokens(input_ids, scores)]
        return SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(self, ids: Array | None, scores: Array) -> Array:
        """The place of each row's rightmost token that is not padding, (b,); the last place where ids are not known."""
        b, t = scores.shape[:2]
        inputs.check_row_ends(self.config, batch=b, has_ids=ids is not None)
        if ids is None or self.config.pad_token_id is None:
            return jnp.full((b,), t - 1)
        return jnp.where(ids != self.config.pad_token_id, jnp.arange(t), 0).max(-1)

    def _loss(self, logits: Array, labels: Array) -> Array:
        problem = inputs.problem_type(self.config, whole=is_whole(labels))
        if problem == "single_label_classification":
            return cross_entropy(logits, labels.reshape(-1))
        targets = labels.reshape(logits.shape).astype(logits.dtype)
        if problem == "regression":
            return ((logits - targets) ** 2).mean()
        # log(1 + e^-|x|) written so that no large number is raised to a power
        return (jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))).mean()


def is_whole(labels: Any) -> bool:
    """Whether labels are whole numbers, and not floats or bools."""
    return bool(jnp.issubdtype(labels.dtype, jnp.integer))


class GPTJForSequenceClassification(PretrainedModel):
    """GPT-J that gives each row one vector of label scores, read at its last token that is not padding.

    Args:
        config, input_shape, seed, dtype, _do_init, param_dtype: as for `GPTJModel`.
    """

    head = "sequence_classification"
    module_class = GPTJForSequenceClassificationModule

    @typed_call
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        *,
        token_type_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
    ) -> SequenceClassifierOutputWithPast[Array] | tuple[Any, ...]:
        """The label scores of each row (b, num_labels), and with labels the loss.

        Args:
            labels: (b,) class ids, (b,) or (b, num_labels) numbers for regression, or (b, num_labels) of 0 and 1 for
                multi-label. `config.problem_type` says which; where it is None, one label means regression, whole
                numbers mean single-label and floats mean multi-label.

        The other arguments are `GPTJModel.__call__`'s.

        Raises:
            InputError: more than one row and no pad_token_id to find their ends by.
        """
        arguments = convert_arguments(
            self.config,
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
        )
        if labels is not None:
            labels = arguments["labels"] = as_array(labels, where="labels")
            problem = inputs.problem_type(self.config, whole=is_whole(labels))
            inputs.check_class_labels(self.config, problem, host(labels), labels.shape, batch_and_length(arguments)[0])
        flags = choose_flags(self.config, use_cache, output_attentions, output_hidden_states, train)
        return compute(self, arguments, flags, return_dict=return_dict, params=params, dropout_rng=dropout_rng)


class GPTJForQuestionAnsweringModule(nn.Module):
    """GPT-J with start and end scores, as a pure function of its parameters.

    Args:
        config, dtype, param_dtype, gradient_checkpointing, parts: as for `GPTJModule`.
    """

    config: GPTJConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False
    parts: int = 1

    def setup(self) -> None:
        """Declare the blocks and the head."""
        config = self.config
        self.transformer = GPTJModule(config, self.dtype, self.param_dtype, self.gradient_checkpointing, self.parts)
        self.qa_outputs = Linear(config.n_embd, 2, deviation=config.initializer_range, param_dtype=self.param_dtype)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        train: bool = False,
    ) -> QuestionAnsweringModelOutput:
        """The scores of each token, and with both positions the loss; see `GPTJForQuestionAnswering.__call__`."""
        outputs = self.transformer(
            input_ids,
            None,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            False,
            output_attentions,
            output_hidden_states,
            train,
        )
        both = at_least_float32(self.qa_outputs(outputs.last_hidden_state))
        start_logits, end_logits = both[..., 0], both[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            starts = cross_entropy(start_logits, self._places(start_positions, start_logits))
            ends = cross_entropy(end_logits, self._places(end_positions, end_logits))
            loss = (starts + ends) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _places(self, positions: Array, logits: Array) -> Array:
        """Positions as labels (b,): below 0 is 0, at t or beyond is ignored."""
        positions = jnp.maximum(positions.reshape(-1), 0)
        return jnp.where(positions < logits.shape[1], positions, inputs.IGNORED_LABEL)


class GPTJForQuestionAnswering(PretrainedModel):
    """GPT-J that scores every token as the start and as the end of an answer.

    Args:
        config, input_shape, seed, dtype, _do_init, param_dtype: as for `GPTJModel`.
    """

    head = "question_answering"
    module_class = GPTJForQuestionAnsweringModule

    @typed_call
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
        *,
        token_type_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
    ) -> QuestionAnsweringModelOutput[Array] | tuple[Any, ...]:
        """The scores of each token as start and as end, (b, t) each, and with both positions the loss.

        Args:
            start_positions, end_positions: (b,) or (b, 1). Below 0 counts as 0; at t or beyond, the answer is outside
                and the row counts nowhere. The loss is the mean of the two cross entropies.

        The other arguments are `GPTJModel.__call__`'s.
        """
        arguments = convert_arguments(
            self.config, input_ids, None, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds
        )
        del arguments["past_key_values"]
        inputs.check_both_ends(start_positions, end_positions)
        for where, value in (("start_positions", start_positions), ("end_positions", end_positions)):
            if value is not None:
                places = arguments[where] = as_array(value, where=where)
                inputs.check_places(host(places), places.shape, batch_and_length(arguments)[0], where=where)
        flags = choose_flags(self.config, False, output_attentions, output_hidden_states, train)
        del flags["use_cache"]
        return compute(self, arguments, flags, return_dict=return_dict, params=params, dropout_rng=dropout_rng)
