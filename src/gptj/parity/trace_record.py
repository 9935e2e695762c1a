"""A backend's trace of a checkpoint, computed in this process: `model.taps` of a batch, written down.

The environment that a framework reads when it is imported is the caller's to set: `gptj.parity.run.child_environment`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gptj
from gptj.checkpoint import open_checkpoint, plan_load
from gptj.config import GPTJConfig
from gptj.dtypes import dtype_name
from gptj.errors import InputError
from gptj.inputs import IGNORED_LABEL, check_call
from gptj.parity.oracle import positions_of_mask
from gptj.parity.probe import make_probe
from gptj.parity.record import library_versions
from gptj.parity.trace import TraceFacts, rotary_sha256, write_trace
from gptj.reading.manifest import MANIFEST_FILE, Manifest
from gptj.schema import schema

__all__ = ["Batch", "batch_of_prompts", "probe_batch", "record_trace", "weights_sha256"]

Batch = dict[str, NDArray[np.int64]]


def record_trace(
    directory: str | os.PathLike[str],
    backend: str,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    batch: Mapping[str, NDArray[np.int64]] | None = None,
    seed: int | None = None,
    weights: str | None = None,
) -> TraceFacts:
    """Write the trace that a backend makes of a batch.

    Args:
        directory: a checkpoint of a causal language model.
        backend: "pt", "tf" or "flax".
        path: of the trace.
        dtype: what the parameters are loaded as.
        batch: input_ids, attention_mask, position_ids and labels; None makes one of `seed`.
        seed: of the inputs, as the trace says.
        weights: which weights file, where the directory holds several sets.

    Raises:
        BackendError: there is no such backend, or its framework is not installed.
        WriteError: the trace could not be written.
        GPTJError: the checkpoint or the batch breaks a rule.
    """
    dtype = dtype_name(dtype)
    wing = gptj.backend(backend)
    model = wing.GPTJForCausalLM.from_pretrained(directory, param_dtype=dtype, weights=weights)
    if batch is None:
        seed = 0 if seed is None else seed
        batch = probe_batch(model.config, seed=seed)
    check_call(model.config, np.asarray, **{name: value for name, value in batch.items() if name != "labels"})
    taps = {name: np.asarray(wing.to_numpy(value)) for name, value in model.taps(**batch).items()}
    facts = TraceFacts(
        backend, dtype, model.config, library_versions(backend), "plain", seed, _threads(),
        weights_sha256(directory, weights=weights), rotary_sha256(model.config, _table_dtype(dtype)),
    )  # fmt: skip
    write_trace(path, taps, facts, inputs=batch)
    return facts


def _table_dtype(dtype: str) -> str:
    """The rotary table's: never 16 bits."""
    return "float64" if dtype == "float64" else "float32"


def _threads() -> int:
    """The processors that the process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def weights_sha256(directory: str | os.PathLike[str], *, weights: str | None = None) -> str:
    """The manifest's hash of the weights; where there is no manifest of them, the same computed from the tensors."""
    directory = Path(directory)
    checkpoint = open_checkpoint(directory, weights=weights)
    if weights is None and (directory / MANIFEST_FILE).exists():
        return Manifest.from_file(directory / MANIFEST_FILE).sha256
    plan = plan_load(checkpoint, checkpoint.config, "causal_lm")
    rows = []
    for spec in schema(checkpoint.config):
        if spec.name in plan.tensors:
            values = checkpoint.read(plan.tensors[spec.name].name)
            digest = hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()
            rows.append([spec.name, values.dtype.name, list(values.shape), digest])
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def probe_batch(config: GPTJConfig, *, seed: int = 0) -> Batch:
    """The batch that `gptj parity` asks every backend: rows whole, padded left, right and within."""
    probe = make_probe(config, seed=seed)
    return {
        "input_ids": probe.input_ids, "attention_mask": probe.attention_mask, "position_ids": probe.position_ids,
        "labels": probe.labels,
    }  # fmt: skip


def batch_of_prompts(prompts: Sequence[Sequence[int]], *, pad: int = 0) -> Batch:
    """Prompts of token ids as one batch, padded left, with positions that count from each one's first token.

    Raises:
        InputError: there is none, or one is empty.

    >>> batch_of_prompts([[7, 8], [9]])["input_ids"].tolist()
    [[7, 8], [0, 9]]
    """
    if not prompts or not all(prompts):
        raise InputError("no token to trace", where="prompts", expected="at least one, of one token at least")
    t = max(map(len, prompts))
    ids: Any = np.full((len(prompts), t), pad, np.int64)
    mask: Any = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, t - len(prompt) :] = prompt
        mask[row, t - len(prompt) :] = 1
    labels = np.where(mask == 1, ids, IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of_mask(mask), "labels": labels}
