"""One backend's rows of the matrix, computed in a process of its own: `python -m gptj.parity.invariance_record`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gptj
from gptj.config.schema import schema
from gptj.parity.findings import MeasureFound
from gptj.parity.invariances import (
    INT8,
    ROWS,
    Answer,
    Reference,
    judge,
    quantised,
    through,
)
from gptj.parity.oracle import positions_of_mask
from gptj.parity.processes import record_rows
from gptj.parity.run import open_oracle
from gptj.parity.steps import apply_steps, step_limit
from gptj.parity.trace_record import PATHS, probe_batch, take_steps

__all__ = ["record_matrix", "rows_of"]

Array = NDArray[Any]
Answers = Iterator[Answer]

ROWS_AT_ONCE, PADDING, PIECE = 8, 3, 5
_LOGITS = ("row", "token", "logit")


def rows_of(backend: str, folders: Mapping[str, Any] | None = None) -> list[str]:
    """The names of the rows that a backend has."""
    return [name for name in ROWS if name != "int8" or "int8" in PATHS[backend]] + [
        through(name) for name in folders or {}
    ]


def record_matrix(
    directory: str | os.PathLike[str],
    backend: str,
    *,
    folders: Mapping[str, str | os.PathLike[str]] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    rows: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[MeasureFound]:
    """Every row of a backend, computed in this process.

    Args:
        directory: a checkpoint of a causal language model.
        backend: "pt", "tf" or "flax".
        folders: the same checkpoint after it was written in another format and converted back, by the format's name.
        dtype: what the parameters are loaded as: "float32" or "float64".
        seed: of the inputs.
        rows: which of `rows_of`; None means all.
        progress: is told each row's name before it is computed.

    Raises:
        GPTJError: see `gptj.parity.record.record_backend`.
    """
    ways = _Ways(Path(directory), backend, dtype, seed, folders or {})
    found = []
    for name in rows_of(backend, folders) if rows is None else rows:
        if progress is not None:
            progress(name)
        found.append(judge(backend, name, ways.answer(name)))
    return found


class _Ways:
    """The ways of one backend to its answers."""

    def __init__(self, directory: Path, backend: str, dtype: str, seed: int, folders: Mapping[str, Any]) -> None:
        self._directory, self._dtype, self._folders = directory, dtype, folders
        self._wing: ModuleType = gptj.backend(backend)
        self._model = self._load()
        self._reference = Reference(open_oracle(directory, dtype=dtype), dtype)
        self._batch = probe_batch(self._model.config, seed=seed)
        given = {name: values for name, values in self._batch.items() if name != "labels"}
        self._given: dict[str, Any] = given
        self._logits = self._call(self._model, **given)
        self._exact, self._limit = self._reference.logits(*given.values())
        t = self._batch["input_ids"].shape[1]
        random = np.random.default_rng(seed)
        self._rows = random.integers(0, self._model.config.vocab_size, (ROWS_AT_ONCE, max(2, t - PADDING)))

    def answer(self, row: str) -> Answers:
        """The answers that a row judges."""
        if (name := row.removeprefix(through(""))) in self._folders and row == through(name):
            return self._parameters(self._load(self._folders[name]))
        answers: Callable[[], Answers] = getattr(self, f"_{row.lower().replace(' ', '_')}")
        return answers()

    def _load(self, directory: Any = None, **options: Any) -> Any:
        folder = directory or self._directory
        model = self._wing.GPTJForCausalLM.from_pretrained(folder, param_dtype=self._dtype, **options)
        model.generation_config = None
        return model

    def _numpy(self, value: Any) -> Array:
        return np.array(self._wing.to_numpy(value))

    def _call(self, model: Any, *ids: Any, **given: Any) -> Array:
        return self._numpy(model(*ids, use_cache=False, **given).logits)

    def _like_whole(self, logits: Array) -> Answers:
        """Logits of the batch, against the whole pass'."""
        yield Answer("logits", logits, self._logits, 2 * self._limit, _LOGITS)

    # ---- the rows

    def _whole_pass(self) -> Answers:
        yield Answer("logits", self._logits, self._exact, self._limit, _LOGITS)

    def _gradients(self) -> Answers:
        _, slopes = self._model.loss_gradients(**self._batch)
        exact, limits = self._reference.gradients(self._batch)
        for name, expected in exact.items():
            found = self._numpy(slopes[name]) if name in slopes else np.zeros(0)
            yield Answer(name, found, expected, np.asarray(limits[name]))

    def _step_of_sgd(self) -> Answers:
        return self._step("sgd")

    def _step_of_adamw(self) -> Answers:
        return self._step("adamw")

    def _step(self, kind: str) -> Answers:
        model = self._load(mmap=False)
        _, slopes = model.loss_gradients(**self._batch)
        kept = {name: self._numpy(slope) for name, slope in slopes.items()}
        before = {name: np.array(model._read(name)) for name in kept}
        after = take_steps(self._wing, model, slopes, kind)
        for name, slope in kept.items():
            expected = apply_steps(before[name], slope, kind)
            limit = step_limit(before[name], slope, kind, self._reference.rounding)
            yield Answer(name, self._numpy(after[name]), expected, limit)

    def _cached(self) -> Answers:
        t = self._logits.shape[1]
        first = max(1, 2 * t // 3)
        return self._like_whole(self._in_pieces([first, *range(first + 1, t + 1)]))

    def _chunks(self) -> Answers:
        t = self._logits.shape[1]
        ends = [*range(PIECE, t - 1, PIECE), t]  # never a single token at the end, which `cached` looks at
        return self._like_whole(self._in_pieces(ends))

    def _in_pieces(self, ends: Sequence[int]) -> Array:
        """The batch's logits, computed over the cache in pieces that end there."""
        past, start, parts = None, 0, []
        for end in ends:
            output = self._model(
                self._given["input_ids"][:, start:end],
                attention_mask=self._given["attention_mask"][:, :end],
                position_ids=self._given["position_ids"][:, start:end],
                past_key_values=past,
                use_cache=True,
            )
            past, start = output.past_key_values, end
            parts.append(self._numpy(output.logits))
        return np.concatenate(parts, 1)

    def _prepared(self) -> Answers:
        return self._like_whole(self._call(self._load(inference=True), **self._given))

    def _int8(self) -> Answers:
        found = self._call(self._load(inference=True, quantize="int8"), **self._given)
        stood_for = Reference(quantised(self._reference.oracle), self._dtype)
        expected, limit = stood_for.logits(*self._given.values(), rounding=INT8)
        yield Answer("logits", found, expected, limit, _LOGITS)

    def _compiled(self) -> Answers:
        taps = self._model._compiled_taps(dict(self._given), self._batch["labels"])
        return self._like_whole(self._numpy(taps["logits"]))

    def _batch_of_8(self) -> Answers:
        alone = np.concatenate([self._call(self._model, self._rows[n : n + 1]) for n in range(len(self._rows))])
        _, limit = self._reference.logits(self._rows)
        yield Answer("logits", self._call(self._model, self._rows), alone, 2 * limit, _LOGITS)

    def _padded_left(self) -> Answers:
        return self._padded(slice(PADDING, None), (PADDING, 0))

    def _padded_right(self) -> Answers:
        return self._padded(slice(0, -PADDING), (0, PADDING))

    def _padded(self, tokens: slice, width: tuple[int, int]) -> Answers:
        """Rows with padding of token 0 around them; `tokens` are those that are none."""
        ids = np.pad(self._rows, ((0, 0), width))
        mask = np.pad(np.ones_like(self._rows), ((0, 0), width))
        found = self._call(self._model, ids, attention_mask=mask, position_ids=positions_of_mask(mask))[:, tokens]
        _, limit = self._reference.logits(self._rows)
        yield Answer("logits", found, self._call(self._model, self._rows), 2 * limit, _LOGITS)

    def _embeddings(self) -> Answers:
        given = {name: values for name, values in self._given.items() if name != "input_ids"}
        rows = np.array(self._model._read("transformer.wte.weight"))[self._given["input_ids"]]
        return self._like_whole(self._call(self._model, inputs_embeds=rows, **given))

    def _saved(self) -> Answers:
        with tempfile.TemporaryDirectory(prefix="gptj-parity-") as folder:
            self._model.save_pretrained(Path(folder) / "model")
            yield from self._parameters(self._load(Path(folder) / "model", mmap=False))

    def _parameters(self, model: Any) -> Answers:
        """Every parameter of another model, which must be this one's."""
        for spec in schema(self._model.config):
            expected = np.asarray(self._model._read(spec.name))
            yield Answer(spec.name, np.asarray(model._read(spec.name)), expected, np.zeros(()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what `record_matrix` gives; see `gptj.parity.processes.end_of` for what is returned."""
    parser = argparse.ArgumentParser(prog="python -m gptj.parity.invariance_record")
    parser.add_argument("directory", help="a checkpoint")
    parser.add_argument("--backend", required=True, choices=("pt", "tf", "flax"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", action="append", nargs=2, default=[], metavar=("FORMAT", "DIR"))
    parser.add_argument("--out", required=True, help="the JSON file for the rows")
    options = parser.parse_args(arguments)
    chosen = {"folders": dict(options.folder), "dtype": options.dtype, "seed": options.seed}
    record = functools.partial(record_matrix, options.directory, options.backend, **chosen)
    return record_rows(lambda: record(progress=lambda row: print(row, flush=True)), options.out)


if __name__ == "__main__":
    sys.exit(main())
