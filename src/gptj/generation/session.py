"""One generation in progress: the checked prompt, the growing rows, and the two acts that every loop shares.

`adjust` makes scores of logits, `choose` makes tokens of scores, `append` writes the tokens down and says which
rows ended. The loops differ only in when they ask the decoder for what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from gptj.calls.inputs import check_attention_mask, check_functions, check_ids
from gptj.config import GPTJConfig
from gptj.errors import GPTJError, InputError, shown, warn_of
from gptj.generation.candidates import Candidates
from gptj.generation.choice import Choice
from gptj.generation.config import GenerationConfig
from gptj.generation.decoder import Decoder, DecoderFactory, Step, Uncached
from gptj.generation.held import HeldLogits
from gptj.generation.known import KnownTokens
from gptj.generation.output import TokenStep
from gptj.generation.processors import AllowedTokens, Processor, Row, filters, processors, repair
from gptj.generation.sampling import draw, log_softmax, seeds_and_rows, uniforms
from gptj.generation.stopping import DecodeText, Stopper, StoppingCriterion

__all__ = ["LogitsProcessor", "Session", "SessionArguments", "prepare"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

_MOST_SCORE_BYTES = 2**32

LogitsProcessor = Callable[[Ids, Floats], Any]
"""`processor(ids, logits)`: ids (rows, columns) as given, padding included, logits float64 (rows, v), to be returned
changed or anew. It runs after the config's own processors and before temperature and the cuts."""


class SessionArguments(TypedDict, total=False):
    """The arguments of `prepare` that `gptj.generation.loop.generate` and `stream` hand on to it, by name."""

    attention_mask: Any
    seed: int | Sequence[int] | None
    logits_processor: Sequence[LogitsProcessor]
    stopping_criteria: Sequence[StoppingCriterion]
    decode: DecodeText | None
    allowed: AllowedTokens | None
    unseen: int


@dataclasses.dataclass(eq=False)
class Session:
    """The state of one generation.

    Attributes:
        config: how.
        model_config: the model's.
        make_decoder: decoders of the wanted kind (cached or not), for `capacity` columns.
        prompt: int64 (prompts, t), and `prompt_mask` bool (prompts, t).
        copies: rows made of each prompt.
        total_length: columns of the longest result.
        ids: int64 (rows, total_length), filled up to `columns`; the rest is `pad`.
        starts: int64 (rows,): each row's first column that is no padding.
        columns: filled columns.
        ended: bool (rows,).
        lengths: int64 (rows,): columns of each row that are its own.
        seeds, seed_rows: what each row draws with, or each prompt of a beam search.
        pad: what ended rows are filled with.
        stopper, custom: when a row ends, and the caller's processors.
        unseen: how many of the prompt's columns are embeddings, which neither processors nor the result show.
        allowed: the caller's prefix_allowed_tokens_fn.
    """

    config: GenerationConfig
    model_config: GPTJConfig
    make_decoder: DecoderFactory
    prompt: Ids
    prompt_mask: NDArray[np.bool_]
    copies: int
    total_length: int
    seeds: tuple[int, ...]
    seed_rows: tuple[int, ...]
    pad: int
    stopper: Stopper
    custom: tuple[LogitsProcessor, ...]
    unseen: int = 0
    allowed: AllowedTokens | None = None

    def __post_init__(self) -> None:
        rows = len(self.prompt) * self.copies
        self.columns = int(self.prompt.shape[1])
        self.ids: Ids = np.full((rows, self.total_length), self.pad, np.int64)
        self.ids[:, : self.columns] = np.repeat(self.prompt, self.copies, axis=0)
        self.starts: Ids = np.repeat(np.argmax(self.prompt_mask, axis=1), self.copies).astype(np.int64)
        self.ended: NDArray[np.bool_] = np.zeros(rows, bool)
        self.lengths: Ids = np.full(rows, self.columns, np.int64)
        self.reader: Decoder | None = None  # the decoder that reads the rows, once it was made
        self.starts = np.maximum(self.starts, self.unseen)
        self._processors = processors(self.config, self.total_length, self.allowed)
        known = [process for process in self.custom if isinstance(process, KnownTokens)]
        if len(known) == len(self.custom) and not self.config.output_scores and not self.stopper.reads_scores:
            # They change few tokens, and nobody else reads the scores of all.
            self.custom = ()
            self._processors += tuple(process.processor(self.model_config.vocab_size) for process in known)
        self._filters = filters(self.config)
        self._choice = Choice(self.config, self.model_config.vocab_size, self._processors)
        asked = {"hidden_states": self.config.output_hidden_states, "attentions": self.config.output_attentions}
        self.want = frozenset(name for name, wanted in asked.items() if wanted)

    def add_processor(self, processor: Processor) -> None:
        """Apply a processor after the config's own."""
        self._processors += (processor,)
        self._choice = Choice(self.config, self.model_config.vocab_size, self._processors)

    @property
    def index(self) -> int:
        """How many tokens a row has been given: the index of the next one."""
        return self.columns - int(self.prompt.shape[1])

    @property
    def running(self) -> NDArray[np.bool_]:
        """The rows that have not ended."""
        return ~self.ended

    def decoder(self) -> Decoder:
        """An empty decoder for the prompts."""
        self.reader = self.make_decoder(len(self.prompt), self.total_length)
        return self.reader

    def prefill(self, decoder: Decoder, *, copies: int, want: frozenset[str]) -> Step:
        """Put the prompts into the decoder once, and give each `copies` rows of its cache."""
        step = decoder.prefill(self.prompt, self.prompt_mask, want=want, chunk=self.config.prefill_chunk_size)
        if copies == 1:
            return step
        rows = np.repeat(np.arange(len(self.prompt)), copies)
        decoder.select(rows)
        return step.select(rows)

    def adjust(
        self,
        ids: Ids,
        logits: NDArray[Any],
        rows: Sequence[int] | NDArray[Any] | None = None,
        *,
        taken: Ids | None = None,
        normalize: bool = False,
    ) -> Floats:
        """The scores (n, v) that the config and the caller make of `logits` (n, v), in float64.

        Args:
            ids: (n, columns) that led to the logits.
            logits: what the model gave.
            rows: which of the session's rows these are; None for all. A row that has ended is left as it is.
            taken: the tokens that earlier groups of beams took at this step.
            normalize: begin with log_softmax, as a beam search does.

        Raises:
            GPTJError: a logit is not finite.
        """
        rows = range(len(self.ids)) if rows is None else rows
        running = [n for n, r in enumerate(rows) if not self.ended[r]]
        for n in running:
            self.refuse_non_finite(logits[n], n, ids.shape[1] - self.prompt.shape[1])
        scores = logits.astype(np.float64)
        if normalize:
            scores[running] = log_softmax(
                repair(scores[running]) if self.config.remove_invalid_values else scores[running]
            )
        seen = {n: self._row(ids[n], rows[n], taken) for n in running}
        for n in running:
            for process in self._processors:
                scores[n] = process(seen[n], scores[n])
        scores = self._apply_custom(ids[:, self.unseen :], scores)
        for n in running:
            scores[n] = self._apply_filters(seen[n], scores[n])
        return scores

    def best_log_probabilities(self, logits: NDArray[Any], row: int, count: int, *, taken: Ids) -> Candidates | None:
        """Some of what `adjust` makes of a row's logits (v,) with `normalize`: the `count` best, if they are at hand.

        None where a processor takes the whole row. Nothing is cut or normalized again.
        """
        seen = self._row(self.ids[row, : self.columns], row, taken)
        return self._choice.log_probabilities(logits, seen, count)

    def choose(self, scores: Floats, index: int, rows: Sequence[int] | NDArray[np.intp] | None = None) -> Ids:
        """The tokens (n,) at new-token index `index`: the best, or drawn with each row's own uniform number.

        Among equal scores the lower id is the better. Ended rows get the padding id.
        """
        rows = range(len(self.ids)) if rows is None else rows
        tokens = np.full(len(scores), self.pad, np.int64)
        for n, r in enumerate(rows):
            if not self.ended[r]:
                tokens[n] = self._choose(scores[n], int(r), index)
        return tokens

    def next_tokens(self, result: Step, ids: Ids | None = None) -> tuple[Ids, Floats | None]:
        """The tokens (rows,) that follow, and the scores (rows, v) that they were chosen by, where anybody reads those.

        The same as `adjust` and `choose`, a row at a time and without what nobody looks at. `ids` (rows, columns) led
        to the logits; None for the rows as they are.

        Raises:
            GPTJError: a logit is not finite, or no token is left.
        """
        ids = self.ids[:, : self.columns] if ids is None else ids
        index = ids.shape[1] - self.prompt.shape[1]
        if self.scores_are_read:
            scores = self.adjust(ids, result.logits)
            return self.choose(scores, index), scores
        running, held = np.flatnonzero(self.running), result.held
        rows = {r: self._row(ids[r], r, None) for r in running.tolist()}
        uniforms_of = {r: self._uniform(r, index) for r in rows} if self.config.strategy == "sample" else {}
        found: dict[int, int] = {}
        if isinstance(held, HeldLogits):
            found = self._choice.on_device(held, rows, uniforms_of)
            running = np.array([r for r in rows if r not in found], np.int64)
            logits = held.rows_on_host(running) if len(running) else np.zeros((0, held.shape[1]))
        else:
            logits = held if len(running) == len(ids) else held[running]
        tokens = np.full(len(ids), self.pad, np.int64)
        for row, values in zip(running.tolist(), logits, strict=True):
            self.refuse_non_finite(values, row, index)
            token = self._choice.on_host(values, rows[row], uniforms_of.get(row, 0.0), row)
            tokens[row] = self._choose_by_definition(values, rows[row], row, index) if token is None else token
        tokens[[*found]] = [*found.values()]
        return tokens, None

    @property
    def scores_are_read(self) -> bool:
        """Whether anybody looks at the scores of all tokens."""
        return bool(self.config.output_scores or self.custom or self.stopper.reads_scores)

    def _choose_by_definition(self, logits: NDArray[Any], seen: Row, row: int, index: int) -> int:
        """The token of a row's logits (v,), by the definition."""
        scores = logits.astype(np.float64)
        for process in self._processors:
            scores = process(seen, scores)
        return self._choose(self._apply_filters(seen, scores), row, index)

    def surely_above(self, result: Step, ids: Ids, tokens: Ids, share: float) -> bool:
        """Whether each running row's token, chosen of the logits after `ids`, has this probability at least.

        True only where it has it among all tokens; the cuts of a draw leave it the same or more.
        """
        rows = {r: self._row(ids[r], r, None) for r in np.flatnonzero(self.running).tolist()}
        chosen = {r: int(tokens[r]) for r in rows}
        return all(chance >= share for chance in self._choice.chances(result.held, rows, chosen).values())

    def _apply_filters(self, seen: Row, scores: Floats) -> Floats:
        """The scores (v,) of a row without those that a draw leaves out. Where no token is left, there is nothing."""
        if scores.max() > -np.inf:
            for cut in self._filters:
                scores = cut(seen, scores)
        return scores

    def _uniform(self, row: int, index: int) -> float:
        return float(uniforms(self.seeds[row], index, self.seed_rows[row])[0])

    def _choose(self, scores: Floats, row: int, index: int) -> int:
        """The best of the scores (v,), or the drawn one."""
        best = int(np.argmax(scores))
        if not scores[best] > -np.inf:
            raise GPTJError(f"no token is left to choose at step {index}", where=f"row {row}", hint="Ban fewer tokens")
        return draw(scores, self._uniform(row, index)) if self.config.strategy == "sample" else best

    def append(self, tokens: Ids, result: Step, scores: Floats | None) -> TokenStep:
        """Write `tokens` (rows,) as the next column, and say what happened."""
        running, index, config = self.running, self.index, self.config
        self.ids[:, self.columns] = np.where(running, tokens, self.pad)
        self.columns += 1
        self.lengths[running] = self.columns
        self.ended = self.ended | self.stopper.ends(self.ids[:, : self.columns], scores)
        return TokenStep(
            index=index,
            tokens=self.ids[:, self.columns - 1].copy(),
            running=running,
            ended=self.ended.copy(),
            logits=result.logits if config.output_logits else None,
            scores=None if scores is None or not config.output_scores else scores.astype(result.logits.dtype),
            hidden_states=result.hidden_states if config.output_hidden_states else None,
            attentions=result.attentions if config.output_attentions else None,
        )

    def _row(self, ids: Ids, row: int, taken: Ids | None) -> Row:
        start = int(self.starts[row])
        return Row(ids[start:], self.prompt.shape[1] - start, len(ids), taken, row // self.copies, ids[self.unseen :])

    def refuse_non_finite(self, logits: NDArray[Any], row: int, index: int) -> None:
        """Refuse a row's logits (v,) by name, unless the config has them repaired."""
        if self.config.remove_invalid_values:
            return
        if not np.isfinite([logits.min(), logits.max()]).all():  # half the time of looking at each; NaN is both
            token = int(np.argmin(np.isfinite(logits)))
            raise GPTJError(
                f"non-finite logits at step {index}",
                where=f"row {row}, token {token}",
                found=logits[token].item(),
                hint="Check the weights, or compute in a wider dtype",
            )

    def _apply_custom(self, ids: Ids, scores: Floats) -> Floats:
        for process in self.custom:
            given = np.asarray(process(ids, scores.copy()))
            if given.shape != scores.shape or given.dtype.kind != "f":
                raise InputError(
                    "returned something else than logits",
                    where="logits_processor",
                    expected=f"floats {scores.shape}",
                    found=f"{given.dtype} {given.shape}",
                )
            scores = given.astype(np.float64)
        return scores


def prepare(
    decoder_factory: DecoderFactory,
    input_ids: Any,
    *,
    model_config: GPTJConfig,
    generation_config: GenerationConfig,
    attention_mask: Any = None,
    seed: int | Sequence[int] | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
    decode: DecodeText | None = None,
    allowed: AllowedTokens | None = None,
    unseen: int = 0,
) -> Session:
    """A session of checked arguments; nothing has been computed.

    Args:
        decoder_factory: makes an empty decoder for (batch, capacity).
        input_ids: whole numbers (prompts, t), array-like.
        model_config: the model's; token ids and lengths are checked against it before anything is computed.
        generation_config: how.
        attention_mask: 0 and 1 (prompts, t), 0 for padding, which must be on the left. A padded prompt gives what it
            gives without padding.
        seed: 0 to 2**64 - 1 for the whole batch, or one a prompt (then a prompt's text does not depend on its batch);
            None draws one, which the output names. Greedy decoding draws nothing.
        logits_processor: functions (ids, logits) -> logits, after the config's own and before temperature.
        stopping_criteria: functions (ids, scores) -> bool, or bools (rows,).
        decode: token ids -> text, for stop_strings.
        allowed: (number of the prompt, ids so far) -> the ids that may come next.
        unseen: how many columns of `input_ids` only stand for embeddings, which the decoders know: neither processors
            nor the result have them.

    Raises:
        InputError: naming the argument, the value and the rule.
    """
    config = generation_config
    prompt = check_ids(model_config, input_ids).astype(np.int64)
    mask = _check_prompt_mask(attention_mask, prompt.shape)
    config.check_vocabulary(model_config.vocab_size)
    total_length = config.total_length(prompt.shape[1], model_config.n_positions)
    copies = config.num_return_sequences if config.num_beams == 1 else config.num_beams
    _say_of_room(config, total_length, prompt.shape[1])
    _check_rows(config, len(prompt), copies, model_config.vocab_size)
    if decode is not None and not callable(decode):
        raise InputError("not a function", where="decode", expected="token ids -> text", found=shown(decode))
    if allowed is not None and not callable(allowed):
        expected = "(number of the prompt, ids so far) -> ids"
        raise InputError("not a function", where="prefix_allowed_tokens_fn", expected=expected, found=shown(allowed))
    criteria = check_functions(stopping_criteria, where="stopping_criteria")
    custom = check_functions(logits_processor, where="logits_processor")
    seeds, seed_rows = seeds_and_rows(seed, len(prompt), copies if config.num_beams == 1 else 1)
    if config.padding_id is None and (criteria or config.stop_strings):
        raise InputError(
            "needed to fill rows that stop early", where="pad_token_id", expected="a token id", found="null"
        )
    stopper = Stopper(config, total_length, prompt.shape[1], criteria=criteria, decode=decode, unseen=unseen)
    return Session(
        config=config,
        model_config=model_config,
        make_decoder=decoder_factory if config.use_cache else _without_cache(decoder_factory),
        prompt=prompt,
        prompt_mask=mask,
        copies=copies,
        total_length=total_length,
        seeds=seeds,
        seed_rows=seed_rows,
        pad=config.padding_id or 0,
        stopper=stopper,
        custom=custom,
        unseen=unseen,
        allowed=allowed,
    )


def _say_of_room(config: GenerationConfig, total_length: int, prompt_columns: int) -> None:
    """Warn of a least length that the longest does not reach: an eos that cannot be chosen at all."""
    for field, least, room in (
        ("min_length", config.min_length, total_length),
        ("min_new_tokens", config.min_new_tokens or 0, total_length - prompt_columns),
    ):
        if least > room:
            warn_of(
                "above the longest result, so no eos is chosen", where=field, expected=f"at most {room}", found=least
            )


def _check_rows(config: GenerationConfig, prompts: int, copies: int, vocab_size: int) -> None:
    """Refuse more rows than a step's scores, float64 (rows, v), may take."""
    most = max(_MOST_SCORE_BYTES // (8 * vocab_size), 1)
    if prompts * copies > most:
        field = "num_beams" if config.num_beams > 1 else "num_return_sequences" if copies > 1 else "input_ids"
        raise InputError(
            "more rows than fit",
            where=field,
            expected=f"at most {most} rows of scores over {vocab_size} tokens ({_MOST_SCORE_BYTES} bytes)",
            found=f"{prompts} prompts x {copies}",
        )


def _without_cache(factory: DecoderFactory) -> DecoderFactory:
    return lambda batch, capacity: Uncached(factory(batch, capacity))


def _check_prompt_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The prompt's mask as bool, all True for None.

    Raises:
        InputError: not 0 and 1, another shape, a row without a token, or padding anywhere but on the left.
    """
    if mask is None:
        return np.ones(shape, bool)
    array = check_attention_mask(mask, shape[0], (shape[1],)).astype(bool)
    for row in range(shape[0]):
        if not array[row].any():
            raise InputError("a prompt without a token", where=f"attention_mask[{row}]", expected="at least one 1")
    gaps = np.argwhere(array[:, :-1] & ~array[:, 1:])
    if len(gaps):
        row, column = (int(i) for i in gaps[0])
        raise InputError(
            "padding to the right of a token",
            where=f"attention_mask[{row}][{column + 1}]",
            expected="padding on the left",
            found=0,
            hint='Pad with padding_side="left"',
        )
    return array
