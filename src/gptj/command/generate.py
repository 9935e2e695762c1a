"""What `gptj generate` does: prompts in, text out, whole or piece by piece, one by one, in batches, or turn by turn.

Everything that can be checked without the weights is checked before they are loaded: every prompt's tokens, settings
and length. The n-th of several prompts (and turns) draws with `seed + n`, whichever batch it is in, so each can be made
again alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import click
import numpy as np

import gptj
from gptj.backends import choose_backend
from gptj.command.prompts import Prompt, read_turns
from gptj.command.waiting import waiting
from gptj.config import GPTJConfig
from gptj.errors import ConfigError, GPTJError, InputError, TokenizerError, warn_of
from gptj.generation import Conversation, GenerationConfig, TokenStep, known_tokens_only
from gptj.generation.config import GENERATION_CONFIG_FILE
from gptj.generation.sampling import SEEDS
from gptj.generation.session import LogitsProcessor
from gptj.hub import locate
from gptj.inputs import check_ids
from gptj.paths import missing_folder
from gptj.prepared import QUANTIZATIONS, check_quantize
from gptj.surroundings import check_surroundings
from gptj.text.tokenizer import GPTJTokenizer

__all__ = ["NEW_TOKENS", "Request", "continue_prompts", "converse", "stream_prompts"]

NEW_TOKENS = 40
"""Tokens to add at most, where neither the call nor the folder says."""

PAYS_FROM_TOKENS = 64
"""From how many tokens on PyTorch's packing of the weights is worth its time on a CPU.

In float32 it takes as long as some 50 tokens save (0.9 s, for 18 ms a token, with 280M weights on 2 virtual cores of a
busy machine). In 16 bits a token saves 6 to 11 ms; there the border is the same by guess.
"""

UNUSED = {"tf": ("jax", "matplotlib")}
"""What a framework imports where it is installed, for parts that text does not need: tensorflow.lite's converter of jax
programs, and Keras' drawings. jax alone takes 1.6 s of 7 to TensorFlow's import (`benchmarks/cold.py`)."""

WELCOME = """What you type is continued. A line that ends in \\ goes on in the next.
Ctrl-C stops an answer; an empty line or Ctrl-D ends."""

SURELY_FITS_CHARACTERS = 200_000
"""From how many characters on it is worth asking whether a text can fit at all."""

_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_THE_CALL = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions",
)  # fmt: skip
_OF_COLUMNS = ("max_length", "min_length")  # these count a row's padding, so only rows without any keep their meaning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, beside the prompts.

    Attributes:
        directory: the model's folder, or its repository on the hub.
        backend: which framework; None for the chosen or only one.
        dtype: of the parameters; None as stored.
        assistant: a smaller model's folder, that guesses ahead.
        quantize: the precision of the weights that are decoded with; None for the parameters' own.
        device: one of `gptj.prepared.DEVICES`; "auto" is the CPU where weights are quantized.
        settings: fields of `GenerationConfig`, over those of the folder's generation_config.json.
        seed: of the draws; None for one from the operating system.
        truncate: whether a prompt that is too long loses its beginning; otherwise it is refused.
        allow_special: whether `<|endoftext|>` in a text is that token.
        mmap: whether the weights files are mapped; else they are read, and may change while the model is in use.
        any_token: whether tokens that the folder's tokenizer does not know may be chosen too.
    """

    directory: Path
    backend: str | None = None
    dtype: str | None = None
    weights: str | None = None
    assistant: Path | None = None
    quantize: str | None = None
    device: str = "auto"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    truncate: bool = False
    allow_special: bool = False
    mmap: bool = True
    any_token: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked prompt: its tokens, how they are to be continued, and the seed of its draws."""

    prompt: Prompt
    ids: list[int]
    config: GenerationConfig
    seed: int


class Words(Protocol):
    """Token ids in, text out: a tokenizer's `TextStream`, or the ids themselves."""

    def push(self, token_ids: Any) -> str:
        """The text of one or several more ids."""

    def finish(self) -> str:
        """What was held back."""


class Desk:
    """A model's folder, opened as far as a request needs it: config and tokenizer at once, the weights when asked."""

    def __init__(self, request: Request, *, needs_tokenizer: bool) -> None:
        self.request = request
        self.directory = locate(request.directory)
        if not os.path.lexists(self.directory):
            raise missing_folder(self.directory, "no such directory")
        self.model_config = GPTJConfig.from_file(self.directory)
        self.config = self._settled_config()
        self.backend = choose_backend(request.backend)
        check_quantize(request.quantize, QUANTIZATIONS if self.backend == "pt" else ())
        needed = needs_tokenizer or bool(self.config.stop_strings)
        self.tokenizer = _tokenizer(self.directory, self.model_config, needed=needed)
        self.seed = secrets.randbits(64) if request.seed is None else checked_seed(request.seed)

    def _settled_config(self) -> GenerationConfig:
        """The folder's generation_config.json, then what the command line says."""
        path = self.directory / GENERATION_CONFIG_FILE
        stored = (
            GenerationConfig.from_file(path, vocab_size=self.model_config.vocab_size)
            if path.exists()
            else GenerationConfig.from_model_config(self.model_config)
        )
        if stored.max_length is None and stored.max_new_tokens is None:
            stored = stored.replace(max_new_tokens=NEW_TOKENS)
        # Rows that end are cut off before they are shown, so it matters to nobody what they are filled with.
        pad = 0 if stored.padding_id is None else stored.padding_id
        unasked: dict[str, Any] = dict.fromkeys(_OF_THE_CALL, False)
        whole = stored.replace(**unasked, pad_token_id=pad)
        return changed(whole, self.request.settings, seeded=self.request.seed is not None)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While this is open, models can be loaded, and they run, on the device that is asked for.

        Raises:
            InputError: the framework sees none such.
        """
        device = "cpu" if self.request.device == "auto" and self.request.quantize else self.request.device
        check_surroundings(self.backend)
        with _interruptible_at_once(), _hidden(UNUSED.get(self.backend, ())):
            wing = gptj.backend(self.backend)
        with wing.on_device(device) as self._loading:
            yield

    def load(self, tokens: float) -> Any:
        """The model, which is to make at most so many tokens, prepared for decoding where it is ready no later for it.

        That costs nothing in TensorFlow, and in Flax with float32; PyTorch packs the weights, see `PAYS_FROM_TOKENS`.
        """
        return self._load(self.directory, tokens, weights=self.request.weights)

    def load_assistant(self, tokens: float) -> Any:
        """The assistant model, None where none was asked for."""
        return None if self.request.assistant is None else self._load(locate(self.request.assistant), tokens)

    def _load(self, directory: Path, tokens: float, *, weights: str | None = None) -> Any:
        options: dict[str, Any] = {} if self.request.dtype is None else {"param_dtype": self.request.dtype}
        if weights is not None:
            options["weights"] = weights
        if not self.request.mmap:
            options["mmap"] = False
        if self.request.quantize is not None:
            options["quantize"] = self.request.quantize
        packs = self.backend == "tf" or (self.backend == "pt" and tokens >= PAYS_FROM_TOKENS)
        if packs or self.request.quantize is not None:
            options["inference"] = True
        doing = "loading and quantizing" if self.request.quantize else "loading"
        with waiting(f"{doing} {directory}"), self._loading:
            model = gptj.backend(self.backend).GPTJForCausalLM.from_pretrained(directory, **options)
            # For a CPU, Flax makes twice as many bytes of 16-bit weights; others it leaves as they are.
            if self.backend == "flax" and model.dtype.itemsize >= 4 and model.fast_path is None:
                model.prepare_for_inference()
        return model

    def tokens(self, jobs: Sequence[Job], batch_size: int = 1) -> int:
        """The most steps that continuing them takes, a batch at a time."""
        new = [job.config.total_length(len(job.ids), self.model_config.n_positions) - len(job.ids) for job in jobs]
        return sum(max(new[start : start + batch_size]) for start in range(0, len(new), batch_size))

    def jobs(self, prompts: Iterable[Prompt]) -> list[Job]:
        """Every prompt, checked."""
        return [self.job(prompt, number) for number, prompt in enumerate(prompts)]

    def job(self, prompt: Prompt, number: int = 0) -> Job:
        """A prompt, checked; `number` is added to the seed."""
        try:
            if prompt.text is not None:
                self.check_room_for(prompt.text)
            ids = self.encode(prompt.text) if prompt.token_ids is None else [*prompt.token_ids]
            config = changed(self.config, prompt.settings, seeded=prompt.seed is not None)
            config.check_honoured()
            config.check_vocabulary(self.model_config.vocab_size)
            if not ids:
                raise InputError("no token", where="prompt", expected="at least one: there is none to begin with")
            if self.request.truncate:
                ids = ids[-self.room(config) :]
            check_ids(self.model_config, [ids])
            config.total_length(len(ids), self.model_config.n_positions)
            seed = (self.seed + number) % SEEDS if prompt.seed is None else checked_seed(prompt.seed)
        except GPTJError as error:
            raise prompt.named(error) from None
        return Job(prompt, ids, config, seed)

    def encode(self, text: str | None) -> list[int]:
        """The tokens of a text."""
        assert text is not None and self.tokenizer is not None
        ids: list[int] = self.tokenizer.encode(text, allow_special=self.request.allow_special)
        return ids

    def check_room_for(self, text: str) -> None:
        """Refuse a text so long that it need not be made into tokens to see it: a gigabyte would take minutes.

        Raises:
            InputError: the longest tokens that there are would not spell it within the model's positions.
        """
        if len(text) < SURELY_FITS_CHARACTERS or self.request.truncate or self.request.allow_special:
            return
        assert self.tokenizer is not None
        longest = max(len(token.encode()) for token in self.tokenizer.get_vocab())
        least = len(text) // longest
        if least > self.model_config.n_positions:
            raise InputError(
                "longer than the model's positions",
                where="prompt",
                expected=f"at most n_positions = {self.model_config.n_positions} tokens",
                found=f"{len(text):,} characters, which are {least:,} tokens or more",
                hint="Say --truncate left to forget the beginning",
            )

    def room(self, config: GenerationConfig) -> int:
        """How many tokens a prompt may have, so that the new ones still have positions; at least 1."""
        limit = self.limit(config)
        return max(limit - min(config.max_new_tokens or 1, limit - 1), 1)

    def limit(self, config: GenerationConfig) -> int:
        """The most tokens that prompt and answer may have together."""
        return min(config.max_length or self.model_config.n_positions, self.model_config.n_positions)

    def words(self) -> Words:
        """A decoder for one text."""
        return Numbers() if self.tokenizer is None else self.tokenizer.stream(unknown="show")

    def text(self, ids: list[int]) -> str | None:
        """The text of whole tokens, None without a tokenizer. An unknown one is shown as its number."""
        return None if self.tokenizer is None else self.tokenizer.decode(ids, unknown="show")

    def processors(self, config: GenerationConfig) -> list[LogitsProcessor]:
        """What keeps the model to the tokens that its tokenizer knows, and to those that the settings name."""
        if self.tokenizer is None or self.request.any_token or len(self.tokenizer) >= self.model_config.vocab_size:
            return []
        forced = (config.forced_bos_token_id, config.forced_eos_token_id)
        named = itertools.chain.from_iterable(ids if isinstance(ids, tuple) else [ids] for ids in forced)
        but = {*config.eos_token_ids, *(token_id for token_id in named if token_id is not None)}
        return [known_tokens_only(len(self.tokenizer), but=but)]


class Numbers:
    """Token ids as text, for a folder without a tokenizer: numbers with spaces between them."""

    def __init__(self) -> None:
        self._begun = False

    def push(self, token_ids: Any) -> str:
        """The ids, with a space before them where others stand before."""
        text = " ".join(map(str, np.atleast_1d(token_ids).tolist()))
        text, self._begun = (f" {text}" if self._begun else text), True
        return text

    def finish(self) -> str:
        """Nothing: no number is held back."""
        return ""


def changed(config: GenerationConfig, settings: Mapping[str, Any], *, seeded: bool) -> GenerationConfig:
    """`config` with `settings`, which ask for sampling where they name a setting of it, or where there is a seed.

    Raises:
        ConfigError: a setting is unknown, breaks its rule, or has no effect here.
    """
    if "extra" in settings:
        raise ConfigError("no such field", where="extra")
    for field in _OF_THE_CALL:
        if settings.get(field):
            raise ConfigError("has no effect on the command line, which prints tokens", where=field)
    changes = dict(settings)
    sampled = seeded or any(changes.get(field) is not None for field in _OF_SAMPLING)
    if sampled and not (changes.get("penalty_alpha") or config.penalty_alpha):
        changes.setdefault("do_sample", True)
    return config.replace(**changes) if changes else config


# ---- whole texts


def continue_prompts(
    request: Request, prompts: Sequence[Prompt], *, batch_size: int, as_json: bool, write: Callable[[str], None]
) -> None:
    """Each prompt and what follows it is written as soon as its batch is done, in the order of the prompts.

    Args:
        request: how.
        prompts: what.
        batch_size: how many prompts the model reads at once. The tokens are those of one by one.
        as_json: an object a line (one prompt's is indented), else the texts, with an empty line between.
        write: takes what is to be printed, a line break at its end.
    """
    desk = Desk(request, needs_tokenizer=any(prompt.text is not None for prompt in prompts))
    jobs = desk.jobs(prompts)
    steps = desk.tokens(jobs, batch_size)
    with desk.at_work():
        _continue(desk, jobs, desk.load(steps), desk.load_assistant(steps), batch_size, as_json, write)


def _continue(
    desk: Desk, jobs: Sequence[Job], model: Any, assistant: Any, batch_size: int, as_json: bool,
    write: Callable[[str], None],
) -> None:  # fmt: skip
    alone = len(jobs) == 1 and jobs[0].config.num_return_sequences == 1
    first = True
    for batch in batches(jobs, batch_size):
        for record in continued(desk, model, assistant, batch):
            if as_json:
                write(json.dumps(record, indent=2 if alone else None) + "\n")
            else:
                ids = record["token_ids"]
                text = " ".join(map(str, ids)) if record["text"] is None else record["text"]
                write(f"{'' if first else chr(10)}{text}\n")
            first = False


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """The jobs in order, at most `size` that follow each other and may share a call of the model."""
    for _, alike in itertools.groupby(jobs, key=_shared):
        waiting = list(alike)
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]


def _shared(job: Job) -> tuple[GenerationConfig, int]:
    """What the jobs of a batch have in common."""
    counts_columns = any(getattr(job.config, field) for field in _OF_COLUMNS)
    return job.config, len(job.ids) if counts_columns else 0


def continued(desk: Desk, model: Any, assistant: Any, batch: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """A record for every returned sequence of every prompt of the batch."""
    config = batch[0].config
    width = max(len(job.ids) for job in batch)
    ids = np.array([[0] * (width - len(job.ids)) + job.ids for job in batch])
    mask = np.array([[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in batch])
    output = model.generate(
        ids,
        config.replace(return_dict_in_generate=True),
        attention_mask=mask,
        seed=[job.seed for job in batch],
        logits_processor=desk.processors(config),
        tokenizer=desk.tokenizer,
        assistant_model=assistant,
    )
    sequences = gptj.backend(desk.backend).to_numpy(output.sequences)
    for row, (sequence, length) in enumerate(zip(sequences, output.lengths, strict=True)):
        job, copy = batch[row // config.num_return_sequences], row % config.num_return_sequences
        made = [int(i) for i in sequence[width - len(job.ids) : length]]
        yield {
            **({} if job.prompt.line is None else {"line": job.prompt.line}),
            **({} if config.num_return_sequences == 1 else {"sequence": copy}),
            "backend": desk.backend,
            "prompt_tokens": len(job.ids),
            **({"seed": job.seed} if config.strategy in ("sample", "beam_sample") else {}),
            **({} if output.sequences_scores is None else {"score": float(output.sequences_scores[row])}),
            "token_ids": made,
            "text": desk.text(_shown(made, len(job.ids), config)),
        }


def _shown(ids: list[int], prompt: int, config: GenerationConfig) -> list[int]:
    """`ids` without the eos that ends them: it is no part of the text."""
    return ids[:-1] if len(ids) > prompt and ids[-1] in config.eos_token_ids else ids


# ---- piece by piece


def stream_prompts(request: Request, prompts: Sequence[Prompt], *, write: Callable[[str], None]) -> None:
    """Each prompt is written, and then what follows it piece by piece, as the tokens are made.

    Raises:
        InputError: a strategy that knows its tokens only at the end, or has several rows.
    """
    desk = Desk(request, needs_tokenizer=any(prompt.text is not None for prompt in prompts))
    jobs = desk.jobs(prompts)
    for job in jobs:
        if job.config.num_beams > 1 or job.config.num_return_sequences > 1:
            field = "num_beams" if job.config.num_beams > 1 else "num_return_sequences"
            found = getattr(job.config, field)
            raise job.prompt.named(InputError("cannot be streamed", where=field, expected="1", found=found))
    new = desk.tokens(jobs)
    with desk.at_work():
        _stream(desk, jobs, desk.load(new), desk.load_assistant(new), write)


def _stream(desk: Desk, jobs: Sequence[Job], model: Any, assistant: Any, write: Callable[[str], None]) -> None:
    for number, job in enumerate(jobs):
        words = desk.words()
        write(("\n" if number else "") + words.push(job.ids))
        steps = model.stream(
            [job.ids],
            job.config,
            seed=job.seed,
            logits_processor=desk.processors(job.config),
            tokenizer=desk.tokenizer,
            assistant_model=assistant,
        )
        try:
            for piece in pieces(steps, words, job.config):
                write(piece)
        finally:
            write("\n")


def pieces(
    steps: Iterable[TokenStep], words: Words, config: GenerationConfig, stopped: Callable[[], bool] = lambda: False
) -> Iterator[str]:
    """The text that each step completes, until `stopped` says so, and at the end what was held back."""
    for step in steps:
        token = int(step.tokens[0])
        if token not in config.eos_token_ids and (piece := words.push([token])):
            yield piece
        if stopped():
            break
    if rest := words.finish():
        yield rest


# ---- turn by turn


def converse(
    request: Request, prompts: Sequence[Prompt], *, write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Each line of stdin is joined to all that was said, and continued; the model reads only what is new.

    An empty line, or the end of stdin, ends it. Ctrl-C ends the present answer, a second one all.

    Args:
        request: how.
        prompts: the first turns.
        write: takes text, as soon as there is some.
        note: takes a line for the person at the terminal.

    Raises:
        InputError: the context is full, or a strategy that knows its tokens only at the end.
    """
    desk = Desk(request, needs_tokenizer=True)
    with desk.at_work():
        _converse(desk, desk.load(math.inf).conversation(), prompts, write=write, note=note)


def _converse(
    desk: Desk,
    conversation: Conversation,
    prompts: Sequence[Prompt],
    *,
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    request, config = desk.request, desk.config
    if _at_a_terminal():
        note(WELCOME)
    said = (str(prompt.text) for prompt in prompts)
    for number, text in enumerate(itertools.chain(said, _typed())):
        if not text:
            return
        ids, fitting = fitted(desk, conversation, desk.encode(text), config)
        if number < len(prompts):
            write(text)
        steps = conversation.stream(
            ids,
            fitting,
            seed=(desk.seed + number) % SEEDS,
            logits_processor=desk.processors(fitting),
            tokenizer=desk.tokenizer,
        )
        with interruptible() as interrupted:
            for piece in pieces(steps, desk.words(), config, interrupted):
                write(piece)
        write("\n")
        if len(conversation.ids) >= desk.limit(config) and not request.truncate:
            note(f"The context is full: {len(conversation.ids)} of {desk.limit(config)} tokens.")


def fitted(
    desk: Desk, conversation: Conversation, ids: list[int], config: GenerationConfig
) -> tuple[list[int], GenerationConfig]:
    """The turn's tokens, and `config` with as many new ones as have room; where asked for, the oldest are forgotten.

    Raises:
        InputError: there is room for none.
    """
    limit = desk.limit(config)
    if desk.request.truncate:
        whole = [*conversation.ids, *ids][-desk.room(config) :]
        ids = ids[-len(whole) :]
        conversation.ids = whole[: len(whole) - len(ids)]
    room = limit - len(conversation.ids) - len(ids)
    if room < 1:
        raise InputError(
            "the context is full",
            where="conversation",
            expected=f"at most {limit - 1} tokens before the next one",
            found=f"{len(conversation.ids)} and {len(ids)} new",
            hint="Say --truncate left to forget the oldest",
        )
    return ids, config.replace(max_new_tokens=min(config.max_new_tokens or room, room))


def _at_a_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _typed() -> Iterator[str]:
    """What is typed, a turn at a time: with a line editor on a terminal, else the lines of stdin."""
    if not _at_a_terminal():
        yield from read_turns()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input uses it once it is imported)
    while True:
        turn = ""
        try:
            turn = input("> ")
            while turn.endswith("\\"):
                turn = turn[:-1] + "\n" + input("… ")
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo()
            return
        yield turn


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While this is open, Ctrl-C is only noted, and the function that it gives says so; a second one interrupts."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def checked_seed(seed: Any) -> int:
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise InputError("no such seed", where="seed", expected="a whole number, 0 to 2**64 - 1", found=seed)
    return seed


def _tokenizer(directory: Path, config: GPTJConfig, *, needed: bool) -> GPTJTokenizer | None:
    """The folder's tokenizer; None where none is needed and it has none, or one that cannot be used, which is said."""
    if not needed and not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return None
    try:
        tokenizer = GPTJTokenizer.from_pretrained(directory)
        tokenizer.check_fits(config)
    except (TokenizerError, ConfigError) as error:
        if needed:
            raise
        warn_of(f"the tokenizer is not used, and ids are printed: {error}")
        return None
    return tokenizer


@contextlib.contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """While this is open, importing these modules fails as where they are not installed.

    For the command line alone, which is a process of ours: another thread's import would fail, too.
    """
    hidden = [name for name in names if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]


@contextlib.contextmanager
def _interruptible_at_once() -> Iterator[None]:
    """While this is open, a signal ends the process: a framework that is being imported may swallow an exception.

    Nothing has been begun by then that would have to be put in order.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if callable(handler)]  # neither ignored nor the system's
    if threading.current_thread() is not threading.main_thread():
        heard = []
    for number in heard:
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
