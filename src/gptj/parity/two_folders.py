"""Two folders of one model's shape compared: how far a fine-tune or a quantisation lies from what it came from.

Both run in each backend on the same prompts, and their traces are compared: of each tap the relative size of the
difference, of the next token the divergence and the agreement, of greedy texts the share that is the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.backends import choose_backend, installed_backends
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name
from gptj.parity.differences import Comparison, compare_traces, spell_tap
from gptj.parity.probe import require_no_seed
from gptj.parity.processes import Job, memory_of, run_side_by_side
from gptj.parity.run import open_reference, require_framework
from gptj.parity.threads import few_threads
from gptj.parity.trace import SHAPES, Trace, open_trace, require_same, slices_of
from gptj.parity.trace_record import require_way

__all__ = ["FolderDifference", "compare_folders", "compare_two", "require_one_shape"]

Array = NDArray[Any]

_SAME = (*SHAPES, "layer_norm_epsilon", "activation_function")
"""The config's fields in which two folders must agree."""


@dataclasses.dataclass(frozen=True)
class FolderDifference:
    """How far the second folder's model lies from the first's, in one backend.

    Attributes:
        backend: that computed.
        taps: of each, the root of the mean square of the difference over that of the first's values.
        divergence: Kullback-Leibler of the next token's distribution from the first's, in nats: the mean, the largest.
        agreement: share of tokens after which both find the same next token the most likely.
        greedy: share of greedy tokens that are the same up to each text's first difference; None where none were made.
        comparison: of the traces, tap by tap.
    """

    backend: str
    taps: Mapping[str, float]
    divergence: tuple[float, float]
    agreement: float
    greedy: float | None
    comparison: Comparison

    @property
    def equal(self) -> bool:
        """Whether rounding explains every difference."""
        return self.comparison.passed

    def lines(self, *, every: bool = False) -> Iterator[str]:
        """The report; with `every`, each tap."""
        [pair] = self.comparison.pairs
        first = pair.first
        if first is None:
            yield f"{self.backend}: {pair.headline}"
        else:
            yield (
                f"{self.backend}: {pair.other} first lies beyond rounding from {pair.base} in {spell_tap(first.tap)}: "
                f"{first.difference:.1e} where rounding explains {first.bound:.0e}; {first.where}"
            )
        texts = "" if self.greedy is None else f"; {self.greedy:.1%} of greedy tokens the same"
        mean, largest = self.divergence
        yield (
            f"{self.backend}: next token: KL {mean:.1e} nats in the mean, {largest:.1e} at most; the most likely token "
            f"agrees at {self.agreement:.1%}{texts}"
        )
        if self.taps and not every:
            tap = max(self.taps, key=lambda name: self.taps[name])
            last = list(self.taps)[-1]
            yield f"{self.backend}: by size {self.taps[tap]:.1e} in {spell_tap(tap)}, {self.taps[last]:.1e} in {last}"
        if every:
            yield from (f"{self.backend}  {tap}  {size:.1e}" for tap, size in self.taps.items())
        yield from (f"{self.backend}: {text}" for text in self.comparison.texts if text.first is not None)

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        return {
            "backend": self.backend,
            "equal": self.equal,
            "taps": {name: _number(size) for name, size in self.taps.items()},
            "kl": {"mean": _number(self.divergence[0]), "largest": _number(self.divergence[1])},
            "top1": self.agreement,
            "greedy": self.greedy,
            "comparison": self.comparison.as_dict(),
        }


def _number(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)


def require_one_shape(first: GPTJConfig, second: GPTJConfig, *, file: str | os.PathLike[str]) -> None:
    """Make sure that two configs are of models that can be compared value by value.

    Raises:
        InputError: naming every field that differs and the second's file.
    """
    require_same(first, second, file=file, fields=_SAME)


def compare_two(backend: str, first: Trace, second: Trace) -> FolderDifference:
    """Two folders' traces compared.

    Raises:
        InputError: they are not of one shape or not of the same inputs.
    """
    comparison = compare_traces([first, second])
    common = [tap for tap in first.places if tap in second.places and not tap.endswith(".visible")]
    taps = {tap: _relative(first, second, tap) for tap in common}
    divergence, agreement = ((0.0, 0.0), 1.0) if "logits" not in common else _next_tokens(first, second)
    texts = comparison.texts
    greedy = None
    if texts:
        same = sum(text.tokens if text.first is None else text.first for text in texts)
        greedy = same / max(1, sum(text.tokens for text in texts))
    return FolderDifference(backend, taps, divergence, agreement, greedy, comparison)


def _relative(first: Trace, second: Trace, tap: str) -> float:
    """The root of the mean square of the difference over that of the first's values; NaN and infinity stay."""
    off, size = 0.0, 0.0
    for tokens in slices_of(first, tap):
        with np.errstate(invalid="ignore", over="ignore"):
            a, b = (trace.read(tap, tokens).astype(np.float64) for trace in (first, second))
            off, size = off + float(((b - a) ** 2).sum()), size + float((a * a).sum())
    if off == 0:
        return 0.0
    return float(np.sqrt(off / size)) if size else float("inf")


def _next_tokens(first: Trace, second: Trace) -> tuple[tuple[float, float], float]:
    """The divergence of the next token's distribution, mean and largest, and the share of agreement."""
    mask = first.read_input("attention_mask")
    divergences: list[Array] = []
    same: list[Array] = []
    for tokens in slices_of(first, "logits"):
        a, b = (trace.read("logits", tokens).astype(np.float64) for trace in (first, second))
        shape, t = a.shape[:2], first.sizes["t"]
        counted = np.ones(shape, bool) if mask is None else mask[:, -t:][:, tokens].astype(bool)
        with np.errstate(invalid="ignore", over="ignore"):
            la, lb = (x - x.max(-1, keepdims=True) for x in (a, b))
            la, lb = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (la, lb))
            divergences.append((np.exp(la) * (la - lb)).sum(-1)[counted])
        same.append((a.argmax(-1) == b.argmax(-1))[counted])
    every = np.concatenate(divergences)
    # Rounding may take a divergence of nothing a little below it.
    return (float(np.maximum(every.mean(), 0)), float(np.maximum(every.max(), 0))), float(np.concatenate(same).mean())


def compare_folders(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    backends: Sequence[str] | None = None,
    *,
    dtype: str = "float32",
    way: str = "plain",
    prompts: Sequence[Sequence[int]] | None = None,
    generate: int = 32,
    seed: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[FolderDifference]:
    """Run both folders in each backend, each in a process of its own, and compare what they compute.

    Args:
        first, second: checkpoints of causal language models.
        backends: names; None is all that are installed.
        dtype: what both are loaded as.
        way: how the second computes, see `gptj.parity.trace_record.PATHS`; the first computes plainly.
        prompts: token ids; None makes some of `seed`.
        generate: how many tokens to add to each prompt, as far as the positions go.
        seed: of the prompts that are made; None is 0.
        progress: told who is at work on what, in words, from any thread.

    Raises:
        InputError: the models are of other shapes, a seed is given beside prompts, or a backend cannot compute so.
            Nothing has been run.
        BackendError: a backend is unknown or not installed, or none is.
        BackendProcessError: a backend's process failed.
    """
    dtype = dtype_name(dtype)
    names = installed_backends() if backends is None else tuple(choose_backend(name) for name in backends)
    require_framework(names)
    require_no_seed(seed, prompts)
    for name in names:
        require_way(name, way)
    (config, _), (other, _) = (open_reference(folder) for folder in (first, second))
    require_one_shape(config, other, file=Path(second) / "config.json")
    with tempfile.TemporaryDirectory(prefix="gptj-") as place:
        options = ["--dtype", dtype, "--generate", str(_room(config, prompts, generate))]
        if prompts is not None:
            file = Path(place) / "prompts.jsonl"
            file.write_text("".join(json.dumps({"token_ids": [*map(int, ids)]}) + "\n" for ids in prompts))
            options += ["--prompts", os.fspath(file)]
        else:
            options += ["--seed", str(seed or 0)]
        jobs, outs, called = [], [], _called(first, second, way)
        for name in names:
            for number, (folder, path) in enumerate(((first, "plain"), (second, way)), 1):
                outs.append(Path(place) / f"{name}-{number}")
                command = ["gptj", "parity", "record", os.fspath(Path(folder).absolute()), "--backend", name]
                command += [*options, "--path", path, "-o", os.fspath(outs[-1])]
                jobs.append(
                    Job(f"{name} on {called[number - 1]}", command, name, dtype, memory_of(config, dtype), place)
                )
        run_side_by_side(jobs, progress=progress)
        if progress is not None:
            progress("comparing the two")
        with few_threads(config):
            return [
                compare_two(name, *(dataclasses.replace(open_trace(out), name=text)
                                    for out, text in zip(outs[2 * number :], called, strict=False)))
                for number, name in enumerate(names)
            ]  # fmt: skip


def _called(first: str | os.PathLike[str], second: str | os.PathLike[str], way: str) -> tuple[str, str]:
    """The two's names: their folders', or those by which they can be told apart."""
    a, b = (Path(folder).name or os.fspath(folder) for folder in (first, second))
    if a == b and Path(first) != Path(second):
        a, b = os.fspath(first), os.fspath(second)
    elif a == b:
        a, b = os.fspath(first), f"{os.fspath(second)} {way}"
    return (a, b) if a != b else (a, f"{b} again")


def _room(config: GPTJConfig, prompts: Sequence[Sequence[int]] | None, generate: int) -> int:
    """How many tokens can be added: no more than there are positions."""
    longest = 12 if prompts is None else max((len(ids) for ids in prompts), default=0)
    return max(0, min(generate, config.n_positions - longest))
