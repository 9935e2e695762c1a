"""The whole proof: one process a backend, side by side where memory allows, then the judgement."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.adapters import read_adapter
from gptj.backends import BACKENDS, choose_backend, install_one_of, installed_backends
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name, numpy_dtype
from gptj.errors import BackendError, FormatError, InputError, shown
from gptj.parity.compare import compare_records
from gptj.parity.comparison import Comparison
from gptj.parity.differences import compare_traces
from gptj.parity.oracle import Oracle
from gptj.parity.probe import Probe, make_probe, require_no_seed, require_seed
from gptj.parity.processes import PROCESS_TIMEOUT_S, Job, memory_of, run_side_by_side
from gptj.parity.record import Record
from gptj.parity.report import ManifestCheck, ParityReport
from gptj.parity.sensitivity import measure_sensitivity
from gptj.parity.threads import few_threads
from gptj.parity.trace import Trace, TraceFacts, open_trace, write_trace
from gptj.parity.trace_record import batch_of_probe, texts_of
from gptj.reading.folder import open_checkpoint, verify_checkpoint
from gptj.reading.load_plan import plan_causal_lm
from gptj.reading.manifest import MANIFEST_FILE, Manifest
from gptj.reading.weight_files import open_weights, split_weights
from gptj.writing.file_system import make_folder, write_error

__all__ = [
    "open_oracle",
    "open_reference",
    "require_framework",
    "run_parity",
    "whole_weight",
]

TRACE_FILE = "trace.safetensors"


def run_parity(
    directory: str | os.PathLike[str],
    backends: Sequence[str] | None = None,
    *,
    dtype: str = "float32",
    probe: Probe | None = None,
    seed: int | None = None,
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    timeout_s: float = PROCESS_TIMEOUT_S,
    check_manifest: bool = True,
    sensitivity: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Run backends on one checkpoint, and compare their answers with the oracle's and with each other's.

    Args:
        directory: the checkpoint, of a causal language model.
        backends: their names; None is all that are installed.
        dtype: what the weights are loaded as, in the backends and, rounded the same, in the oracle.
        probe: what to ask; None makes one of `seed`, of which None is 0.
        weights: which weights file, where the directory holds several sets.
        adapter: the folder of a LoRA adapter to put to work, in the backends and in the oracle.
        keep: a folder for the probe, the oracle's trace, and each backend's record and trace; None keeps nothing.
        timeout_s: how long one backend's process may take.
        check_manifest: first compare the files and tensors with the hashes in the directory's manifest.json, where
            there is one: the backends may agree on weights that are not those that were written. Where `weights`
            chooses a set that the manifest does not list, the report says so.
        sensitivity: also plant every known mistake into each backend's trace, and say which would have been caught.
        progress: told who is at work, in words, whenever that changes, from any thread.

    Raises:
        BackendError: a backend is unknown or not installed, or none is. Nothing has been run.
        BackendProcessError: a backend's process failed; the message holds its last words.
        FormatError: the weights are not those of the manifest. Nothing has been run.
        GPTJError: the checkpoint, the probe or an argument breaks a rule.
    """
    dtype = dtype_name(dtype)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise InputError("breaks its rule", where="timeout_s", expected="seconds above 0", found=shown(timeout_s))
    require_no_seed(seed, probe)
    seed = 0 if seed is None else seed
    require_seed(seed)
    directory, weights = split_weights(directory, weights)
    manifest = _check_manifest(Path(directory), weights, wanted=check_manifest)
    names = _choose_backends(backends)
    oracle = open_oracle(directory, dtype=dtype, weights=weights, adapter=adapter)
    probe = make_probe(oracle.config, seed=seed) if probe is None else probe
    probe.check(oracle.config)
    with _folder(keep) as folder:
        probe.save(folder / "probe.npz")
        jobs = [
            _record_job(directory, name, dtype=dtype, probe=folder / "probe.npz", out=folder / name,
                        config=oracle.config, weights=weights, adapter=adapter)
            for name in names
        ]  # fmt: skip
        run_side_by_side(jobs, timeout_s=timeout_s, progress=progress)
        records = [Record.load(folder / name, config=oracle.config) for name in names]
        for name, record in zip(names, records, strict=True):
            _require_asked(record, name, dtype, probe, folder / name)
        if progress is not None:
            progress("comparing with the oracle")
        with few_threads(oracle.config):
            traces, inside = _compare_inside(folder, names, oracle, probe)
            report = compare_records(records, oracle, inside=inside, checkpoint=os.fspath(directory), manifest=manifest)
            if not sensitivity:
                return report
            if progress is not None:
                progress("planting mistakes")
            found = [measure_sensitivity(trace, lambda name, _: whole_weight(oracle, name)) for trace in traces[1:]]
            return dataclasses.replace(report, sensitivity=tuple(found))


def _compare_inside(folder: Path, names: Sequence[str], oracle: Oracle, probe: Probe) -> tuple[list[Trace], Comparison]:
    """The oracle's trace and the backends', and how they compare: every value between embedding and loss, and texts."""
    batch = batch_of_probe(probe)
    traces = [dataclasses.replace(open_trace(folder / name / TRACE_FILE), name=name) for name in names]
    texts: dict[str, NDArray[Any]] = {}
    if all(trace.extras.generated for trace in traces):
        guess = traces[0].file.read(traces[0].extras.generated["token_ids"])
        given = probe.prompt_ids, probe.prompt_mask
        made, logits = oracle.generate(*given, max_new_tokens=guess.shape[1], guess=guess)
        texts = texts_of(*given, made[:, probe.prompt_ids.shape[1] :], logits)
    write_trace(folder / "oracle.safetensors", oracle.taps(**batch), TraceFacts("oracle", "float64", oracle.config),
                inputs=batch, extras=texts)  # fmt: skip
    traces.insert(0, dataclasses.replace(open_trace(folder / "oracle.safetensors"), name="oracle"))
    return traces, compare_traces(traces, lambda name, _: whole_weight(oracle, name), between=True)


def whole_weight(oracle: Oracle, name: str) -> NDArray[Any]:
    """A weight of the oracle's, with what its adapter adds: the steps between are judged by one matrix each."""
    weight, pair = oracle.read(name), oracle.adapter_of(name.removesuffix(".weight"))
    if pair is None:
        return weight
    scale, a, b = pair
    return weight + scale * (np.asarray(b, np.float64) @ np.asarray(a, np.float64))


def _check_manifest(directory: Path, weights: str | None, *, wanted: bool) -> ManifestCheck:
    """Whether the weights have been compared with the directory's manifest.

    Raises:
        FormatError: they are not the same; all that differs is named.
    """
    if not wanted:
        return "skipped"
    if not os.path.lexists(directory / MANIFEST_FILE):
        return "missing"
    if weights is not None:
        loaded = {file.path.name for file in open_weights(directory, weights, follow_links=False)}
        if not loaded & Manifest.from_file(directory / MANIFEST_FILE).weights_files:
            return "of other weights"
    verify_checkpoint(directory, weights=weights, warn=False)
    return "checked"


def _record_job(
    directory: str | os.PathLike[str],
    backend: str,
    *,
    dtype: str,
    probe: Path,
    out: Path,
    config: GPTJConfig,
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Job:
    """The process that makes one backend's record and trace and leaves them in `out`."""
    make_folder(out)
    command = ["gptj.parity.record", os.fspath(directory), "--backend", backend, "--dtype", dtype]
    command += ["--probe", os.fspath(probe), "--out", os.fspath(out), "--trace", os.fspath(out / TRACE_FILE)]
    if weights is not None:
        command += ["--weights", weights]
    if adapter is not None:
        command += ["--adapter", os.fspath(adapter)]
    return Job(backend, command, backend, dtype, memory_of(config, dtype))


def _require_asked(record: Record, backend: str, dtype: str, probe: Probe, directory: Path) -> None:
    """Make sure that a record is the one that was asked for."""
    asked, found = probe.as_arrays(), record.probe.as_arrays()
    other = [name for name, value in asked.items() if not np.array_equal(value, found[name])]
    if (record.backend, record.dtype) != (backend, dtype) or other:
        raise FormatError(
            "is not the record that was asked for",
            file=directory,
            where=other[0] if other else None,
            expected=f"{backend} in {dtype}",
            found=f"{record.backend} in {record.dtype}",
        )


def open_oracle(
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float64",
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Oracle:
    """The float64 oracle of a checkpoint, its weights rounded to `dtype` as a backend's are when it loads them.

    Raises:
        SchemaError: the checkpoint is no whole causal language model.
        GPTJError: it, or the adapter, cannot be opened.
    """
    config, read = open_reference(directory, weights=weights)
    added = None if adapter is None else read_adapter(adapter).arrays(config)
    pairs = {row.module: (row.scale, a, b) for row, a, b in added or ()}
    return Oracle(config, lambda name: read(name, dtype), adapter=pairs)


def open_reference(
    directory: str | os.PathLike[str], *, weights: str | None = None
) -> tuple[GPTJConfig, Callable[[str, str], NDArray[Any]]]:
    """A checkpoint's config, and what reads one of its tensors, rounded to a dtype, by its canonical name.

    Raises:
        SchemaError: the checkpoint is no whole causal language model.
        GPTJError: it cannot be opened.
    """
    checkpoint = open_checkpoint(directory, weights=weights)
    plan = plan_causal_lm(checkpoint)

    def read(name: str, dtype: str) -> NDArray[Any]:
        if name in plan.zeros:
            return np.zeros((checkpoint.config.vocab_size,), numpy_dtype(dtype))
        return checkpoint.read(plan.tensors[name].name, dtype)

    return checkpoint.config, read


def require_framework(names: Sequence[str]) -> None:
    """Make sure that there is somebody to ask: nothing that was compared would hold.

    Raises:
        BackendError: there is not.
    """
    if not names:
        hint = install_one_of(BACKENDS)
        raise BackendError("no framework is installed", where="backends", expected=", ".join(BACKENDS), hint=hint)


def _choose_backends(backends: Sequence[str] | None) -> tuple[str, ...]:
    """The names, each known, installed and there once."""
    if isinstance(backends, str):
        backends = [backends]
    names = installed_backends() if backends is None else tuple(choose_backend(name) for name in backends)
    require_framework(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("named twice", where="backends", found=", ".join(twice))
    return names


@contextmanager
def _folder(keep: str | os.PathLike[str] | None) -> Iterator[Path]:
    """`keep`, made if it is missing, or a temporary folder that goes away."""
    if keep is not None:
        make_folder(Path(keep))
        yield Path(keep)
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix="gptj-parity-")
    except OSError as error:
        raise write_error(Path(error.filename or "TMPDIR"), error) from error
    with temporary as folder:
        yield Path(folder)
