"""A model's folder as `gptj generate` uses it: config, tokenizer and checked prompts first, then the weights.

Everything that can be checked without the weights is checked before they are loaded: every prompt's tokens, settings
and length. The n-th of several prompts (and turns) draws with `seed + n`, whichever batch it is in, so each can be made
again alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import gptj
from gptj.adapters import read_adapter
from gptj.adapters.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, is_adapter
from gptj.backends import choose_backend
from gptj.backends.surroundings import check_surroundings
from gptj.calls.inputs import check_ids
from gptj.calls.prepared import QUANTIZATIONS, check_quantize
from gptj.command.prompts import Prompt
from gptj.command.together import TOGETHER
from gptj.command.waiting import waiting
from gptj.config import GPTJConfig
from gptj.errors import ConfigError, GPTJError, InputError, warn_of
from gptj.generation import GenerationConfig, known_tokens_only
from gptj.generation.sampling import SEEDS
from gptj.generation.session import LogitsProcessor
from gptj.paths.hub import locate
from gptj.reading.folder import open_checkpoint, require_config, require_directory
from gptj.reading.load_plan import plan_causal_lm
from gptj.reading.same_model import require_same_model
from gptj.reading.weight_files import split_weights
from gptj.sharding import Mesh, Strategy, check_mesh
from gptj.text.tokenizer import GPTJTokenizer

__all__ = ["NEW_TOKENS", "PAYS_FROM_TOKENS", "IdPrinter", "Job", "OpenedModel", "Request", "TextDecoder"]

NEW_TOKENS = 40
"""Tokens to add at most, where neither the call nor the folder says."""

PAYS_FROM_TOKENS = 64
"""New tokens from which on PyTorch's packing of the weights is worth its time on a CPU.

In float32 it takes as long as some 50 tokens save (0.9 s, for 18 ms a token, with 280M weights on 2 virtual cores of a
busy machine). In 16 bits a token saves 6 to 11 ms; there the border is the same by guess.
"""


UNUSED = {"tf": ("jax", "matplotlib")}
"""Modules that a framework imports where they are installed, for parts that text does not need.

They are tensorflow.lite's converter of jax programs, and Keras' drawings. jax alone takes 1.6 s of the 7 s of
TensorFlow's import (`benchmarks/cold.py`).
"""

SURELY_FITS_CHARACTERS = 200_000
"""Characters from which on it is worth asking whether a text can fit at all."""

_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_THE_CALL = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The model, the settings and the device that the command line asks for; all but the prompts.

    Attributes:
        directory: the model's folder, or its repository on the hub.
        backend: which framework; None for the chosen or only one.
        dtype: of the parameters; None as stored.
        assistant: a smaller model's folder, that guesses ahead.
        adapter: a LoRA adapter's folder, to put to work in the model.
        quantize: the precision of the weights that are decoded with; None for the parameters' own.
        device: one of `gptj.calls.prepared.DEVICES`; "auto" is the CPU where weights are quantized.
        settings: fields of `GenerationConfig`, over those of the folder's generation_config.json.
        seed: of the draws; None for one from the operating system.
        truncate: whether a prompt that is too long loses its beginning; otherwise it is refused.
        allow_special: whether `<|endoftext|>` in a text is that token.
        mmap: whether the weights files are mapped; else they are read, and may change while the model is in use.
        strategy, dp, tp: how the model is cut across processes; None where it is not.
        rank: this process' number among them.
        chosen_seed: whether the seed was asked for, and not drawn for all processes.
        any_token: whether tokens that the folder's tokenizer does not know may be chosen too.
    """

    directory: Path
    backend: str | None = None
    dtype: str | None = None
    weights: str | None = None
    assistant: Path | None = None
    adapter: Path | None = None
    quantize: str | None = None
    device: str = "auto"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    truncate: bool = False
    allow_special: bool = False
    mmap: bool = True
    any_token: bool = False
    strategy: Strategy | None = None
    dp: int | None = None
    tp: int | None = None
    rank: int = 0
    chosen_seed: bool = True

    @property
    def mesh(self) -> Mesh:
        """The devices that the processes have agreed on."""
        return Mesh(dp=self.dp or 1, tp=self.tp or 1)


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked prompt: its tokens, how they are to be continued, and the seed of its draws."""

    prompt: Prompt
    ids: list[int]
    config: GenerationConfig
    seed: int


class TextDecoder(Protocol):
    """Token ids in, text out: a tokenizer's `TextStream`, or the ids themselves."""

    def push(self, token_ids: Any) -> str:
        """The text of one or several more ids."""

    def finish(self) -> str:
        """The rest: the text of a token that waited for the next."""


class OpenedModel:
    """A model's folder, opened as far as a request needs it: config and tokenizer at once, the weights when asked."""

    def __init__(self, request: Request, *, needs_tokenizer: bool) -> None:
        self.request = request
        self.directory = locate(request.directory)
        require_directory(split_weights(self.directory, None)[0])
        if is_adapter(self.directory):
            hint = f"Give its base, and this with --adapter {self.directory}"
            raise InputError("a LoRA adapter without its base model", where=str(self.directory), hint=hint)
        require_config(self.directory)
        self.model_config = GPTJConfig.from_file(self.directory)
        if request.strategy is not None:
            check_mesh(self.model_config, request.strategy, request.mesh)
        if self.request.adapter is not None:
            read_adapter(self.request.adapter).rows(self.model_config)
        self.config = self._derive_config()
        self.backend = choose_backend(request.backend)
        check_quantize(request.quantize, QUANTIZATIONS if self.backend == "pt" else ())
        needed = needs_tokenizer or bool(self.config.stop_strings)
        self.tokenizer = _tokenizer(self.directory, self.model_config, needed=needed)
        self.seed = secrets.randbits(64) if request.seed is None else check_seed(request.seed)

    def _derive_config(self) -> GenerationConfig:
        """The folder's generation_config.json, then what the command line says."""
        found = GenerationConfig.of_folder(self.directory, self.model_config.vocab_size)
        stored = GenerationConfig.from_model_config(self.model_config) if found is None else found
        if stored.max_length is None and stored.max_new_tokens is None:
            stored = stored.replace(max_new_tokens=NEW_TOKENS)
        # Rows that end are cut off before they are shown, so it matters to nobody what they are filled with.
        pad = 0 if stored.padding_id is None else stored.padding_id
        unasked: dict[str, Any] = dict.fromkeys(_OF_THE_CALL, False)
        whole = stored.replace(**unasked, pad_token_id=pad)
        return change_config(
            whole, self.request.settings, seeded=self.request.seed is not None and self.request.chosen_seed
        )

    @property
    def device(self) -> str:
        """The device that is asked for: the CPU where weights are quantized and nothing is said."""
        return "cpu" if self.request.device == "auto" and self.request.quantize else self.request.device

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Let models be loaded and run, on the device that is asked for.

        Raises:
            InputError: the framework sees none such.
        """
        check_surroundings(self.backend)
        with _interruptible_at_once(), _hide(UNUSED.get(self.backend, ())):
            wing = gptj.backend(self.backend)
        if self.request.strategy is not None:  # the mesh says where
            self._loading = contextlib.nullcontext()
            yield
            return
        with wing.on_device(self.device) as self._loading:
            yield

    def load(self, tokens: float) -> Any:
        """The model, which is to make at most so many tokens, prepared for decoding where it is ready no later for it.

        That costs nothing in TensorFlow, and in Flax with float32; PyTorch packs the weights, see `PAYS_FROM_TOKENS`.
        """
        model = self._load(self.directory, tokens, weights=self.request.weights)
        if self.request.adapter is not None:
            with self._loading:
                model.load_adapter(self.request.adapter)
        return model

    def load_adapter(self, model: Any, directory: Path, name: str) -> None:
        """Give the model one more adapter, where the model is."""
        with self._loading:
            model.load_adapter(directory, name)

    def load_assistant(self, tokens: float) -> Any:
        """The assistant model, None where none was asked for."""
        return None if self.request.assistant is None else self._load(locate(self.request.assistant), tokens)

    def _load(self, directory: Path, tokens: float, *, weights: str | None = None) -> Any:
        checkpoint = open_checkpoint(directory, weights=weights)
        plan_causal_lm(checkpoint)  # else from_pretrained would start a head from random values
        options: dict[str, Any] = {} if self.request.dtype is None else {"param_dtype": self.request.dtype}
        if weights is not None:
            options["weights"] = weights
        if not self.request.mmap:
            options["mmap"] = False
        if self.request.quantize is not None:
            options["quantize"] = self.request.quantize
        if self.request.strategy is not None:
            parallel, talk = (importlib.import_module(f"gptj.{self.backend}.{name}") for name in TOGETHER)
            mesh = parallel.mesh_of_copy(self.request.mesh, self.request.strategy)
            options |= {"strategy": self.request.strategy, "mesh": mesh}
            require_same_model(checkpoint, self.request.rank, talk.gather_texts, facts=self._facts())
        packs = self.backend == "tf" or (self.backend == "pt" and tokens >= PAYS_FROM_TOKENS)
        packs = packs and self.request.strategy is None
        if packs or self.request.quantize is not None:
            options["inference"] = True
        doing = "loading and quantizing" if self.request.quantize else "loading"
        with waiting(f"{doing} {directory}", shown=self.request.rank == 0), self._loading:
            model = gptj.backend(self.backend).GPTJForCausalLM.from_pretrained(directory, **options)
            # For a CPU, Flax makes twice as many bytes of 16-bit weights; others it leaves as they are.
            alone = self.request.strategy is None
            if alone and self.backend == "flax" and model.dtype.itemsize >= 4 and model.fast_path is None:
                model.prepare_for_inference()
        return model

    def _facts(self) -> dict[str, str]:
        """Hashes of what beside the model decides which tokens are made, by what it is called."""
        asked = (self.config, self.seed, self.request.dtype, self.request.any_token)
        facts = {"options and generation_config.json": repr(asked).encode()}
        if self.request.adapter is not None:
            for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
                facts[name] = (self.request.adapter / name).read_bytes()
        return {name: hashlib.sha256(value).hexdigest() for name, value in facts.items()}

    def tokens(self, jobs: Sequence[Job], batch_size: int = 1) -> int:
        """The most decoding steps that the jobs take, a batch at a time."""
        new = [job.config.total_length(len(job.ids), self.model_config.n_positions) - len(job.ids) for job in jobs]
        return sum(max(new[start : start + batch_size]) for start in range(0, len(new), batch_size))

    def jobs(self, prompts: Iterable[Prompt]) -> list[Job]:
        """The jobs of the prompts."""
        return [self.job(prompt, number) for number, prompt in enumerate(prompts)]

    def job(self, prompt: Prompt, number: int = 0) -> Job:
        """The job of a prompt, checked; `number` is added to the seed."""
        try:
            if prompt.text is not None:
                self.check_length(prompt.text)
            ids = self.encode(prompt.text) if prompt.token_ids is None else [*prompt.token_ids]
            config = change_config(self.config, prompt.settings, seeded=prompt.seed is not None)
            config.check_honoured()
            config.check_vocabulary(self.model_config.vocab_size)
            if not ids:
                raise InputError("no token", where="prompt", expected="at least one: there is none to begin with")
            if self.request.truncate:
                ids = ids[-self.prompt_limit(config) :]
            check_ids(self.model_config, [ids])
            config.total_length(len(ids), self.model_config.n_positions)
            seed = (self.seed + number) % SEEDS if prompt.seed is None else check_seed(prompt.seed)
        except GPTJError as error:
            raise prompt.add_place(error) from None
        return Job(prompt, ids, config, seed)

    def encode(self, text: str | None) -> list[int]:
        """The tokens of a text."""
        assert text is not None and self.tokenizer is not None
        ids: list[int] = self.tokenizer.encode(text, allow_special=self.request.allow_special)
        return ids

    def check_length(self, text: str) -> None:
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

    def prompt_limit(self, config: GenerationConfig) -> int:
        """The most tokens of a prompt that leave positions for the new ones; at least 1."""
        limit = self.limit(config)
        return max(limit - min(config.max_new_tokens or 1, limit - 1), 1)

    def limit(self, config: GenerationConfig) -> int:
        """The most tokens that prompt and answer may have together."""
        return min(config.max_length or self.model_config.n_positions, self.model_config.n_positions)

    def decoder(self) -> TextDecoder:
        """A decoder for one text."""
        return IdPrinter() if self.tokenizer is None else self.tokenizer.stream(unknown="show")

    def text(self, ids: list[int]) -> str | None:
        """The text of whole tokens, None without a tokenizer. An unknown one is shown as its number."""
        return None if self.tokenizer is None else self.tokenizer.decode(ids, unknown="show")

    def processors(self, config: GenerationConfig) -> list[LogitsProcessor]:
        """The processor that keeps to tokens that the tokenizer knows or the settings name, where it is needed."""
        if self.tokenizer is None or self.request.any_token or len(self.tokenizer) >= self.model_config.vocab_size:
            return []
        forced = (config.forced_bos_token_id, config.forced_eos_token_id)
        named = itertools.chain.from_iterable(ids if isinstance(ids, tuple) else [ids] for ids in forced)
        but = {*config.eos_token_ids, *(token_id for token_id in named if token_id is not None)}
        return [known_tokens_only(len(self.tokenizer), but=but)]


class IdPrinter:
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


def change_config(config: GenerationConfig, settings: Mapping[str, Any], *, seeded: bool) -> GenerationConfig:
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


# ---- piece by piece


# ---- turn by turn


def check_seed(seed: Any) -> int:
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise InputError("no such seed", where="seed", expected="a whole number, 0 to 2**64 - 1", found=seed)
    return seed


def _tokenizer(directory: Path, config: GPTJConfig, *, needed: bool) -> GPTJTokenizer | None:
    """The folder's tokenizer; None where none is needed and it has none, or one that cannot be used, which is said."""
    if not needed and not any(os.path.lexists(directory / name) for name in ("tokenizer.json", "vocab.json")):
        return None
    try:
        tokenizer = GPTJTokenizer.from_pretrained(directory)
        tokenizer.check_fits(config)
    except GPTJError as error:
        if needed:
            raise
        warn_of(f"the tokenizer is not used, and ids are printed: {error}")
        return None
    return tokenizer


@contextlib.contextmanager
def _hide(names: Iterable[str]) -> Iterator[None]:
    """Let the import of these modules fail as where they are not installed.

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
    """Let a signal end the process: a framework that is being imported may swallow an exception.

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
