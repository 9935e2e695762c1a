"""The matrix and the ladder of several backends, each computed in a process of its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptj.config import GPTJConfig
from gptj.parity.findings import Findings, MeasureFound
from gptj.parity.record import library_versions
from gptj.parity.run import open_reference, run_in_process

__all__ = ["run_matrix"]


def run_matrix(
    directory: str | os.PathLike[str],
    backends: Sequence[str],
    *,
    folders: Mapping[str, str | os.PathLike[str]] | None = None,
    notes: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Findings:
    """The matrix of invariances of a checkpoint.

    Args:
        directory: a checkpoint of a causal language model.
        backends: "pt", "tf" or "flax", each once.
        folders: see `gptj.parity.invariance_record.record_matrix`.
        notes: on what there is no row of, for the reader.
        dtype: "float32" or "float64".
        seed: of the inputs.
        progress: is told each backend's name before it starts.

    Raises:
        BackendProcessError: a backend's process failed.
        GPTJError: the checkpoint cannot be opened.
    """
    config, _ = open_reference(directory)
    rows: list[MeasureFound] = []
    for backend in backends:
        if progress is not None:
            progress(backend)
        with tempfile.TemporaryDirectory(prefix="gptj-parity-") as folder:
            out = Path(folder) / "rows.json"
            command = ["gptj.parity.invariance_record", os.fspath(directory), "--backend", backend, "--dtype", dtype]
            command += ["--seed", str(seed), "--out", os.fspath(out)]
            for name, place in (folders or {}).items():
                command += ["--folder", name, os.fspath(place)]
            run_in_process(command, backend, dtype=dtype)
            rows += [MeasureFound(**row) for row in json.loads(out.read_text())]
    return findings_of_matrix(rows, directory, config, backends, notes=notes)


def findings_of_matrix(
    rows: Sequence[MeasureFound],
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    backends: Sequence[str],
    *,
    notes: Sequence[str] = (),
) -> Findings:
    """The findings that rows are."""
    wrong = [row for row in rows if not row.holds]
    headline = f"All {len(rows)} rows of the matrix hold in {', '.join(backends)}"
    if wrong:
        first = wrong[0]
        headline = f"{len(wrong)} of {len(rows)} rows differ; first {first.backend}, {first.against}: {first.what}"
    versions = {backend: library_versions(backend) for backend in backends}
    if {"tf", "flax"} & {*backends}:
        notes = [*notes, "There is a row int8 in PyTorch alone."]
    return Findings("differs" if wrong else "holds", headline, os.fspath(directory), config.to_dict(), versions,
                    tuple(notes), matrix=tuple(rows))  # fmt: skip
