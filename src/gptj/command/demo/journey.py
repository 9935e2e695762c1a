"""The journey, step by step: inspect, convert, verify, write verse, then the proof; each step with its time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from gptj.backends import BACKENDS, choose_backend, install_line, installed_backends
from gptj.errors import WriteError
from gptj.parity import ParityReport, Probe, Record, run_parity
from gptj.parity.processes import run_in_process
from gptj.parity.tolerance import FLOAT32_ABSOLUTE
from gptj.reading.folder import open_checkpoint, verify_checkpoint

__all__ = ["run_demo"]

HERE = Path(__file__).parent
SHAKESPEARE, ORIGINAL = HERE / "shakespeare", HERE / "original"

PROMPT = "ROMEO:"
SEED = 1
NEW_TOKENS = 100
TABLE_COLUMNS = 74
"""The width of the proof's table, in characters; a narrower console gets `_narrow_table`."""


def run_demo(backends: Sequence[str] | None, console: Console, *, keep: Path | None = None) -> bool:
    """Make the journey, tell it to the console, and say whether all agree.

    Args:
        backends: their names; None is all that are installed.
        console: what it is told to.
        keep: where the converted model of verse is left; None keeps nothing.

    Raises:
        WriteError: nothing can be written to `keep`; nothing has been run.
        BackendError: no framework is installed. The folder has been converted and verified by then.
    """
    with tempfile.TemporaryDirectory(prefix="gptj-demo-") as folder:
        model = _convert(keep or Path(folder) / "verse", console)
        names = tuple(backends or installed_backends()) or (choose_backend(),)
        agree = _write_verse(model, names, console)
        agree = _prove(names, Path(folder), console) and agree
    _say_what_is_missing(console)
    _say_what_next(keep, names[0], console)
    return agree


# ---- one: the folder

_ELSEWHERE = "Name another folder to keep it in, or move this one away"


def _convert(path: Path, console: Console) -> Path:
    from gptj_conversion.convert import convert, describe

    _heading(console, "A small GPT-J that has learnt Shakespeare, stored as a TPU checkpoint")
    with _step(console, "inspecting") as done:
        facts = describe(SHAKESPEARE)
        done(f"inspected: {facts.format}, {facts.shards} shards of {facts.dtype}")
    sizes = f"{facts.layers} layers of width {facts.width}, vocabulary {facts.vocab:,}, {facts.parameters:,} parameters"
    _say(console, sizes, before=" " * 10)
    with _step(console, "converting") as done:
        try:
            convert(SHAKESPEARE, path, dtype="float32")
        except WriteError as error:  # the demo has no overwrite
            taken = path.is_dir() and any(path.iterdir())
            raise WriteError(error.problem, file=error.file, hint=_ELSEWHERE if taken else error.hint) from None
        done("converted to a safetensors folder, tokenizer included, by NumPy alone")
    with _step(console, "verifying") as done:
        manifest = verify_checkpoint(path)
        done(f"verified: each of the {len(manifest.tensors)} tensors has the hash that was noted of it")
    return path


# ---- two: verse


def _write_verse(model: Path, backends: Sequence[str], console: Console) -> bool:
    """Each framework continues the same prompt with the same seed; the text is shown once."""
    console.print("")
    _heading(console, f"Verse after {PROMPT!r} from seed {SEED}, each framework in a process of its own")
    made: dict[str, dict[str, Any]] = {}
    for name in backends:
        command = ["gptj", "generate", str(model), PROMPT, "--backend", name, "--seed", str(SEED)]
        command += ["--max-new-tokens", str(NEW_TOKENS), "--json"]
        with _step(console, BACKENDS[name].framework) as done:
            made[name] = json.loads(run_in_process(command, name))
            done(BACKENDS[name].framework)
    first = made[backends[0]]
    console.print("")
    for line in first["text"].rstrip().split("\n"):
        _say(console, line, before="    ")
    others = [name for name in backends if made[name]["token_ids"] != first["token_ids"]]
    if others:
        named = ", ".join(BACKENDS[name].framework for name in others)
        console.print("")
        _say(console, f"{named} wrote something else than {BACKENDS[backends[0]].framework}.", style="bold red")
    elif len(backends) > 1:
        console.print("")
        _say(console, f"{_join_names(backends)} wrote the same {NEW_TOKENS} tokens.", style="green")
    return not others


def _join_names(backends: Sequence[str]) -> str:
    *most, last = (BACKENDS[name].framework for name in backends)
    return f"{', '.join(most)} and {last}" if most else last


# ---- three: the proof


def _prove(backends: Sequence[str], folder: Path, console: Console) -> bool:
    """The original's own checkpoint, and what the original computed from it, in each framework."""
    from gptj_conversion.convert import convert

    console.print("")
    _heading(console, "The proof: what the original TPU code computed from a checkpoint of its own")
    with _step(console, "converting") as done:
        path = convert(ORIGINAL / "step_120", folder / "proof", config=ORIGINAL / "training.json", dtype="float32")
        done("converted")
    reference = _reference()
    probe = _probe(reference, open_checkpoint(path).config.n_positions)
    with _step(console, "the same questions, to each framework") as done:
        report = run_parity(path, backends, probe=probe, keep=folder / "records")
        done(f"asked {_join_names(backends)} the same, and NumPy in float64")
    rows = [_row(name, Record.load(folder / "records" / name), reference, report) for name in backends]
    console.print(_table(rows) if console.width >= TABLE_COLUMNS else _narrow_table(rows))
    agree = all(row.holds for row in rows) and report.passed
    if agree:
        bound = f"{FLOAT32_ABSOLUTE:.0e}"
        _say(console, f"All agree: no logit differs by more than {bound}, and no token differs.", style="green")
    else:
        _say(console, "They disagree.", style="bold red")
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
    """Narrow enough for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    table.add_column("largest difference\nof any logit from")
    for heading in ("the original\nTPU code", "float64\nin NumPy", "each\nother", "the original's\ngreedy tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        others = f"{row.from_others:.1e}" if len(rows) > 1 else "-"
        table.add_row(
            row.framework, f"{row.from_original:.1e}", f"{row.from_oracle:.1e}", others, f"{row.same} of {row.tokens}"
        )
    return table


def _narrow_table(rows: Sequence[_Row]) -> Table:
    """The same for a narrow terminal: a line a number."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    table.add_column("largest difference\nof any logit from")
    table.add_column("")
    for row in rows:
        table.add_row(f"[bold]{row.framework}[/]", "")
        table.add_row("  the original TPU code", f"{row.from_original:.1e}")
        table.add_row("  float64 in NumPy", f"{row.from_oracle:.1e}")
        table.add_row("  each other", f"{row.from_others:.1e}" if len(rows) > 1 else "-")
        table.add_row("  its greedy tokens", f"{row.same} of {row.tokens}")
    return table


def _reference() -> dict[str, NDArray[Any]]:
    """The original model's results: logits (2, 64, v) of `input_ids`, and 16 greedy tokens of each of 8 prompts."""
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
        prefill=ids.shape[1] - 8,
        seed=0,
    )


# ---- what to do with it


def _say_what_is_missing(console: Console) -> None:
    installed = installed_backends()
    missing = [name for name in BACKENDS if name not in installed]
    if missing:
        console.print("")
    for name in missing:
        _say(console, f"{BACKENDS[name].framework} is not installed: {install_line(name)}")


def _say_what_next(keep: Path | None, backend: str, console: Console) -> None:
    """Commands that work as they stand."""
    console.print("\n[bold]Try next[/]")
    folder = "verse" if keep is None else str(keep)
    lines = [] if keep is not None else [f"gptj demo --keep {folder}"]
    lines += [f'gptj generate {folder} "JULIET:" --stream --backend {backend}', f"gptj parity {folder}"]
    for line in lines:
        console.print(f"  {line}", markup=False)


@contextlib.contextmanager
def _step(console: Console, doing: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done while it is (on a terminal), then say what was done, after its seconds."""
    start = time.perf_counter()
    said: list[str] = []
    with console.status(doing):
        yield said.append
    _say(console, said[0], before=f"{time.perf_counter() - start:6.1f} s  ")


def _heading(console: Console, text: str) -> None:
    _say(console, text, before="", style="bold")


def _say(console: Console, text: str, *, before: str = "  ", style: str | None = None) -> None:
    """Print a sentence that begins at a column, and goes on below that column where the terminal is narrow."""
    room = max(console.width - len(before), 20)
    lines = [text] if len(text) <= room else textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines or [""]):
        console.print(f"{' ' * len(before) if number else before}{line}".rstrip(), markup=False, style=style)
