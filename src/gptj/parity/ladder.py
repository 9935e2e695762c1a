"""The ladder of precisions: each backend in each dtype against the float64 oracle of the stored weights.

Rounding the weights is part of a rung's error here, unlike in the matrix, where both sides have the same weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.errors import FormatError
from gptj.parity.findings import Findings, LadderRung
from gptj.parity.oracle import Oracle, positions_of_mask
from gptj.parity.probe import require_no_seed
from gptj.parity.processes import Job, memory_of, run_side_by_side
from gptj.parity.record import library_versions
from gptj.parity.run import open_oracle, require_framework
from gptj.parity.threads import few_threads
from gptj.parity.trace_record import batch_of_prompts
from gptj.reading.npz import open_named_npz
from gptj.writing.npz import write_npz

__all__ = [
    "NEW_TOKENS",
    "PROMPTS",
    "RUNGS",
    "TRANSFORMERS",
    "LadderQuestion",
    "measure_rung",
    "random_prompts",
    "run_ladder",
]

Array = NDArray[Any]

RUNGS: dict[str, tuple[str, ...]] = {
    "pt": ("float64", "float32", "bfloat16", "float16", "int8"),
    "tf": ("float64", "float32", "bfloat16", "float16"),
    "flax": ("float64", "float32", "bfloat16", "float16"),
    "transformers": ("float32", "bfloat16", "float16"),
}
"""From the most exact down. Only PyTorch has whole numbers."""

TRANSFORMERS = "transformers"
"""transformers' own GPT-J in PyTorch, where both are installed."""

NEW_TOKENS, PROMPTS = 12, 8
"""Greedy tokens a prompt, and how many prompts there are where none are given."""


@dataclasses.dataclass(frozen=True, eq=False)
class LadderQuestion:
    """Prompts, and the oracle's answers in float64.

    Attributes:
        ids, mask: int64 (b, t), padded left.
        logits: (b, t, v).
        greedy: int64 (b, n), each prompt's continuation.
    """

    ids: Array
    mask: Array
    logits: Array
    greedy: Array

    @classmethod
    def ask(cls, oracle: Oracle, ids: Array, mask: Array) -> LadderQuestion:
        """The question of some prompts, answered by the oracle."""
        logits = oracle.forward(ids, mask, positions_of_mask(mask)).logits
        texts, _ = oracle.generate(ids, mask, max_new_tokens=NEW_TOKENS)
        assert logits is not None
        return cls(ids, mask, logits, texts[:, ids.shape[1] :])

    def save(self, path: Path) -> None:
        """Write it into an .npz."""
        write_npz(path, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LadderQuestion:
        """The question in a file that `save` wrote.

        Raises:
            MissingFileError, FormatError: there is none, or it is no such file.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        file, arrays = open_named_npz(Path(path), names, noun="ladder's question")
        return cls(**{name: file.read(arrays[name]) for name in names})


def measure_rung(backend: str, rung: str, question: LadderQuestion, logits: Array, greedy: Array) -> LadderRung:
    """A rung from a backend's answers; a number is NaN where an answer is not finite.

    Args:
        backend, rung: whose answers these are.
        question: what was asked.
        logits: (b, t, v).
        greedy: (b, n), the continuations.

    Raises:
        FormatError: an answer has another shape than the oracle's.
    """
    for name, found, expected in (("logits", logits, question.logits), ("greedy", greedy, question.greedy)):
        if found.shape != expected.shape:
            raise FormatError("of another shape", where=name, expected=expected.shape, found=found.shape)
    real = question.mask.astype(bool)
    found, exact = logits[real].astype(np.float64), question.logits[real]
    same = float((greedy == question.greedy).mean())
    if not np.isfinite(found).all():
        return LadderRung(backend, rung, math.nan, math.nan, math.nan, same, len(real))
    p, q = _log_softmax(exact), _log_softmax(found)
    divergence = np.maximum((np.exp(p) * (p - q)).sum(-1), 0)  # never below 0 but by rounding
    top1 = float((found.argmax(-1) == exact.argmax(-1)).mean())
    return LadderRung(
        backend, rung, float(np.abs(found - exact).max()), float(divergence.mean()), top1, same, len(real)
    )


def _log_softmax(logits: Array) -> Array:
    above = logits - logits.max(-1, keepdims=True)
    values: Array = above - np.log(np.exp(above).sum(-1, keepdims=True))
    return values


def run_ladder(
    directory: str | os.PathLike[str],
    backends: Sequence[str],
    *,
    prompts: Mapping[str, Array] | None = None,
    seed: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Findings:
    """The ladder of a checkpoint.

    Args:
        directory: a checkpoint of a causal language model.
        backends: of `RUNGS`, each once.
        prompts: input_ids and attention_mask, padded left; None makes some of `seed`.
        seed: of the prompts that are made; None is 0.
        progress: told who is at work on what, in words, from any thread.

    Raises:
        InputError: a seed is given beside prompts.
        BackendError: no backend is named.
        BackendProcessError: a backend's process failed.
        GPTJError: the checkpoint cannot be opened.
    """
    require_no_seed(seed, prompts)
    require_framework(backends)
    oracle = open_oracle(directory)
    if prompts is None:
        prompts = random_prompts(oracle.config, seed=seed or 0)
    if progress is not None:
        progress("the oracle")
    with few_threads(oracle.config):
        question = LadderQuestion.ask(oracle, prompts["input_ids"], prompts["attention_mask"])
    asked = [(backend, names) for backend in backends for names in _processes(backend)]
    with tempfile.TemporaryDirectory(prefix="gptj-parity-") as folder:
        question.save(Path(folder) / "question.npz")
        outs, jobs = [Path(folder) / f"{number}.json" for number in range(len(asked))], []
        for (backend, names), out in zip(asked, outs, strict=True):
            command = ["gptj.parity.ladder_record", os.fspath(directory), "--backend", backend]
            command += ["--question", os.fspath(Path(folder) / "question.npz"), "--out", os.fspath(out)]
            jobs.append(Job(f"{backend} in {names[0]}" if len(names) == 1 else backend, [*command, "--rungs", *names],
                            backend, names[0], memory_of(oracle.config, names[0])))  # fmt: skip
        run_side_by_side(jobs, progress=progress)
        rungs = [LadderRung(**rung) for out in outs for rung in json.loads(out.read_text())]
    return _findings(rungs, directory, oracle.config, backends)


def random_prompts(config: GPTJConfig, *, seed: int = 0) -> Mapping[str, Array]:
    """`PROMPTS` prompts of random tokens, each of another length, padded left."""
    random = np.random.default_rng(seed)
    longest = max(1, min(PROMPTS + 8, config.n_positions - NEW_TOKENS))
    lengths = (max(1, longest - number) for number in range(PROMPTS))
    return batch_of_prompts([random.integers(0, config.vocab_size, length).tolist() for length in lengths])


def _processes(backend: str) -> Iterator[tuple[str, ...]]:
    """The rungs of each process: float64 is a mode of the whole process in jax."""
    first, *others = RUNGS[backend]
    yield (first,)
    yield tuple(others)


def _findings(
    rungs: Sequence[LadderRung], directory: str | os.PathLike[str], config: GPTJConfig, backends: Sequence[str]
) -> Findings:
    """The ladder's; it measures and does not judge, but what is not finite is no answer."""
    lost = [rung for rung in rungs if not rung.right]
    headline = f"{len(rungs)} rungs against float64, {NEW_TOKENS} greedy tokens after {rungs[0].prompts} prompts"
    if lost:
        headline = f"{lost[0].backend} in {lost[0].rung} gives logits that are not finite"
    versions = {backend: library_versions(backend) for backend in backends if backend != TRANSFORMERS}
    return Findings("differs" if lost else "holds", headline, os.fspath(directory), config.to_dict(), versions,
                    ladder=tuple(rungs))  # fmt: skip
