"""Heads on the blocks: next-token logits, one label a row, the ends of a span; each with its loss.

Losses are float32 at least, a label of -100 counts nowhere, and the values are the same in all three backends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj.calls import inputs
from gptj.calls.outputs import (
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    object_or_tuple,
)
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.generation.typed import ReturnDict, same_as, typed_call
from gptj.pretrained import one_dtype
from gptj.pt.arguments import as_ids, as_tensor, host, place
from gptj.pt.generate import GenerationMixin
from gptj.pt.inference import InferenceMixin
from gptj.pt.kernels import Linear
from gptj.pt.layers import at_least_float32
from gptj.pt.model import GPTJModel
from gptj.pt.weights import PretrainedModel, empty_parameters


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each row, which holds nothing as large as the logits but their gradient.

    `F.cross_entropy` writes three such arrays, and those of a language model are larger than all its activations. What
    is in between is computed a few rows at a time, which on a CPU stay in its cache.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The losses (n,), 0 where nothing counts; each row's largest logit, and sum of e^(logit - largest), (n, 1)."""
        counted, places = _places(labels)
        peaks, sums = [], []
        space = torch.empty_like(logits[: _rows_at_once(logits)])  # one for all: fresh memory costs more than the sums
        for rows in logits.split(_rows_at_once(logits)):
            peaks.append(rows.amax(1, keepdim=True))
            sums.append(space[: len(rows)].copy_(rows).sub_(peaks[-1]).exp_().sum(1, keepdim=True))
        peak, total = torch.cat(peaks), torch.cat(sums)
        losses = total.log() + (peak - logits.gather(1, places))
        return torch.where(counted, losses[:, 0], 0), peak, total

    @staticmethod
    def setup_context(ctx: Any, given: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the logits themselves, and two numbers a row."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*given, *output[1:])
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """(softmax(logits) - one at the label) times the slope of each row (n,)."""
        logits, labels, peak, total = ctx.saved_tensors
        counted, places = _places(labels)
        slope = torch.where(counted, slope, 0)[:, None]
        if torch.is_grad_enabled():  # for a gradient of this gradient, or one that is mapped: nothing in place
            return (logits.softmax(1) * slope).scatter_add(1, places, -slope), None
        scale = slope / total
        gradient = scale.new_empty(logits.shape)  # of the scale, which is mapped where anything is
        parts = (x.split(_rows_at_once(logits)) for x in (gradient, logits, peak, scale))
        for to, rows, largest, factor in zip(*parts, strict=True):
            to.copy_(rows).sub_(largest).exp_().mul_(factor)
        return gradient.scatter_add_(1, places, -slope), None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, *_: None) -> tuple[Tensor, None, None]:
        """The change of the losses with that of the logits."""
        logits, labels = ctx.saved_tensors
        counted, places = _places(labels)
        moved = (logits.softmax(1) * change).sum(1) - change.gather(1, places)[:, 0]
        return torch.where(counted, moved, 0), None, None


def _places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of the labels (n,) that count, and their places in the rows, (n, 1), 0 where none counts."""
    counted = labels != inputs.IGNORED_LABEL
    return counted, torch.where(counted, labels, 0)[:, None]


def _rows_at_once(logits: Tensor) -> int:
    """Rows of a megabyte on a CPU, whose second cache holds them (measured: the fastest), and of 256 elsewhere."""
    return max(1, 2 ** (18 if logits.device.type == "cpu" else 26) // logits.shape[1])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels that are not -100 of -log softmax(logits)[label], a scalar; 0 where there is none.

    Args:
        logits: (n, classes), float32 at least.
        labels: (n,).
    """
    counted = labels != inputs.IGNORED_LABEL
    if torch.compiler.is_compiling():  # which fuses it, and cannot trace what has a forward derivative of its own
        total = F.cross_entropy(logits, labels, ignore_index=inputs.IGNORED_LABEL, reduction="sum")
    else:
        total = CrossEntropy.apply(logits, labels)[0].sum()
    return total / counted.sum().clamp(min=1)


class GPTJForCausalLM(PretrainedModel, GenerationMixin, InferenceMixin):
    """GPT-J with the language-modelling head: a weight and, unlike GPT-2's, a bias.

    Args:
        config, dtype, param_dtype, seed, attn_implementation, _do_init: as for `GPTJModel`.
    """

    head = "causal_lm"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        attn_implementation: str = "eager",
        _do_init: bool = True,
    ) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config, attn_implementation=attn_implementation, _do_init=False)
        self.transformer._inside = True
        with empty_parameters():
            self.lm_head = Linear(config.n_embd, config.vocab_size, fused=attn_implementation == "sdpa")
        if _do_init:
            self.initialise(dtype=one_dtype("float32", dtype=dtype, param_dtype=param_dtype), seed=seed)

    def tie_weights(self) -> None:
        """Make lm_head.weight the embedding's, where the config says so; lm_head.bias stays its own."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @typed_call
    def forward(
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
    ) -> CausalLMOutputWithPast[Tensor] | tuple[Any, ...]:
        """The logits of every next token, and with labels the loss.

        Args:
            labels: (b, t) token ids, -100 where none counts; shifted inside, so they are the input ids themselves.

        The other arguments are `GPTJModel.forward`'s.
        """
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
            return_dict=True,
        )
        logits, loss = self._next_tokens(outputs.last_hidden_state, labels)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return object_or_tuple(output, return_dict, default=self.config.return_dict)

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `forward`."""

    def _next_tokens(self, hidden: Tensor, labels: Any) -> tuple[Tensor | None, Tensor | None]:
        """The logits that follow the hidden states (b, t, m), and with labels the loss.

        Where processes have parts of the vocabulary, there is the loss alone: the logits stay where they are.
        """
        if labels is None:
            return self._logits(hidden), None
        targets: Any = as_ids(labels, where="labels")
        if (values := host(targets)) is not None:
            inputs.check_labels(values, tuple(hidden.shape[:2]), self.config.vocab_size)
        targets = place(targets, hidden.device)
        following = F.pad(targets[:, 1:], (0, 1), value=inputs.IGNORED_LABEL)  # logits[:, :-1] would be a copy
        if self.placement is not None and self.placement.mesh.tp > 1:
            return None, self.lm_head.loss(hidden.flatten(0, 1), following.flatten())
        logits = self._logits(hidden)
        return logits, cross_entropy(logits.flatten(0, 1), following.flatten())

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> None:
        hidden = self.transformer._collect(collector, given, None)
        if collector.asks("logits", "loss"):
            logits, loss = self._next_tokens(hidden, labels)
            collector(logits=logits, loss=loss)

    def _differentiate(self, given: dict[str, Any], labels: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in evaluation mode, and its gradient by every parameter."""
        training = self.training
        self.eval()
        try:
            loss: Any = self(**given, labels=labels).loss
        finally:
            self.train(training)
        names, parameters = zip(*self.named_parameters(), strict=True)
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    def _compiled_taps(self, given: dict[str, Any], labels: Any) -> dict[str, Tensor]:
        """All taps of arrays, from one program of `torch.compile`."""
        tensors = {name: torch.as_tensor(values) for name, values in (given | {"labels": labels}).items()}
        with torch.no_grad():
            taps: dict[str, Tensor] = torch.compile(self.taps, fullgraph=True, dynamic=False)(**tensors)
        return taps

    def _logits(self, hidden: Tensor) -> Tensor:
        """The next token's logits after each hidden state, (..., m) to (..., v)."""
        return at_least_float32(self.lm_head(hidden))


class GPTJForSequenceClassification(PretrainedModel):
    """GPT-J that gives each row one vector of label scores, read at its last token that is not padding.

    Args:
        config, dtype, param_dtype, seed, attn_implementation, _do_init: as for `GPTJModel`.
    """

    head = "sequence_classification"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        attn_implementation: str = "eager",
        _do_init: bool = True,
    ) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config, attn_implementation=attn_implementation, _do_init=False)
        self.transformer._inside = True
        with empty_parameters():
            self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        if _do_init:
            self.initialise(dtype=one_dtype("float32", dtype=dtype, param_dtype=param_dtype), seed=seed)

    @typed_call
    def forward(
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
    ) -> SequenceClassifierOutputWithPast[Tensor] | tuple[Any, ...]:
        """The label scores of each row (b, num_labels), and with labels the loss.

        Args:
            labels: (b,) class ids, (b,) or (b, num_labels) numbers for regression, or (b, num_labels) of 0 and 1 for
                multi-label. `config.problem_type` says which; where it is None, one label means regression, whole
                numbers mean single-label and floats mean multi-label.

        The other arguments are `GPTJModel.forward`'s.

        Raises:
            InputError: more than one row and no pad_token_id to find their ends by.
        """
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
            return_dict=True,
        )
        scores = at_least_float32(self.score(outputs.last_hidden_state))
        ids = place(as_ids(input_ids, where="input_ids"), scores.device)
        logits = scores[torch.arange(scores.shape[0], device=scores.device), self._last_tokens(ids, scores)]
        output = SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return object_or_tuple(output, return_dict, default=self.config.return_dict)

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `forward`."""

    def _last_tokens(self, ids: Tensor | None, scores: Tensor) -> Tensor:
        """The place of each row's rightmost token that is not padding, (b,); the last place where ids are not known."""
        b, t = scores.shape[:2]
        inputs.check_row_ends(self.config, batch=b, has_ids=ids is not None)
        if ids is None or self.config.pad_token_id is None:
            return torch.full((b,), t - 1, device=scores.device)
        places = torch.arange(t, device=scores.device)
        return torch.where(ids != self.config.pad_token_id, places, 0).amax(-1)

    def _loss(self, logits: Tensor, labels: Any) -> Tensor:
        labels = as_tensor(labels, where="labels")
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
        problem = inputs.problem_type(self.config, whole=whole)
        inputs.check_class_labels(self.config, problem, host(labels), tuple(labels.shape), logits.shape[0])
        labels = place(labels, logits.device)
        if problem == "single_label_classification":
            return cross_entropy(logits, labels.flatten().long())
        targets = labels.reshape(logits.shape).to(logits.dtype)
        if problem == "regression":
            return F.mse_loss(logits, targets)
        return F.binary_cross_entropy_with_logits(logits, targets)


class GPTJForQuestionAnswering(PretrainedModel):
    """GPT-J that scores every token as the start and as the end of an answer.

    Args:
        config, dtype, param_dtype, seed, attn_implementation, _do_init: as for `GPTJModel`.
    """

    head = "question_answering"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        attn_implementation: str = "eager",
        _do_init: bool = True,
    ) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config, attn_implementation=attn_implementation, _do_init=False)
        self.transformer._inside = True
        with empty_parameters():
            self.qa_outputs = nn.Linear(config.n_embd, 2)
        if _do_init:
            self.initialise(dtype=one_dtype("float32", dtype=dtype, param_dtype=param_dtype), seed=seed)

    @typed_call
    def forward(
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
    ) -> QuestionAnsweringModelOutput[Tensor] | tuple[Any, ...]:
        """The scores of each token as start and as end, (b, t) each, and with both positions the loss.

        Args:
            start_positions, end_positions: (b,) or (b, 1). Below 0 counts as 0; at t or beyond, the answer is outside
                and the row counts nowhere. The loss is the mean of the two cross entropies.

        The other arguments are `GPTJModel.forward`'s.
        """
        outputs = self.transformer(
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
        )
        start_logits, end_logits = at_least_float32(self.qa_outputs(outputs.last_hidden_state)).unbind(-1)
        loss = None
        inputs.check_both_ends(start_positions, end_positions)
        if start_positions is not None:
            starts = cross_entropy(start_logits, self._places(start_positions, start_logits, "start_positions"))
            ends = cross_entropy(end_logits, self._places(end_positions, end_logits, "end_positions"))
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

        @same_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `forward`."""

    def _places(self, positions: Any, logits: Tensor, where: str) -> Tensor:
        """Positions as labels (b,): below 0 is 0, at t or beyond is ignored."""
        positions = as_tensor(positions, where=where)
        inputs.check_places(host(positions), tuple(positions.shape), logits.shape[0], where=where)
        positions = place(positions, logits.device).flatten().long().clamp(min=0)
        return torch.where(positions < logits.shape[1], positions, inputs.IGNORED_LABEL)
