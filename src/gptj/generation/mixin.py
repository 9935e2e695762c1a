"""`generate` and `stream` as methods of a model: the same signature and meaning in the three wings.

A wing's mixin adds how its decoder is made and how its arrays become NumPy's and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    Unpack,
    overload,
)

import numpy as np
from numpy.typing import NDArray

from gptj.calls.inputs import check_embeds, check_head_mask, check_ids, check_method, numbers
from gptj.calls.outputs import Array
from gptj.config import GPTJConfig
from gptj.errors import InputError, shown
from gptj.generation.called import CalledDecoder, Conditions
from gptj.generation.config import GenerationConfig
from gptj.generation.conversation import Conversation
from gptj.generation.decoder import Decoder, DecoderFactory
from gptj.generation.fields import CallFields, GenerationFields
from gptj.generation.held import HeldLogits
from gptj.generation.loop import Streamer, generate, stream
from gptj.generation.output import GenerateOutput, TokenStep, transition_scores
from gptj.generation.processors import AllowedTokens
from gptj.generation.session import LogitsProcessor
from gptj.generation.stopping import StoppingCriterion, decode_with

__all__ = ["Generates", "inside_a_graph"]

P = ParamSpec("P")
T = TypeVar("T")


def inside_a_graph() -> InputError:
    """The error of a text that is to be made inside of what a framework compiles."""
    return InputError(
        "generation is a loop on the host, and cannot be a part of a compiled function",
        where="generate",
        hint="Call it outside of jax.jit, tf.function or torch.compile: its own steps are compiled already",
    )


class Generate(Protocol[P, T]):
    """`generate` of a model with arrays T."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def __call__(
        self, ids: Any, /, *args: Any, return_dict_in_generate: Literal[True], **kwargs: Any
    ) -> GenerateOutput[T]: ...
    @overload
    def __call__(self, ids: Any, /, *args: Any, return_dict_in_generate: Literal[False], **kwargs: Any) -> T: ...


if TYPE_CHECKING:

    class typed_generate(Generic[P]):
        """The method that makes text."""

        def __init__(self, function: Callable[Concatenate[Any, P], Any], /) -> None: ...
        def __get__(self, instance: Generates[T], owner: Any) -> Generate[P, T]: ...

else:

    def typed_generate(method):
        """The method."""
        return method


class Generates(Generic[Array]):
    """Text generation, a base class of the models with a language-model head."""

    config: GPTJConfig
    _generation_config: GenerationConfig | None = None
    _derived: GenerationConfig | None = None
    _joins_calls = False  # what its decoders' `joins` is

    @property
    def generation_config(self) -> GenerationConfig:
        """The config of a call without one of its own: the folder's generation_config.json, or the one assigned.

        Where there is none, or after None was assigned, it is the defaults with the model's bos, eos and pad ids; it
        follows those of `config` until something is assigned to it.
        """
        kept = self._generation_config
        if kept is not None and (self._derived is None or kept != self._derived):
            return kept
        derived = GenerationConfig.from_model_config(self.config)
        if kept is None:
            kept = self._generation_config = derived.replace()
        elif derived != self._derived:
            kept.update({name: getattr(derived, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
        self._derived = derived
        return kept

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._generation_config = None if config is None else GenerationConfig.of(config)
        self._derived = None

    @property
    def derives_generation_config(self) -> bool:
        """Whether `generation_config` follows from `config`, since nothing else was said."""
        return self.generation_config == self._derived

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        """An empty decoder of that size over this model."""
        raise NotImplementedError

    def _host(self, array: Any) -> NDArray[Any]:
        """The wing's array as NumPy; `inside_a_graph` where it has no values yet."""
        raise NotImplementedError

    def _held(self, logits: Any, columns: int | None = None) -> NDArray[Any] | HeldLogits:
        """The wing's logits in NumPy where they are on the host, else as they are.

        Args:
            logits: (b, v), or (b, n, v), of which the first `columns` count; None: all do.
            columns: n without slots in excess.
        """
        raise NotImplementedError

    def _native(self, array: NDArray[Any]) -> Array:
        """The NumPy array as the wing's."""
        raise NotImplementedError

    def _is_traced(self) -> bool:
        """Whether a compiler of the framework's is tracing what runs now."""
        return False

    def _agree_on(self, seed: int | Sequence[int] | None) -> int | Sequence[int] | None:
        """The seed, where several processes compute one model and none was given: the first one's."""
        return seed

    def _seed_of(self, prng_key: Any) -> int:
        """The seed that a key of the framework's random numbers stands for."""
        raise InputError("a key of jax.random, in another framework", where="prng_key", hint="Pass seed=...")

    def _with(self, params: Any) -> Self:
        """A model of these parameters; itself for None."""
        if params is not None:
            raise InputError("parameters are the model's own here", where="params", hint="Assign them to the model")
        return self

    @typed_generate
    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        inputs: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        seed: int | Sequence[int] | None = None,
        prng_key: Any = None,
        params: Any = None,
        streamer: Streamer | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        assistant_model: Any = None,
        tokenizer: Any = None,
        **overrides: Unpack[CallFields],
    ) -> Any:
        """The prompts and what follows them: whole numbers (rows, t + new), padded after a row's eos.

        Args:
            input_ids: (b, t) token ids; shorter prompts padded on the left, and that padding masked. Where there are
                neither ids nor embeddings, the text begins with bos_token_id.
            generation_config: how, or a dict of its fields; what it does not name is as `self.generation_config` says.
            inputs: another name of input_ids.
            attention_mask: (b, t) of 0 and 1; None: all 1.
            token_type_ids: (b, t) ids whose embeddings are added; new tokens have the type of the last.
            head_mask: (h,) or (n_layer, h) factors of each head's weights, in every step.
            inputs_embeds: (b, t, m) in place of the ids' embeddings. Without input_ids the result is the new
                tokens alone.
            seed: of the draws, one for the batch or one a prompt: the same seed gives the same text in every wing.
            prng_key: in Flax, a key of jax.random in place of a seed.
            params: in Flax, parameters in place of the model's own.
            streamer: `put` gets the prompts and then each step's tokens, `end` the end.
            logits_processor: functions (ids, logits) -> logits, NumPy on the host, after the config's own.
            stopping_criteria: functions (ids, scores) -> bool or (rows,) bools.
            prefix_allowed_tokens_fn: a function (number of the prompt, ids so far) -> ids that may come next.
            assistant_model: a smaller model of the same wing and vocabulary that guesses ahead; the result is the same.
            tokenizer: its `decode` finds stop_strings.
            overrides: fields of the config to change for this call.

        Returns:
            The sequences, or with return_dict_in_generate a `GenerateOutput`, whose sequences are the wing's array.

        Raises:
            InputError, ConfigError: before anything is computed.
        """
        config = self._merge_config(generation_config, overrides)
        arguments = self._with(params)._arguments(
            config,
            input_ids=_one_of(input_ids, inputs),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            head_mask=head_mask,
            seed=seed,
            prng_key=prng_key,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            assistant_model=assistant_model,
            tokenizer=tokenizer,
        )
        return self._convert_output(generate(**arguments, generation_config=config, streamer=streamer), config)

    def stream(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        inputs: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        seed: int | Sequence[int] | None = None,
        prng_key: Any = None,
        params: Any = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        assistant_model: Any = None,
        tokenizer: Any = None,
        **overrides: Unpack[GenerationFields],
    ) -> Iterator[TokenStep]:
        """The steps of `generate`, each as soon as it is made; the arguments are the same and are checked at once."""
        config = self._merge_config(generation_config, overrides)
        arguments = self._with(params)._arguments(
            config,
            input_ids=_one_of(input_ids, inputs),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            head_mask=head_mask,
            seed=seed,
            prng_key=prng_key,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            assistant_model=assistant_model,
            tokenizer=tokenizer,
        )
        return stream(**arguments, generation_config=config)

    def compute_transition_scores(
        self, sequences: Any, scores: Sequence[Any], beam_indices: Any = None, normalize_logits: bool = False
    ) -> Any:
        """The score of each new token, (rows, new), the wing's array; see `generation.output.transition_scores`."""
        rows: Any = self._numbers(sequences, "sequences")
        steps: list[Any] = [self._numbers(step, "scores") for step in scores]
        beams = self._numbers(beam_indices, "beam_indices")
        return self._native(transition_scores(rows, steps, beams, normalize_logits=normalize_logits))

    def prepare_inputs_for_generation(
        self, input_ids: Any, past_key_values: Any = None, attention_mask: Any = None, **others: Any
    ) -> dict[str, Any]:
        """The arguments of the model's next call in a loop of one's own: the tokens that the cache does not hold yet.

        `generate` has its own steps and does not ask for it.

        Args:
            input_ids: (b, t), all tokens so far.
            past_key_values: the cache of the call before, or None.
            attention_mask: (b, t) of 0 and 1, with which positions are counted from each row's first token.
            others: further arguments of the call, such as use_cache.
        """
        seen = 0 if past_key_values is None else int(past_key_values.length)
        made = {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "attention_mask": attention_mask}
        if attention_mask is not None and others.get("position_ids") is None:
            mask = np.asarray(self._numbers(attention_mask, "attention_mask"))
            positions = np.maximum(np.cumsum(mask.astype(np.int64), axis=1) - 1, 0)
            others["position_ids"] = self._native(positions[:, seen:])
        return made | {name: value for name, value in others.items() if value is not None}

    def conversation(self, *, capacity: int | None = None) -> Conversation:
        """A text that goes on turn by turn, with a cache for `capacity` tokens, by default for all positions."""
        return Conversation(self, self.config.n_positions if capacity is None else capacity)

    def _merge_config(self, config: Any, overrides: Any) -> GenerationConfig:
        """The model's own config, changed by what `config` names and by `overrides`."""
        own = self.generation_config
        if isinstance(config, Mapping) and all(isinstance(key, str) for key in config):
            changes = dict(config)
        else:
            config = GenerationConfig() if config is None else GenerationConfig.of(config)
            changes = {**config.named, "extra": config.over(own.extra)}
        changes.update(overrides)
        return own.replace(**changes) if changes else own

    def _arguments(
        self,
        config: GenerationConfig,
        *,
        input_ids: Any,
        inputs_embeds: Any,
        attention_mask: Any,
        token_type_ids: Any,
        head_mask: Any,
        seed: int | Sequence[int] | None,
        prng_key: Any,
        prefix_allowed_tokens_fn: AllowedTokens | None,
        assistant_model: Any,
        tokenizer: Any,
        **others: Any,
    ) -> dict[str, Any]:
        """Check the caller's arguments, and convert them to those of the loop.

        Raises:
            InputError: they contradict each other, are no arrays, or the call is inside a compiled function.
        """
        check_method(tokenizer, "decode", where="tokenizer")
        check_method(assistant_model, "_decoder", where="assistant_model")
        if self._is_traced():
            raise inside_a_graph()
        if prng_key is not None and seed is not None:
            raise InputError("given beside seed", where="prng_key", hint="Pass one of them")
        embeds = self._numbers(inputs_embeds, "inputs_embeds")
        ids, unseen = self._prompt(config, input_ids, embeds)
        conditions = Conditions(
            embeds,
            self._numbers(token_type_ids, "token_type_ids"),
            self._numbers(head_mask, "head_mask"),
        )
        self._check_conditions(conditions, ids)
        if assistant_model is not None and conditions.inputs_embeds is not None:
            raise InputError("reads token ids alone", where="assistant_model", found="inputs_embeds")
        return {
            "decoder_factory": self._factory_with(conditions) if conditions else self._decoder,
            "input_ids": ids,
            "unseen": unseen,
            "model_config": self.config,
            "attention_mask": self._numbers(attention_mask, "attention_mask"),
            "seed": self._agree_on(seed) if prng_key is None else self._seed_of(prng_key),
            "decode": decode_with(tokenizer),
            "allowed": prefix_allowed_tokens_fn,
            "assistant": None if assistant_model is None else assistant_model._decoder,
            **others,
        }

    def _prompt(self, config: GenerationConfig, input_ids: Any, inputs_embeds: NDArray[Any] | None) -> tuple[Any, int]:
        """The prompt's ids (b, t), and how many columns of them only stand for embeddings."""
        if isinstance(input_ids, str) or (isinstance(input_ids, list | tuple) and _has_text(input_ids)):
            hint = "Turn it into ids first: model.generate(**tokenizer(text))"
            raise InputError("text, not token ids", where="input_ids", found=shown(input_ids), hint=hint)
        if isinstance(input_ids, Mapping):
            hint = "Pass its members by name: model.generate(**tokenizer(text))"
            raise InputError("a mapping, not token ids", where="input_ids", found=", ".join(input_ids), hint=hint)
        if input_ids is not None:
            return self._numbers(input_ids, "input_ids"), 0
        if inputs_embeds is not None:
            batch, length = check_embeds(self.config, inputs_embeds.shape)
            return np.zeros((batch, length), np.int64), length
        if config.bos_token_id is None:
            hint = "Pass input_ids, or a bos_token_id to begin with"
            raise InputError("no prompt", where="input_ids", expected="token ids", found="None", hint=hint)
        return np.array([[config.bos_token_id]]), 0

    def _check_conditions(self, conditions: Conditions, ids: Any) -> None:
        """Refuse embeddings, types and factors of other shapes than the prompt's and the model's."""
        if not conditions:
            return
        batch, length = check_ids(self.config, ids).shape
        embeds, types, factors = conditions.inputs_embeds, conditions.token_type_ids, conditions.head_mask
        if embeds is not None and embeds.shape != (expected := (batch, length, self.config.n_embd)):
            raise InputError("of another shape", where="inputs_embeds", expected=expected, found=embeds.shape)
        if types is not None and check_ids(self.config, types, where="token_type_ids").shape != (batch, length):
            raise InputError("of another shape", where="token_type_ids", expected=(batch, length), found=types.shape)
        if factors is not None:
            check_head_mask(self.config, factors.shape)

    def _factory_with(self, conditions: Conditions) -> DecoderFactory:
        return lambda batch, capacity: CalledDecoder(self, batch, capacity, conditions)  # type: ignore[arg-type]

    def _numbers(self, value: Any, where: str) -> NDArray[Any] | None:
        """An argument in NumPy, whether it came as the wing's array, NumPy's or lists."""
        if value is None:
            return None
        if not _is_of_host(value):
            if not hasattr(value, "shape") or not hasattr(value, "dtype"):
                raise InputError("no array", where=where, expected="lists or an array", found=shown(value))
            value = self._host(value)
        return numbers(value, where=where)

    def _convert_output(self, output: GenerateOutput[Any], config: GenerationConfig) -> Any:
        sequences = self._native(output.sequences)
        return dataclasses.replace(output, sequences=sequences) if config.return_dict_in_generate else sequences


def _one_of(input_ids: Any, inputs: Any) -> Any:
    """The prompt, under whichever of its two names it came."""
    if inputs is None:
        return input_ids
    if input_ids is not None:
        raise InputError("given twice", where="inputs", hint="It is another name of input_ids")
    return inputs


def _has_text(rows: Sequence[Any]) -> bool:
    return any(isinstance(row, str) or (isinstance(row, list | tuple) and _has_text(row)) for row in rows)


def _is_of_host(value: Any) -> bool:
    """Whether it is an array of NumPy's, or lists."""
    return isinstance(value, np.ndarray | np.generic | list | tuple | int | float)
