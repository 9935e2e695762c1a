"""The matrix and the ladder of several backends, each computed in a process of its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptj.config import GPTJConfig
from gptj.parity.findings import Findings, MeasureFound
from gptj.parity.processes import Job, memory_of, run_side_by_side
from gptj.parity.record import library_versions
from gptj.parity.run import open_reference, require_framework

__all__ = ["run_matrix"]

_COPIES = 10.0
"""Times the weights that a backend's process holds where it holds the most, in the step of AdamW: two models, the
gradient and its copy, what was before, two moments, and the oracle's gradient in float64."""


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
        progress: told who is at work on what, in words, from any thread.

    Raises:
        BackendError: no backend is named.
        BackendProcessError: a backend's process failed.
        GPTJError: the checkpoint cannot be opened.
    """
    require_framework(backends)
    config, _ = open_reference(directory)
    needed = memory_of(config, dtype, copies=_COPIES)
    with tempfile.TemporaryDirectory(prefix="gptj-parity-") as folder:
        outs, jobs = [Path(folder) / f"{backend}.json" for backend in backends], []
        for backend, out in zip(backends, outs, strict=True):
            command = ["gptj.parity.invariance_record", os.fspath(directory), "--backend", backend, "--dtype", dtype]
            command += ["--seed", str(seed), "--out", os.fspath(out)]
            for name, place in (folders or {}).items():
                command += ["--folder", name, os.fspath(place)]
            jobs.append(Job(backend, command, backend, dtype, needed, folder))
        run_side_by_side(jobs, progress=progress)
        rows = [MeasureFound(**row) for out in outs for row in json.loads(out.read_text())]
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
    headline = f"all {len(rows)} rows of the matrix hold in {', '.join(backends)}"
    if wrong:
        first = wrong[0]
        headline = f"{len(wrong)} of {len(rows)} rows differ; first {first.backend}, {first.against}: {first.what}"
    versions = {backend: library_versions(backend) for backend in backends}
    if {"tf", "flax"} & {*backends}:
        notes = [*notes, "There is a row int8 in PyTorch alone."]
    return Findings("differs" if wrong else "holds", headline, os.fspath(directory), config.to_dict(), versions,
                    tuple(notes), matrix=tuple(rows))  # fmt: skip
