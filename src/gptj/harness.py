"""lm-evaluation-harness over this package: the model `gptj`, registered by importing this module.

The harness (EleutherAI's lm_eval) finds models by name in a registry of its own, and has no way to be told of another
package's but the import. So `gptj eval` imports this, and `python -m gptj.harness` is the harness' own command line
with this model in it:

    python -m gptj.harness --model gptj --model_args pretrained=DIR,backend=flax --tasks lambada_openai

Texts become tokens, and requests scores, as in the harness' own `hf` model (`lm_eval.models.huggingface.HFLM`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptj.backends import backend as load_backend
from gptj.backends import choose_backend, install_line
from gptj.errors import BackendError, GPTJError, InputError, MissingFileError, SchemaError, shown
from gptj.generation.scoring import Score, Sequenced, limits_of, score_sequences
from gptj.paths.hub import HubPlace
from gptj.text.tokenizer import GPTJTokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
    from tqdm import tqdm
except ImportError as error:
    told = BackendError(f"lm_eval cannot be imported: {error}", hint=f"Run: {install_line('eval')}")
    raise (SystemExit(f"gptj: {told.code}: {told}") if __name__ == "__main__" else told) from None

__all__ = ["GPTJLM", "main"]

MAX_GEN_TOKS = 256
"""New tokens at most, where a task does not say; as in the harness' `hf` model."""


@register_model("gptj")
class GPTJLM(TemplateLM):
    """A folder's model and tokenizer, as the harness asks for them.

    Args:
        pretrained: the folder, or a repository of the Hugging Face hub.
        backend: "pt", "tf" or "flax"; None for the chosen or only one.
        batch_size: rows that are read at once; None or "auto": 2,048 tokens' worth, and 8 texts to be continued.
        max_batch_size: the largest `batch_size`; the harness passes it.
        device: "cpu", "cuda", "mps", or "auto"; None is "auto".
        dtype: of the parameters; None or "auto": as stored.
        revision, weights, quantize: of `from_pretrained`.
        adapter: a LoRA adapter's folder, to put to work.
        max_length: the most tokens that are read together; None: the model's positions.
        prefix_token_id: the token before a text; None: the tokenizer's bos, else its eos.
        add_bos_token: whether that token stands before every text, and not only where nothing else does.
        seed: of sampled texts.

    Raises:
        InputError: an argument of another name, or one that breaks its rule.
    """

    def __init__(
        self,
        pretrained: str,
        backend: str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        weights: str | None = None,
        quantize: str | None = None,
        adapter: str | Path | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool = False,
        seed: int = 0,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise InputError("no such model argument", where=shown(next(iter(others))), expected=", ".join(_ARGUMENTS))
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.directory = HubPlace(revision=revision).locate(Path(str(pretrained)))
        self.wing = choose_backend(backend)
        self.tokenizer = GPTJTokenizer.from_pretrained(self.directory)
        module = load_backend(self.wing)
        self._until_the_end = contextlib.ExitStack()  # TensorFlow and jax run where a context says
        loading = self._until_the_end.enter_context(_on_device(module, device))
        options: dict[str, Any] = {"param_dtype": None if dtype == "auto" else dtype, "weights": weights}
        if quantize is not None:
            options |= {"quantize": quantize, "inference": True}
        with loading:
            self.model, found = module.GPTJForCausalLM.from_pretrained(
                self.directory,
                output_loading_info=True,
                **{name: value for name, value in options.items() if value is not None},
            )
            if "lm_head.weight" in found["missing_keys"]:  # which starts from random values
                problem = "not a whole causal language model"
                raise SchemaError(problem, file=self.directory, found="no lm_head.weight")
            if adapter is not None:
                self.model.load_adapter(adapter)
        self.tokenizer.check_fits(self.model.config)
        self._limits = limits_of(self.model.config, max_length)
        self._prefix, self._add_bos_token, self._seed = prefix_token_id, add_bos_token, seed

    # ---- facts

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token_id: int | None = self.tokenizer.eos_token_id
        if token_id is None:
            raise InputError("the tokenizer has no eos token", where="prefix_token_id", hint="Pass prefix_token_id=ID")
        return token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that the first of a text is scored after: bos, else eos."""
        if self._prefix is not None:
            return self._prefix
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The most tokens that are read together."""
        return self._limits.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens at most, where a task does not say."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps prepared requests."""
        return str(self.directory).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Nothing: GPT-J has no chat template."""
        return self.apply_chat_template([]) if chat_template else ""

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Refuse: GPT-J has no chat template."""
        raise InputError("this model has no chat template", where="apply_chat_template", hint="Leave the option out")

    def get_model_info(self) -> dict[str, Any]:
        """The facts that the harness writes beside its results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "backend": self.wing,
        }

    # ---- text to tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """The tokens of a text, in which `<|endoftext|>` is that token."""
        ids: list[int] = self.tokenizer.encode(string, allow_special=True)
        if self._add_bos_token and add_special_tokens is None and ids[:1] != [self.prefix_token_id]:
            return [self.prefix_token_id, *ids]
        return ids

    # ---- requests

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **others: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether a greedy choice makes it."""
        sequences = []
        for texts, context, continuation in requests:
            if not context or not continuation:
                raise InputError("no token to score, or none before it", where="loglikelihood", found=shown(texts))
            sequences.append(Sequenced.of(context, continuation))
        answers = [(score.log_likelihood, score.is_greedy) for score in self._score(sequences, disable_tqdm)]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(self, sequences: Sequence[Sequenced], disable_tqdm: bool) -> list[Score]:
        with tqdm(total=None, disable=disable_tqdm, desc="Tokens scored") as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            size = self.batch_size
            return score_sequences(self.model, sequences, self._limits, batch_size=size, progress=tell)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in disjoint windows where they are long."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, scored in map(make_disjoint_window, rolled):
                windows.append((None, context, scored))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts that follow, each up to its stop sequences."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Texts continued") as bar:
            for numbers, settings in self._alike(requests):
                texts = self._continue([requests[n].args[0] for n in numbers], settings, [*numbers])
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(numbers))
        return answers

    def _alike(self, requests: Sequence[Any]) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
        """Batches of requests with the same settings, the longest first, by their numbers."""

        def key(number: int) -> str:
            return repr(sorted(requests[number].args[1].items()))

        for _, group in itertools.groupby(sorted(range(len(requests)), key=key), key=key):
            numbers = sorted(group, key=lambda n: -len(self.tok_encode(requests[n].args[0])))
            size = self.batch_size or 8
            for start in range(0, len(numbers), size):
                yield numbers[start : start + size], requests[numbers[0]].args[1]

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        """The continuations of contexts that have their settings in common.

        Raises:
            InputError: no room is left for a context.
            ConfigError: a setting that is none of `GenerationConfig`.
        """
        fields = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(fields.pop("until", None), eos=eos)
        new = fields.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise InputError(
                "leaves no room for a context", where="max_gen_toks", expected=f"below {self.max_length}", found=new
            )
        if not fields.get("do_sample"):
            fields.pop("temperature", None)
        rows = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        width = max(map(len, rows))
        ids = np.array([[self.eot_token_id] * (width - len(row)) + row for row in rows])
        mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        made = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            stop_strings=[stop for stop in until if stop] or None,
            tokenizer=self.tokenizer,
            seed=[self._seed + number for number in numbers] if fields.get("do_sample") else None,
            **fields,
        )
        sequences = load_backend(self.wing).to_numpy(made)[:, width:].tolist()
        texts = (self.tokenizer.decode(row, unknown="show", skip_special_tokens=True) for row in sequences)
        return [postprocess_generated_text(generation=text, stop=until, think_end_token=None) for text in texts]


_ARGUMENTS = (
    "pretrained", "backend", "batch_size", "max_batch_size", "device", "dtype", "revision", "weights", "quantize",
    "adapter", "max_length", "prefix_token_id", "add_bos_token", "seed",
)  # fmt: skip


def _batch_size(size: int | str | None, largest: int | None) -> int | None:
    """The rows of a batch that the harness' words ask for; None is left to scoring."""
    if size is None or str(size).partition(":")[0] == "auto":
        return largest
    try:
        rows = int(size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise InputError("no batch size", where="batch_size", expected="1 or more, or auto", found=shown(size))
    return rows if largest is None else min(rows, largest)


def _on_device(module: Any, name: str | None) -> Any:
    """The wing's `on_device`, by the harness' name for a device: cuda:0 is the first GPU.

    The harness' command line says "cuda" where nobody said anything. So, as in its `hf` model, a GPU that is not there
    is said and done without.
    """
    asked = "auto" if name is None else str(name).removesuffix(":0")
    if asked == "cuda":
        try:
            with module.on_device(asked):
                pass
        except InputError as error:
            logging.getLogger(__name__).warning("device=auto: %s", error)
            asked = "auto"
    return module.on_device(asked)


def evaluate(
    model: GPTJLM | Callable[[], GPTJLM], tasks: Iterable[str], *, include_path: Path | None = None, **options: Any
) -> Any:
    """The harness' results for these tasks.

    Args:
        model: the model, or what opens it, once the tasks are found.
        tasks: names, patterns, or paths of YAML files.
        include_path: a folder with further tasks.
        options: of `lm_eval.simple_evaluate`.

    Raises:
        InputError: there is no such task, or the harness cannot run it: as where data do not fit it.
        MissingFileError: a task's data are not here, and cannot be fetched.
    """
    names = [*tasks]
    place = None if include_path is None else str(include_path)
    # The harness' own index is thousands of files, read in some ten seconds: only where one of them may be meant.
    manager = TaskManager(include_path=place, include_defaults=False)
    if not all(_matches(manager, name) for name in names):
        manager = TaskManager(include_path=place)
    chosen: list[Any] = []
    for name in names:
        found = _matches(manager, name)
        if not found:
            hint = "lm_eval ls tasks names them; --include-path DIR adds yours"
            raise InputError("no such task", where="tasks", found=shown(name), hint=hint)
        chosen += found
    opened = model if isinstance(model, GPTJLM) else model()
    try:
        return simple_evaluate(model=opened, tasks=chosen, task_manager=manager, **options)
    except ConnectionError as error:
        hint = "Run it once online, or name a task of yours, with --include-path"
        raise MissingFileError("a task's data cannot be fetched", found=shown(str(error)), hint=hint) from error
    except (GPTJError, RuntimeError, MemoryError):  # the model's, or its framework's
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError("the harness cannot run them", where="tasks", found=said) from error


def _matches(manager: Any, name: str) -> list[str]:
    """The tasks that a name, a pattern or the path of a YAML file stands for."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return [name]
    found: list[str] = manager.match_tasks([name])
    return found


def to_table(results: Any) -> str:
    """The harness' tables of its results."""
    tables = [make_table(results)]
    if "groups" in results:
        tables.append(make_table(results, "groups"))
    return "\n\n".join(tables)


def to_json(results: Any) -> str:
    """All of the harness' results."""
    return json.dumps(results, indent=2, default=handle_non_serializable)


def main() -> None:
    """Run the harness' own command line, in which `--model gptj` is known; an error of ours is one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except GPTJError as error:
        sys.exit(f"gptj: {error.code}: {error}")


if __name__ == "__main__":
    main()
