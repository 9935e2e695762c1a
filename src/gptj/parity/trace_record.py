"""A backend's trace of a checkpoint, computed in this process: `model.taps` of a batch, written down.

The environment that a framework reads when it is imported is the caller's to set:
`gptj.parity.processes.child_environment`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import gptj
from gptj.backends import choose_backend
from gptj.calls.inputs import check_call
from gptj.calls.taps import choose_taps, split_tap
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name
from gptj.config.labels import IGNORED_LABEL
from gptj.config.schema import schema
from gptj.errors import InputError, shown
from gptj.parity.oracle import positions_of_mask
from gptj.parity.probe import Probe, make_probe
from gptj.parity.steps import BETAS, DECAY, EPSILON, KINDS, RATE, SHARES
from gptj.parity.trace import TraceFacts, table_sha256, write_trace
from gptj.parity.versions import library_versions
from gptj.reading.folder import open_checkpoint
from gptj.reading.load_plan import plan_causal_lm, plan_load
from gptj.reading.manifest import MANIFEST_FILE, Manifest

__all__ = [
    "PATHS",
    "Batch",
    "batch_of_probe",
    "batch_of_prompts",
    "probe_batch",
    "record_trace",
    "require_way",
    "take_steps",
    "texts_of",
    "weights_sha256",
]

Batch = dict[str, NDArray[np.int64]]


PATHS: dict[str, tuple[str, ...]] = {
    "pt": ("plain", "prepared", "int8", "compiled", "sdpa"),
    "tf": ("plain", "prepared", "compiled"),
    "flax": ("plain", "prepared", "compiled"),
}
"""The ways in which each backend can compute a forward pass."""

_FUSED = frozenset({"scores", "visible", "weights"})
"""Taps that fused attention does not have."""


def record_trace(
    directory: str | os.PathLike[str],
    backend: str,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    way: str = "plain",
    batch: Mapping[str, NDArray[np.int64]] | None = None,
    gradients: bool | Literal["steps"] = False,
    generate: int = 0,
    seed: int | None = None,
    weights: str | None = None,
    model: Any = None,
    prompts: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> TraceFacts:
    """Write the trace that a backend makes of a batch.

    Args:
        directory: a checkpoint of a causal language model.
        backend: "pt", "tf" or "flax".
        path: of the trace.
        dtype: what the parameters are loaded as.
        way: of computing, one of the backend's `PATHS`. A prepared model gives what its outputs show: embedding, sums,
            weights, ln_f, logits and loss.
        batch: input_ids, attention_mask, position_ids and labels; None makes one of `seed`.
        gradients: also the loss' gradient by every parameter; "steps": and every parameter after steps of SGD and of
            AdamW from it, see `gptj.parity.steps`.
        generate: how many tokens to add, greedily, to each prompt: the batch's rows, or of `seed` where there is none.
        seed: of the inputs, as the trace says.
        weights: which weights file, where the directory holds several sets.
        model: of the directory, loaded so already; None loads it.
        prompts: ids and mask, to continue in place of the batch's rows.

    Raises:
        BackendError: there is no such backend, or its framework is not installed.
        InputError: the backend cannot compute so, or the way has no gradients.
        WriteError: the trace could not be written.
        GPTJError: the checkpoint or the batch breaks a rule.
    """
    dtype, backend = dtype_name(dtype), choose_backend(backend)
    require_way(backend, way, gradients=bool(gradients))
    if gradients == "steps" and dtype not in _STEPPED:
        raise InputError("no steps are taken in it", where="dtype", expected=" or ".join(_STEPPED), found=shown(dtype))
    wing = gptj.backend(backend)
    ways: dict[str, dict[str, Any]] = {
        "prepared": {"inference": True}, "int8": {"inference": True, "quantize": "int8"},
        "sdpa": {"attn_implementation": "sdpa"},
    }  # fmt: skip
    if model is None:
        plan_causal_lm(open_checkpoint(directory, weights=weights))
        model = wing.GPTJForCausalLM.from_pretrained(directory, param_dtype=dtype, weights=weights, **ways.get(way, {}))
    seed = (0 if seed is None else seed) if batch is None else seed
    if generate and prompts is None:
        probe = make_probe(model.config, seed=0 if seed is None else seed)
        prompts = (probe.prompt_ids, probe.prompt_mask) if batch is None else _prompts(batch)
    batch = probe_batch(model.config, seed=0 if seed is None else seed) if batch is None else batch
    given = {name: values for name, values in batch.items() if name != "labels"}
    check_call(model.config, np.asarray, **given)
    taps = {name: np.asarray(wing.to_numpy(values)) for name, values in _taps(model, way, given, batch).items()}
    extras: dict[str, NDArray[Any]] = {}
    if gradients:
        _, slopes = model.loss_gradients(**batch)
        extras |= {f"grad.{name}": np.asarray(wing.to_numpy(slope)) for name, slope in slopes.items()}
        for kind in KINDS if gradients == "steps" else ():
            moved = wing.GPTJForCausalLM.from_pretrained(directory, param_dtype=dtype, weights=weights, mmap=False)
            after = take_steps(wing, moved, slopes, kind)
            extras |= {f"step.{kind}.{name}": np.asarray(wing.to_numpy(value)) for name, value in after.items()}
    if generate and prompts is not None:
        extras |= _generate(wing, model, *prompts, generate)
    facts = TraceFacts(
        backend, dtype, model.config, library_versions(backend), way, seed, _threads(),
        weights_sha256(directory, weights=weights), _rotary_sha256(wing, model),
    )  # fmt: skip
    write_trace(path, taps, facts, inputs=batch, extras=extras)
    return facts


_STEPPED = ("float32", "float64")
"""16 bits lose the squares of gradients and the last places of parameters, so that their steps prove nothing."""


def take_steps(wing: ModuleType, model: Any, slopes: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Every parameter after the steps of `gptj.parity.steps`, by the framework's optimizer, which may move the model.

    Args:
        wing: the model's module.
        model: whose parameters are moved; no part of a file's map.
        slopes: the gradient by every parameter, the framework's arrays.
        kind: "sgd" or "adamw".
    """
    take_step = importlib.import_module(f"{wing.__name__}.one_step").take_step
    after: dict[str, Any] = take_step(model, slopes, kind, shares=SHARES[kind], rate=RATE, betas=BETAS,
                                      epsilon=EPSILON, decay=DECAY)  # fmt: skip
    return after


def require_way(backend: str, way: str, *, gradients: bool = False) -> None:
    """Refuse a path of computation that a backend does not have.

    Raises:
        InputError: it cannot; naming what it has.
    """
    if way not in PATHS[backend]:
        raise InputError(f"not a way in which {backend} computes", where="path", expected=" or ".join(PATHS[backend]),
                         found=shown(way))  # fmt: skip
    if gradients and way in ("prepared", "int8", "compiled"):
        ways = " or ".join(name for name in PATHS[backend] if name in ("plain", "sdpa"))
        raise InputError("this path has no gradients", where="path", expected=ways, found=shown(way))


def _taps(model: Any, way: str, given: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """The taps that a way of computing has, the framework's arrays."""
    labels = batch.get("labels")
    if way in ("prepared", "int8"):
        output = model(**batch, output_hidden_states=True, output_attentions=True, use_cache=False)
        return _taps_of_outputs(output, model.config.n_layer)
    if way == "compiled":
        taps: dict[str, Any] = model._compiled_taps(dict(given), labels)
        return taps
    names = None
    if way == "sdpa":
        absent = () if labels is not None else ("loss",)
        every = choose_taps(None, model.config.n_layer, absent=absent)
        names = [name for name in every if split_tap(name)[1] not in _FUSED]
    taps = model.taps(**batch, names=names)
    return taps


def _taps_of_outputs(output: Any, layers: int) -> dict[str, Any]:
    """The taps that a call's outputs are."""
    states = output.hidden_states
    taps = {"embedding": states[0]}
    for block in range(layers):
        taps[f"h.{block}.weights"] = output.attentions[block]
        if block < layers - 1:  # the last state is normed already
            taps[f"h.{block}.sum"] = states[block + 1]
    taps |= {"ln_f": states[-1], "logits": output.logits}
    return taps if output.loss is None else taps | {"loss": output.loss}


def _prompts(batch: Mapping[str, NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a batch, to be continued.

    Raises:
        InputError: one is padded on the right.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", np.ones_like(ids))
    if not mask[:, -1].all():
        raise InputError("cannot be continued", where="attention_mask", expected="padding on the left alone")
    return ids, mask


def _generate(wing: Any, model: Any, ids: NDArray[np.int64], mask: NDArray[np.int64], new: int) -> dict[str, Any]:
    """The greedy texts, and the two largest logits at each step, by the names of a trace."""
    model.generation_config = None  # what a folder sets for its texts says nothing about the weights
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = np.asarray(wing.to_numpy(made.sequences), np.int64)[:, ids.shape[1] :]
    return texts_of(ids, mask, tokens, np.stack([np.asarray(step) for step in made.logits], 1))


def texts_of(
    ids: NDArray[np.int64], mask: NDArray[np.int64], tokens: NDArray[np.int64], logits: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """A trace's tensors of greedy texts.

    Args:
        ids, mask: (p, l), the prompts.
        tokens: (p, n), that were added.
        logits: (p, n, v), that they were chosen by.
    """
    order = np.argsort(-logits, -1, kind="stable")[..., :2]  # the lower id first in a tie, as it is chosen
    top = np.take_along_axis(logits, order, -1).astype(np.float64 if logits.dtype == np.float64 else np.float32)
    return {
        "generated.prompt_ids": ids, "generated.prompt_mask": mask, "generated.token_ids": tokens,
        "generated.top_ids": order.astype(np.int64), "generated.top_logits": top,
    }  # fmt: skip


def _rotary_sha256(wing: Any, model: Any) -> str:
    """The hash of the sines and cosines that the model itself turns its positions by."""
    sin, cos = model._rotation_of(np.arange(model.config.n_positions)[None])
    return table_sha256(np.asarray(wing.to_numpy(sin)), np.asarray(wing.to_numpy(cos)))


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
    """The batch that `gptj parity` asks every backend: rows whole, padded left, right and within, at far positions."""
    return batch_of_probe(make_probe(config, seed=seed))


def batch_of_probe(probe: Probe) -> Batch:
    """A probe's batch, at its far positions, where a rotary table of 16 bits shows."""
    return {
        "input_ids": probe.input_ids, "attention_mask": probe.attention_mask,
        "position_ids": probe.far_position_ids, "labels": probe.labels,
    }  # fmt: skip


def batch_of_prompts(prompts: Sequence[Sequence[int]]) -> Batch:
    """Prompts of token ids as one batch, padded left with 0, with positions that count from each one's first token.

    A label is each token that another comes before: what padding predicts is of no prompt, and differs among programs.

    Raises:
        InputError: there is none, or one is empty.

    >>> batch_of_prompts([[7, 8], [9]])["input_ids"].tolist()
    [[7, 8], [0, 9]]
    """
    if not prompts or not all(prompts):
        raise InputError("no token to trace", where="prompts", expected="at least one, of one token at least")
    t = max(map(len, prompts))
    ids: Any = np.zeros((len(prompts), t), np.int64)
    mask: Any = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, t - len(prompt) :] = prompt
        mask[row, t - len(prompt) :] = 1
    labels = np.full_like(ids, IGNORED_LABEL)
    labels[:, 1:] = np.where(mask[:, :-1] == 1, ids[:, 1:], IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of_mask(mask), "labels": labels}
