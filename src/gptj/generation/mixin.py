"""`generate` and `stream` as methods of a model: the same signature and meaning in the three wings.

A wing's mixin adds how its decoder is made and how its arrays become NumPy's and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Unpack

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.generation.config import GenerationConfig
from gptj.generation.conversation import Conversation
from gptj.generation.decoder import Decoder
from gptj.generation.fields import CallFields, GenerationFields
from gptj.generation.loop import Streamer, generate, stream
from gptj.generation.output import GenerateOutput, TokenStep
from gptj.generation.session import LogitsProcessor
from gptj.generation.stopping import StoppingCriterion, decode_with
from gptj.outputs import Array
from gptj.typed import typed_generate

__all__ = ["Generates"]


class Generates(Generic[Array]):
    """What a model that makes text can do.

    Attributes:
        generation_config: what a call without one of its own uses: the folder's generation_config.json. None means
            the defaults, with the model's eos and padding ids.
    """

    config: GPTJConfig
    generation_config: GenerationConfig | None = None

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        """An empty decoder of that size over this model."""
        raise NotImplementedError

    def _host(self, array: Any) -> NDArray[Any]:
        """The wing's array as NumPy."""
        raise NotImplementedError

    def _native(self, array: NDArray[Any]) -> Array:
        """The NumPy array as the wing's."""
        raise NotImplementedError

    @typed_generate
    def generate(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        seed: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        assistant_model: Any = None,
        tokenizer: Any = None,
        **overrides: Unpack[CallFields],
    ) -> Any:
        """The prompts and what follows them: whole numbers (rows, t + new), padded after a row's eos.

        Args:
            input_ids: (b, t) token ids; shorter prompts padded on the left, and that padding masked.
            generation_config: how; None is `self.generation_config`.
            attention_mask: (b, t) of 0 and 1; None: all 1.
            seed: of the draws, one for the batch or one a prompt: the same seed gives the same text in every wing.
            streamer: `put` gets the prompts and then each step's tokens, `end` the end.
            logits_processor: functions (ids, logits) -> logits, NumPy on the host, after the config's own.
            stopping_criteria: functions (ids, scores) -> bool or (rows,) bools.
            assistant_model: a smaller model of the same wing and vocabulary that guesses ahead; the result is the same.
            tokenizer: its `decode` finds stop_strings.
            overrides: fields of the config to change for this call.

        Returns:
            The sequences, or with return_dict_in_generate a `GenerateOutput`, whose sequences are the wing's array.

        Raises:
            InputError, ConfigError: before anything is computed.
        """
        config = self._settled(generation_config, overrides)
        arguments = self._arguments(
            attention_mask, seed, logits_processor, stopping_criteria, assistant_model, tokenizer
        )
        output = generate(
            self._decoder,
            self._numbers(input_ids, "input_ids"),
            model_config=self.config,
            generation_config=config,
            streamer=streamer,
            **arguments,
        )
        return self._returned(output, config)

    def stream(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        seed: int | Sequence[int] | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        assistant_model: Any = None,
        tokenizer: Any = None,
        **overrides: Unpack[GenerationFields],
    ) -> Iterator[TokenStep]:
        """The steps of `generate`, each as soon as it is made; the arguments are the same and are checked at once."""
        return stream(
            self._decoder,
            self._numbers(input_ids, "input_ids"),
            model_config=self.config,
            generation_config=self._settled(generation_config, overrides),
            **self._arguments(attention_mask, seed, logits_processor, stopping_criteria, assistant_model, tokenizer),
        )

    def conversation(self, *, capacity: int | None = None) -> Conversation:
        """A text that goes on turn by turn, with a cache for `capacity` tokens, by default for all positions."""
        return Conversation(self, self.config.n_positions if capacity is None else capacity)

    def _settled(self, config: GenerationConfig | None, overrides: Any) -> GenerationConfig:
        config = config or self.generation_config or GenerationConfig.from_model_config(self.config)
        return config.replace(**overrides) if overrides else config

    def _arguments(
        self,
        attention_mask: Any,
        seed: int | Sequence[int] | None,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriterion],
        assistant_model: Any,
        tokenizer: Any,
    ) -> dict[str, Any]:
        return {
            "attention_mask": self._numbers(attention_mask, "attention_mask"),
            "seed": seed,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "decode": decode_with(tokenizer),
            "assistant": None if assistant_model is None else assistant_model._decoder,
        }

    def _numbers(self, value: Any, where: str) -> NDArray[Any] | None:
        """An argument in NumPy, whether it came as the wing's array, NumPy's or lists."""
        if value is None or isinstance(value, np.ndarray):
            return value
        if isinstance(value, list | tuple):
            try:
                return np.asarray(value)
            except ValueError:
                hint = "Pad them on the left and pass an attention_mask"
                raise InputError("rows of different lengths", where=where, hint=hint) from None
        return self._host(value)

    def _returned(self, output: GenerateOutput[Any], config: GenerationConfig) -> Any:
        sequences = self._native(output.sequences)
        return dataclasses.replace(output, sequences=sequences) if config.return_dict_in_generate else sequences
