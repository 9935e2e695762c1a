"""The journey, step by step: inspect, convert, verify, then every backend against the original, with each time."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gptj.backends import BACKENDS
from gptj.checkpoint import open_checkpoint, verify_checkpoint
from gptj.parity import ParityReport, Probe, Record, run_parity
from gptj.parity.tolerance import FLOAT32_ABSOLUTE

__all__ = ["run_demo"]

ORIGINAL = Path(__file__).parent / "original"


def run_demo(backends: Sequence[str], console: Console) -> bool:
    """Make the journey with these backends, tell it to the console, and say whether all agree."""
    with tempfile.TemporaryDirectory(prefix="gptj-demo-") as folder:
        converted = _convert(Path(folder), console)
        return _compare(converted, backends, Path(folder) / "records", console)


def _convert(folder: Path, console: Console) -> Path:
    from gptj_conversion.convert import convert, describe

    console.print("[bold]A checkpoint that mesh-transformer-jax trained and wrote[/]")
    facts = describe(ORIGINAL / "step_120", config=ORIGINAL / "training.json")
    console.print(
        f"  {facts.format}: {facts.shards} shards, {facts.layers} layers, width {facts.width}, "
        f"vocabulary {facts.vocab}, {facts.dtype}, {facts.parameters:,} parameters"
    )
    with _timed(console, "converted to one safetensors folder, biases summed and kernels turned, in NumPy alone"):
        path = convert(ORIGINAL / "step_120", folder / "model", config=ORIGINAL / "training.json", dtype="float32")
    with _timed(console, "every tensor read back and compared with its hash"):
        verify_checkpoint(path)
    return path


def _compare(path: Path, backends: Sequence[str], records: Path, console: Console) -> bool:
    config = open_checkpoint(path).config
    reference = _reference()
    console.print("\n[bold]The same folder in each framework, each in a process of its own[/]")
    with _timed(console, "answers of " + ", ".join(BACKENDS[name].framework for name in backends)):
        report = run_parity(path, backends, probe=_probe(reference, config.n_positions), keep=records)
    rows = [_row(name, Record.load(records / name), reference, report) for name in backends]
    console.print(_table(rows))
    agree = all(row.holds for row in rows) and report.passed
    if agree:
        console.print(
            f"[green]All agree[/]: every difference is below {FLOAT32_ABSOLUTE:.0e}, every token is the same."
        )
    else:
        console.print("[bold red]They disagree.[/]")
        console.print(report.table())
    return agree


@dataclasses.dataclass(frozen=True)
class _Row:
    """One backend's line of the table: largest differences of logits, and greedy tokens shared with the original."""

    framework: str
    from_original: float
    from_oracle: float
    from_others: float
    same: int
    tokens: int

    @property
    def holds(self) -> bool:
        return (
            max(self.from_original, self.from_oracle, self.from_others) <= FLOAT32_ABSOLUTE and self.same == self.tokens
        )


def _row(name: str, record: Record, reference: dict[str, NDArray[Any]], report: ParityReport) -> _Row:
    made = record.answers["greedy"][:, -reference["tokens"].shape[1] :]
    logits = [m for m in report.measures if name in (m.backend, m.against) and m.what == "logits"]
    return _Row(
        framework=BACKENDS[name].framework,
        from_original=float(np.abs(record.answers["logits"] - reference["logits"]).max()),
        from_oracle=max((m.difference for m in logits if m.against == "oracle"), default=0.0),
        from_others=max((m.difference for m in logits if m.against != "oracle"), default=0.0),
        same=int((made == reference["tokens"]).sum()),
        tokens=made.size,
    )


def _table(rows: Sequence[_Row]) -> Table:
    table = Table(title="largest difference of any logit, float32", title_justify="left")
    for heading in (
        "",
        "from the original TPU code",
        "from the float64 oracle",
        "from each other",
        "the original's tokens",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        others = f"{row.from_others:.1e}" if len(rows) > 1 else "-"
        table.add_row(
            row.framework, f"{row.from_original:.1e}", f"{row.from_oracle:.1e}", others, f"{row.same} of {row.tokens}"
        )
    return table


def _reference() -> dict[str, NDArray[Any]]:
    """What the original model computed: logits (2, 64, v) of `input_ids`, and 16 greedy tokens of each of 8 prompts."""
    with np.load(ORIGINAL / "reference.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _probe(reference: dict[str, NDArray[Any]], n_positions: int) -> Probe:
    """The original's own inputs, as a probe."""
    ids = reference["input_ids"].astype(np.int64)
    new = reference["tokens"].shape[1]
    longest = int(reference["prompt_lengths"].max())
    prompts = reference["prompts"][:, -longest:].astype(np.int64)
    mask = (np.arange(longest) >= longest - reference["prompt_lengths"][:, None]).astype(np.int64)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return Probe(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        position_ids=positions,
        far_position_ids=positions,
        labels=ids,
        prompt_ids=prompts,
        prompt_mask=mask,
        new_tokens=min(new, n_positions - longest),
        prefill=ids.shape[1] // 2,
        seed=0,
    )


@contextlib.contextmanager
def _timed(console: Console, what: str) -> Iterator[None]:
    """Say what was done, and in how many seconds, when it is done."""
    start = time.perf_counter()
    yield
    console.print(f"  {what}: {time.perf_counter() - start:.1f} s")
