"""The whole proof: one process a backend, side by side where memory allows, then the judgement.

A backend's process gets the same Python and an environment of its own: quiet, threads that do not spin, no 16-bit or
TF32 matrix products behind the back, and 64-bit numbers in JAX where they are asked for. The variables are set for
the child alone, and a variable that the caller had set stays.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.adapters import read_adapter
from gptj.backends import BACKENDS, choose_backend, install_one_of, installed_backends
from gptj.checkpoint import open_checkpoint, plan_load, verify_checkpoint
from gptj.config import GPTJConfig
from gptj.dtypes import dtype_name, numpy_dtype
from gptj.errors import BackendError, FormatError, GPTJError, InputError, SchemaError, shown
from gptj.parity.compare import compare_records
from gptj.parity.comparison import Comparison
from gptj.parity.differences import compare_traces
from gptj.parity.oracle import Oracle
from gptj.parity.probe import Probe, make_probe, require_no_seed, require_seed
from gptj.parity.record import Record
from gptj.parity.report import ManifestCheck, ParityReport
from gptj.parity.sensitivity import measure_sensitivity
from gptj.parity.threads import few_threads
from gptj.parity.trace import Trace, TraceFacts, open_trace, write_trace
from gptj.parity.trace_record import batch_of_probe
from gptj.reading.manifest import MANIFEST_FILE, Manifest
from gptj.reading.weight_files import open_weights, split_weights
from gptj.schema import schema
from gptj.surroundings import address_limit, memory, processors, require_current_folder
from gptj.writing.file_system import make_folder, write_error

__all__ = [
    "BackendProcessError",
    "child_environment",
    "open_oracle",
    "open_reference",
    "record_in_process",
    "run_in_process",
    "run_parity",
    "whole_weight",
]

PROCESS_TIMEOUT_S = 3600.0
TRACE_FILE = "trace.safetensors"

_FRAMEWORK_BYTES = 1.5e9
"""Of a framework that has been imported and has compiled something."""


class BackendProcessError(GPTJError, RuntimeError):
    """A backend's own process ended without a record."""


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
        progress: told the name of each backend before it starts, from a thread of its own, "oracle", and "sensitivity".

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
    names = _settle_backends(backends)
    oracle = open_oracle(directory, dtype=dtype, weights=weights, adapter=adapter)
    probe = make_probe(oracle.config, seed=seed) if probe is None else probe
    probe.check(oracle.config)
    with _folder(keep) as folder:
        probe.save(folder / "probe.npz")

        def record(name: str) -> Record:
            if progress is not None:
                progress(name)
            found = record_in_process(
                directory, name, dtype=dtype, probe=folder / "probe.npz", out=folder / name, config=oracle.config,
                weights=weights, adapter=adapter, timeout_s=timeout_s, trace=folder / name / TRACE_FILE,
            )  # fmt: skip
            _require_asked(found, name, dtype, probe, folder / name)
            return found

        with ThreadPoolExecutor(_at_once(oracle.config, dtype, len(names))) as pool:
            records = [*pool.map(record, names)]
        if progress is not None:
            progress("oracle")
        with few_threads(oracle.config):
            traces, inside = _compare_inside(folder, names, oracle, probe)
            report = compare_records(records, oracle, inside=inside, checkpoint=os.fspath(directory), manifest=manifest)
            if not sensitivity:
                return report
            if progress is not None:
                progress("sensitivity")
            found = [measure_sensitivity(trace, lambda name, _: whole_weight(oracle, name)) for trace in traces[1:]]
            return dataclasses.replace(report, sensitivity=tuple(found))


def _compare_inside(folder: Path, names: Sequence[str], oracle: Oracle, probe: Probe) -> tuple[list[Trace], Comparison]:
    """The oracle's trace and the backends', and how they compare: every value between embedding and loss."""
    batch = batch_of_probe(probe)
    write_trace(folder / "oracle.safetensors", oracle.taps(**batch), TraceFacts("oracle", "float64", oracle.config),
                inputs=batch)  # fmt: skip
    paths = {"oracle": folder / "oracle.safetensors", **{name: folder / name / TRACE_FILE for name in names}}
    traces = [dataclasses.replace(open_trace(path), name=name) for name, path in paths.items()]
    return traces, compare_traces(traces, lambda name, _: whole_weight(oracle, name))


def whole_weight(oracle: Oracle, name: str) -> NDArray[Any]:
    """A weight of the oracle's, with what its adapter adds: the steps between are judged by one matrix each."""
    weight, pair = oracle.read(name), oracle.adapter_of(name.removesuffix(".weight"))
    if pair is None:
        return weight
    scale, a, b = pair
    return weight + scale * (np.asarray(b, np.float64) @ np.asarray(a, np.float64))


def _at_once(config: GPTJConfig, dtype: str, wanted: int) -> int:
    """How many backends may run side by side: one a processor, as far as two thirds of the free memory reach."""
    values = sum(math.prod(spec.shape) for spec in schema(config))
    needed = _FRAMEWORK_BYTES + 2.5 * values * numpy_dtype(dtype).itemsize
    free = memory()[1]
    room = wanted if free is None else int(free * 2 / 3 // needed)
    return max(1, min(wanted, processors(), room))


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


def record_in_process(
    directory: str | os.PathLike[str],
    backend: str,
    *,
    dtype: str,
    probe: Path,
    out: Path,
    config: GPTJConfig | None = None,
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    timeout_s: float = PROCESS_TIMEOUT_S,
    trace: Path | None = None,
) -> Record:
    """The record that a new Python process makes of one backend and leaves in `out`, and the trace where asked for.

    Raises:
        BackendProcessError: the process failed, was ended by a signal, or took longer than `timeout_s`.
    """
    command = ["gptj.parity.record", os.fspath(directory), "--backend", backend, "--dtype", dtype]
    command += ["--probe", os.fspath(probe), "--out", os.fspath(out)]
    if weights is not None:
        command += ["--weights", weights]
    if trace is not None:
        make_folder(trace.parent)
        command += ["--trace", os.fspath(trace)]
    if adapter is not None:
        command += ["--adapter", os.fspath(adapter)]
    run_in_process(command, backend, dtype=dtype, timeout_s=timeout_s)
    return Record.load(out, config=config)


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


def run_in_process(
    command: Sequence[str], backend: str, *, dtype: str = "float32", timeout_s: float = PROCESS_TIMEOUT_S
) -> str:
    """Run `python -m COMMAND` in a new process with a backend's environment, and return what it prints.

    Raises:
        BackendProcessError: the process failed, was ended by a signal, or took longer than `timeout_s`.
        BackendError: the current folder is gone.
    """
    require_current_folder(backend)
    # -P keeps the current folder out of sys.path, where a folder called `flax` would be imported as Flax.
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", *command],
            env=child_environment(dtype),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise BackendProcessError(
            "the backend's process took too long", where=backend, expected=f"at most {timeout_s:g} s"
        ) from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        limit = address_limit()
        raise BackendProcessError(
            f"the backend's process failed with {ended}: {lines[-1] if lines else 'it said nothing'}",
            where=backend,
            hint=None if limit is None else f"Is the memory enough? ulimit -v allows {limit:,} bytes of address space",
        )
    return done.stdout


def child_environment(dtype: str) -> dict[str, str]:
    """The environment of a backend's process: the caller's, and what it left unsaid."""
    defaults = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KERAS_BACKEND": "tensorflow",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "NVIDIA_TF32_OVERRIDE": "0",
        "OPENBLAS_NUM_THREADS": "1",  # of NumPy, which the frameworks do not compute with: see gptj.parity.threads
    }
    environment = defaults | os.environ
    if dtype == "float64":
        environment["JAX_ENABLE_X64"] = "1"
    return environment


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
    plan = plan_load(checkpoint, checkpoint.config, "causal_lm")
    if plan.missing:
        raise SchemaError("not a whole causal language model", file=directory, found=f"no {', '.join(plan.missing)}")

    def read(name: str, dtype: str) -> NDArray[Any]:
        if name in plan.zeros:
            return np.zeros((checkpoint.config.vocab_size,), numpy_dtype(dtype))
        return checkpoint.read(plan.tensors[name].name, dtype)

    return checkpoint.config, read


def _settle_backends(backends: Sequence[str] | None) -> tuple[str, ...]:
    """The names, each known, installed and there once."""
    if isinstance(backends, str):
        backends = [backends]
    names = installed_backends() if backends is None else tuple(choose_backend(name) for name in backends)
    if not names:
        hint = install_one_of(BACKENDS)
        raise BackendError("no framework is installed", where="backends", expected=", ".join(BACKENDS), hint=hint)
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
