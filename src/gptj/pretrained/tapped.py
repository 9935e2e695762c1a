"""A model's intermediate values by name, asked for in the same words in every wing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gptj.calls.taps import HEAD_TAPS, TapCollector, choose_taps
from gptj.errors import InputError

__all__ = ["Tapped"]


class Tapped:
    """A model that can be looked into."""

    def taps(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        names: str | Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """The intermediate values of a call, by name, in the order in which they are computed.

        The arguments but the last are those of the model's own call, in the mode (training, gradients) that the model
        is in. Attention is computed step by step where its scores, visible or weights are asked for.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, labels: see the model's call. Labels are for
                GPTJForCausalLM alone.
            names: names of `gptj.calls.taps.list_taps`, or patterns such as `h.3.*`; None means all.

        Returns:
            The framework's arrays, in the dtypes that they are computed in; see `gptj.calls.taps` for names and axes.

        Raises:
            InputError: a name that there is none of; an argument breaks its rule; the model is prepared for inference.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._taps(names, labels, {**given, "past_key_values": past_key_values})

    def _taps(self, names: str | Iterable[str] | None, labels: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The taps asked for of the arguments in `given`."""
        model: Any = self
        model._refuse_prepared("taps")
        model._refuse_cut("taps")
        if given.get("params") is None:
            model._require_values("taps")
        if model.head != "causal_lm" and labels is not None:
            raise InputError("only GPTJForCausalLM has a loss among its taps", where="labels", expected="None")
        absent = HEAD_TAPS if model.head != "causal_lm" else () if labels is not None else ("loss",)
        chosen = choose_taps(names, model.config.n_layer, absent=absent)
        collector = TapCollector(chosen)
        model._collect(collector, given, labels)
        return {name: collector.kept[name] for name in chosen}

    def loss_gradients(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, *, labels: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The loss of a call without dropout, and its gradient by every parameter, by the parameters' names.

        Args:
            input_ids, attention_mask, position_ids, labels: see the model's call.

        Raises:
            InputError: an argument breaks its rule; the model has no loss of next tokens, or is prepared for inference.
        """
        model: Any = self
        model._refuse_prepared("a gradient")
        model._require_values("a gradient")
        if model.head != "causal_lm":
            raise InputError("only GPTJForCausalLM has a loss of next tokens", where="loss_gradients")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        found: tuple[Any, dict[str, Any]] = model._differentiate(given, labels)
        return found

    def _rotation_of(self, position_ids: Any) -> tuple[Any, Any]:
        """The sines and cosines (b, t, pairs) by which positions are turned; a hook. Heads leave it to the base."""
        model: Any = self
        found: tuple[Any, Any] = model.base_model._rotation_of(position_ids)
        return found

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> Any:
        """Run the forward pass of `given` and hand its values over; a hook. Heads without taps leave it to the base."""
        model: Any = self
        return model.base_model._collect(collector, given, labels)
