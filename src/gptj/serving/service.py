"""A request made into continuations: its prompts into tokens, its fields into the settings of `generate`.

What a request leaves out is OpenAI's default where the folder's generation_config.json does not sample: temperature 1
and no cut. Otherwise it is the folder's. Everything that is no matter of drawing (eos, banned words, penalties) is the
folder's always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptj.config import GPTJConfig
from gptj.errors import InputError, warn_of
from gptj.generation import GenerationConfig
from gptj.generation.changes import decline
from gptj.generation.processors import FewTokens
from gptj.generation.session import LogitsProcessor, Session, prepare
from gptj.generation.stopping import decode_with
from gptj.serving.chat import ChatTemplate
from gptj.serving.continuation import Continuation, Listener, TextDecoder, Transcript, no_decoder
from gptj.serving.engine import Engine
from gptj.serving.refusals import Refusal
from gptj.serving.requests import CompletionRequest, Prompt, Sampling

__all__ = ["DEFAULT_TOKENS", "Choice", "IdTokenizer", "Service", "servable"]

DEFAULT_TOKENS = 16
"""New tokens of a completion that does not say: OpenAI's number."""


def servable(config: GenerationConfig) -> GenerationConfig:
    """The folder's settings for requests, which are greedy or sampled: without a search, which is warned of."""
    if config.strategy in ("greedy", "sample") and config.prompt_lookup_num_tokens is None:
        return config.replace(num_return_sequences=1)
    warn_of("not served: requests are greedy or sampled", where="generation_config.json", found=config.strategy)
    return config.replace(
        num_beams=1, num_beam_groups=1, penalty_alpha=None, prompt_lookup_num_tokens=None, num_return_sequences=1
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer to be made: which prompt's, and its token ids."""

    index: int
    prompt: Prompt
    ids: tuple[int, ...]


class IdTokenizer:
    """Token ids as text, for a folder without a tokenizer: numbers with spaces between them."""

    def __init__(self) -> None:
        self._begun = False

    def push(self, token_ids: Any) -> str:
        """The ids, with a space before them where others stand before."""
        text = " ".join(map(str, token_ids))
        text, self._begun = (f" {text}" if self._begun else text), True
        return text

    def finish(self) -> str:
        """Nothing: no number is held back."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A model as it is served.

    Attributes:
        engine: continues.
        model_config: the model's.
        tokenizer: the folder's; None where it has none, and then prompts are token ids and texts are numbers.
        names: what the model is called, and each of its adapters, with the adapter's name or None.
        base: the folder's settings.
        processors: of a config: those that keep to known tokens.
        template: the folder's chat template, if it has one.
        allow_special: whether a special token's spelling in a prompt is that token.
        created: when it was started, seconds since 1970.
    """

    engine: Engine
    model_config: GPTJConfig
    tokenizer: Any
    names: Mapping[str, str | None]
    base: GenerationConfig
    processors: Callable[[GenerationConfig], list[LogitsProcessor]]
    template: ChatTemplate | None = None
    allow_special: bool = False
    created: int = 0

    def choices(self, request: CompletionRequest) -> list[Choice]:
        """The answers that a request asks for, each prompt's n one after another, with their tokens.

        Raises:
            Refusal, GPTJError: a prompt that has none, is too long, or cannot be read here.
        """
        self.adapter(request)
        prompts = (self._render(request),) if request.is_chat else request.prompts
        most = self.engine.most_waiting
        if len(prompts) * request.n > most:
            message = f"n times prompts: expected at most {most} choices, found {len(prompts) * request.n}"
            raise Refusal(400, message, param="n" if request.n > 1 else "prompt", code="invalid_value")
        made: list[Choice] = []
        for number, prompt in enumerate(prompts):
            place = _place(request, number)
            ids = self._encode(place, prompt, allow_special=request.is_chat or self.allow_special)
            made += [Choice(len(made) + n, prompt, ids) for n in range(request.n)]
        return made

    def continuations(
        self, request: CompletionRequest, choices: list[Choice], listen: Callable[[int], Listener]
    ) -> list[Continuation]:
        """A continuation for each choice, none of them begun.

        Args:
            request: the checked request.
            choices: those of the request.
            listen: gives the listener of a choice, by its index.

        Raises:
            Refusal, GPTJError: a field that does not fit this model.
        """
        adapter = self.adapter(request)
        if request.stop and self.tokenizer is None:
            raise Refusal(400, "stop: this model's folder has no tokenizer", param="stop", code="invalid_value")
        seed = request.sampling.seed
        sessions: dict[tuple[int, ...], GenerationConfig] = {}
        made = []
        for choice in choices:
            config = sessions.get(choice.ids)
            if config is None:
                config = sessions[choice.ids] = self._config(request, choice)
            prompt_number, copy = divmod(choice.index, request.n)
            its_seed = None if seed is None else [(seed + prompt_number) % 2**64]
            made.append(
                Continuation(
                    np.array(choice.ids, np.int64),
                    None if request.max_tokens == 0 else self._session(request, choice, config, its_seed, copy),
                    Transcript(self._decoder_after(choice.prompt if request.echo else ""), request.stop),
                    listen(choice.index),
                    scores=request.scores,
                    scores_prompt=request.echo and request.scores is not None,
                    adapter=adapter,
                    is_copy=copy > 0,
                )
            )
        return made

    def adapter(self, request: CompletionRequest) -> str | None:
        """The adapter that the request's model is.

        Raises:
            Refusal: there is no model of that name.
        """
        if request.model not in self.names:
            said = f"no model is called {request.model[:80]!r} here; GET /v1/models names them"
            raise Refusal(404, said, param="model", code="model_not_found")
        return self.names[request.model]

    def decoder(self) -> TextDecoder:
        """A decoder for one text."""
        decoder: TextDecoder = IdTokenizer() if self.tokenizer is None else self.tokenizer.stream(unknown="show")
        return decoder

    def spell(self, token: int) -> str:
        """A token as the answer's logprobs spell it: its text, or its bytes where they are no whole characters."""
        if self.tokenizer is None:
            return str(token)
        if token >= len(self.tokenizer):
            return f"<|{token}|>"
        spelt: bytes = self.tokenizer.id_to_bytes(token)
        try:
            return spelt.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)

    def bytes_of(self, token: int) -> list[int]:
        """The bytes of a token's text."""
        if self.tokenizer is None or token >= len(self.tokenizer):
            return list(self.spell(token).encode())
        return list(self.tokenizer.id_to_bytes(token))

    def text(self, prompt: Prompt) -> str:
        """A prompt as text, but for the beginning of a character at its end, which the answer's text begins with."""
        return prompt if isinstance(prompt, str) else self.decoder().push(list(prompt))

    # ---- parts of the above

    def _decoder_after(self, prompt: Prompt) -> TextDecoder:
        """A decoder that goes on where a prompt ended."""
        decoder = self.decoder()
        if not isinstance(prompt, str):  # a text ends with a whole character
            decoder.push(list(prompt))
        return decoder

    def _render(self, request: CompletionRequest) -> str:
        if self.template is None:
            message = "this model's folder has no chat template: ask /v1/completions, or add chat_template.jinja to it"
            raise Refusal(400, message, code="no_chat_template")
        return self.template.render(request.messages)

    def _encode(self, place: str, prompt: Prompt, *, allow_special: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                message = f"{place}: this model's folder has no tokenizer; give token ids"
                raise Refusal(400, message, param=place.partition("[")[0], code="invalid_value")
            self._check_length(place, prompt)
            ids = tuple(self.tokenizer.encode(prompt, allow_special=allow_special))
        else:
            ids = prompt
        if not ids:
            raise InputError("no token", where=place, expected="at least one")
        if len(ids) > self.model_config.n_positions:
            self._refuse_length(place, f"{len(ids)} tokens")
        most = self.model_config.vocab_size - 1
        if max(ids) > most:
            at = next(n for n, one in enumerate(ids) if one > most)
            raise InputError("no such token", where=f"{place}[{at}]", expected=f"0 to {most}", found=ids[at])
        return ids

    def _check_length(self, place: str, text: str) -> None:
        """Refuse a text that could not fit however long its tokens were, before it is made into tokens."""
        longest = max(len(token.encode()) for token in self.tokenizer.get_vocab()) if len(text) > 50_000 else 0
        if longest and len(text) // longest > self.model_config.n_positions:
            self._refuse_length(place, f"{len(text)} characters")

    def _refuse_length(self, place: str, found: str, room: int = 0) -> None:
        message = f"{place}: expected at most {self.model_config.n_positions - room} tokens, found {found}"
        raise Refusal(400, message, param=place.partition("[")[0], code="context_length_exceeded")

    def _config(self, request: CompletionRequest, choice: Choice) -> GenerationConfig:
        """The settings of a continuation, checked for its prompt."""
        place, prompt_tokens = _place(request, choice.index // request.n), len(choice.ids)
        room = self.model_config.n_positions - prompt_tokens
        if request.max_tokens is None:
            if room < 1:
                self._refuse_length(place, f"{prompt_tokens} tokens", room=1)
            new = room if request.is_chat else min(DEFAULT_TOKENS, room)
        else:
            new = max(request.max_tokens, 1)
        if new > room and request.max_tokens != 0:
            of = place if "[" in place else "the prompt"
            found = f"{prompt_tokens} of {of} and {new} new ones"
            field = request.length_field
            message = f"{field}: the model has {self.model_config.n_positions} positions, and {found} were asked for"
            raise Refusal(400, message, param=field, code="context_length_exceeded")
        changes = self._drawing(request.sampling) | {"max_new_tokens": new}
        sampling = request.sampling
        if sampling.repetition_penalty is not None:
            changes["repetition_penalty"] = sampling.repetition_penalty
        if sampling.logit_bias:
            biases = dict(self.base.sequence_bias or ())
            for token, bias in sampling.logit_bias.items():
                biases[(token,)] = biases.get((token,), 0.0) + bias
            changes["sequence_bias"] = biases
        config = self.base.replace(**changes)
        config.check_vocabulary(self.model_config.vocab_size)
        return config

    def _drawing(self, sampling: Sampling) -> dict[str, Any]:
        """The fields of a config that say how to draw."""
        asked = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        if self.base.strategy == "sample":
            defaults = {name: getattr(self.base, name) for name in asked}
        else:
            defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
        chosen = {name: defaults[name] if value is None else value for name, value in asked.items()}
        # The best token is the best whatever else is cut, so a greedy request may name the cuts.
        greedy = 0 in (chosen["temperature"], chosen["top_p"])
        return {"do_sample": False} if greedy else {"do_sample": True, **chosen}

    def _session(
        self, request: CompletionRequest, choice: Choice, config: GenerationConfig, seed: list[int] | None, copy: int
    ) -> Session:
        session = prepare(
            no_decoder,
            np.array([choice.ids], np.int64),
            model_config=self.model_config,
            generation_config=config,
            seed=seed,
            logits_processor=self.processors(config),
            decode=decode_with(self.tokenizer),
        )
        session.seed_rows = (copy,)
        presence, frequency = request.sampling.presence_penalty, request.sampling.frequency_penalty
        if frequency:
            session.add_processor(FewTokens(lambda row: decline(row.ids[row.prompt :], frequency)))
        if presence:
            session.add_processor(FewTokens(lambda row: decline(np.unique(row.ids[row.prompt :]), presence)))
        return session


def _place(request: CompletionRequest, number: int) -> str:
    """A prompt's name in messages: its field's, with its number where there are several."""
    return f"{request.text_field}[{number}]" if len(request.prompts) > 1 else request.text_field
