"""The one loop: `generate` runs it to the end, `stream` hands out its steps, and they are the same steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Unpack

import numpy as np

from gptj.calls.inputs import check_method
from gptj.calls.outputs import KVCache
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.generation.assisted import AssistantGuesses, PromptLookup, assisted_steps
from gptj.generation.beams import search_beams
from gptj.generation.config import ASSISTANT_FIELDS, GenerationConfig
from gptj.generation.contrastive import contrastive_steps
from gptj.generation.decoder import DecoderFactory
from gptj.generation.output import GenerateOutput, TokenStep
from gptj.generation.session import Session, SessionArguments, prepare

__all__ = ["Streamer", "generate", "stream"]


class Streamer(Protocol):
    """A receiver of tokens from `generate(streamer=...)`: first the prompts (prompts, t), then each step's (rows,)."""

    def put(self, tokens: Any) -> object:
        """Take the next tokens, an int64 NumPy array."""

    def end(self) -> object:
        """Learn that no more will come."""


def generate(
    decoder_factory: DecoderFactory,
    input_ids: Any,
    *,
    model_config: GPTJConfig,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    assistant: DecoderFactory | None = None,
    streamer: Streamer | None = None,
    **arguments: Unpack[SessionArguments],
) -> GenerateOutput[Any]:
    """The prompts continued.

    Args:
        decoder_factory, input_ids, model_config, arguments: see `gptj.generation.session.prepare`.
        generation_config: how, or a dict of its fields; None is greedy with the model's eos.
        assistant: decoders of a smaller model with the same vocabulary, whose guesses the model checks. The result
            is the same with and without it.
        streamer: is given the prompts and then every step's tokens as they come.

    Raises:
        InputError: an argument breaks its rule. Nothing has been computed.
        GPTJError: the model's logits are not finite.
    """
    session = _prepare_session(
        decoder_factory,
        input_ids,
        model_config=model_config,
        generation_config=generation_config,
        assistant=assistant,
        **arguments,
    )
    if session.config.num_beams > 1:
        _refuse_beams(streamer is not None, "streamer")
        return search_beams(session).without_columns(session.unseen)
    check_method(streamer, "put", "end", where="streamer")
    steps = _steps(session, assistant)
    if streamer is not None and not session.unseen:
        streamer.put(session.prompt.copy())
    collected = []
    for step in steps:
        collected.append(step)
        if streamer is not None:
            streamer.put(step.tokens)
    if streamer is not None:
        streamer.end()
    return _collect_output(session, collected).without_columns(session.unseen)


def stream(
    decoder_factory: DecoderFactory,
    input_ids: Any,
    *,
    model_config: GPTJConfig,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    assistant: DecoderFactory | None = None,
    **arguments: Unpack[SessionArguments],
) -> Iterator[TokenStep]:
    """The steps of `generate`, each as soon as it is made; the arguments are checked before the first is asked for.

    Raises:
        InputError: as `generate`, and for a beam search, which knows its tokens only at the end.
    """
    session = _prepare_session(
        decoder_factory,
        input_ids,
        model_config=model_config,
        generation_config=generation_config,
        assistant=assistant,
        **arguments,
    )
    _refuse_beams(session.config.num_beams > 1, "num_beams")
    return _steps(session, assistant)


def _prepare_session(
    decoder_factory: DecoderFactory,
    input_ids: Any,
    *,
    model_config: GPTJConfig,
    generation_config: GenerationConfig | Mapping[str, Any] | None,
    assistant: DecoderFactory | None,
    **arguments: Unpack[SessionArguments],
) -> Session:
    """A checked session, the assistant's own fields included."""
    if generation_config is None:
        config = GenerationConfig.from_model_config(model_config)
    else:
        config = GenerationConfig.of(generation_config)
    config.check_honoured()
    if assistant is None:
        config.require_defaults(ASSISTANT_FIELDS, "an assistant model")
    elif config.strategy not in ("greedy", "sample") or config.prompt_lookup_num_tokens is not None:
        found = "prompt_lookup_num_tokens" if config.prompt_lookup_num_tokens is not None else config.strategy
        raise InputError("assists greedy decoding and sampling alone", where="assistant", found=found)
    else:
        config = config.with_assistant()
    return prepare(decoder_factory, input_ids, model_config=model_config, generation_config=config, **arguments)


def _refuse_beams(wrong: bool, where: str) -> None:
    if wrong:
        raise InputError(
            "a beam search knows its tokens only at its end", where=where, hint="Call generate, unstreamed"
        )


def _steps(session: Session, assistant: DecoderFactory | None) -> Iterator[TokenStep]:
    """The loop that the session's strategy asks for; beam searches have one of their own."""
    config = session.config
    if config.strategy == "contrastive":
        return contrastive_steps(session)
    if assistant is not None:
        return assisted_steps(session, AssistantGuesses(session, assistant))
    if config.prompt_lookup_num_tokens is not None:
        return assisted_steps(
            session, PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2)
        )
    return plain_steps(session)


def plain_steps(session: Session) -> Iterator[TokenStep]:
    """Greedy and sampled decoding: one model call a token."""
    decoder = session.decoder()
    result = session.prefill(decoder, copies=session.copies, want=session.want)
    while True:
        tokens, scores = session.next_tokens(result)
        yield session.append(tokens, result, scores)
        if session.ended.all():
            return
        # Ended rows go on computing, on token 0, so that the batch keeps its shape; nobody reads them.
        result = decoder.step(np.where(session.ended, 0, tokens), want=session.want)


def _collect_output(session: Session, steps: Sequence[TokenStep]) -> GenerateOutput[Any]:
    """The steps as one output."""
    config = session.config
    return GenerateOutput(
        sequences=session.ids[:, : session.columns].copy(),
        lengths=session.lengths.copy(),
        seeds=session.seeds if config.strategy == "sample" else (),
        logits=tuple(s.logits for s in steps if s.logits is not None) if config.output_logits else None,
        scores=tuple(s.scores for s in steps if s.scores is not None) if config.output_scores else None,
        hidden_states=(
            tuple(s.hidden_states for s in steps if s.hidden_states is not None)
            if config.output_hidden_states
            else None
        ),
        attentions=tuple(s.attentions for s in steps if s.attentions is not None) if config.output_attentions else None,
        past_key_values=_cache(session),
    )


def _cache(session: Session) -> KVCache[Any] | None:
    """The keys and values of all columns but the last, which the model has not read."""
    config = session.config
    wanted = config.return_dict_in_generate and config.use_cache and config.strategy in ("greedy", "sample")
    return session.reader.filled(session.columns - 1) if wanted and session.reader is not None else None
