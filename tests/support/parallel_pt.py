"""What each process that torchrun starts does in tests/backends/test_pt_parallel.py; the first one prints JSON.

torchrun --standalone --nproc_per_node=2 parallel_pt.py FOLDER CHECKPOINTS strategy:dp:tp ...
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from watching import count_reads

import gptj.pt as gptj
from gptj.errors import WriteError
from gptj.pt import parallel
from gptj.reading import safetensors_file
from gptj.sharding import Mesh, held_by_one

IDS = np.random.default_rng(0).integers(0, 96, (4, 9))


def main(folder: str, checkpoints: str, *meshes: str) -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    processes = parallel.join_processes()
    whole = gptj.GPTJForCausalLM.from_pretrained(folder)
    found = {}
    for words in meshes:
        strategy, dp, tp = words.split(":")
        mesh = Mesh(dp=int(dp), tp=int(tp))
        with count_reads(safetensors_file) as read:
            model = gptj.GPTJForCausalLM.from_pretrained(folder, mesh=mesh, strategy=strategy)
        facts: dict[str, Any] = {"read": sum(read), "held": held_numbers(model), "table": table_numbers(model)}
        if strategy == "tp":
            facts |= compute(model, whole) | adapted(model, whole, Path(checkpoints) / "adapter")
        else:
            facts |= train(model, whole, Path(checkpoints), words)
            facts["loaded"] = (
                {}
                if strategy == "dp"
                else {place.name: load(model, place) for place in sorted(Path(checkpoints).glob("step *"))}
            )
        found[words] = facts
    if processes.rank == 0:
        print(json.dumps(found))
    parallel.leave_processes()


def load(model: Any, place: Path) -> str:
    """The digest of a checkpoint, read over a model whose values are gone."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert parallel.load_training(place, model, optimizer) == 1
    return digest(model, optimizer)


def held_numbers(model: Any) -> list[int]:
    return [(p.to_local() if isinstance(p, DTensor) else p).numel() for _, p in parallel.named_parts(model)]


def table_numbers(model: Any) -> list[int]:
    placement = model.placement
    return [held_by_one(spec, placement.strategy, placement.mesh) for spec, _ in parallel.named_parts(model)]


def compute(model: Any, whole: Any) -> dict[str, Any]:
    with CommDebugMode() as counted, torch.inference_mode():
        logits = model(IDS).logits
    reduced = sum(n for op, n in counted.get_comm_counts().items() if "reduce" in str(op))
    same = []
    for settings in ({}, {"do_sample": True, "seed": 3}):
        mine, theirs = (m.generate(IDS, max_new_tokens=8, **settings) for m in (model, whole))
        same.append(bool((mine == theirs).all()))
    drawn = model.generate(IDS, max_new_tokens=8, do_sample=True)
    others = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(others, drawn)
    attentions = model(IDS, output_attentions=True, head_mask=np.linspace(0, 1, 4)).attentions[0]
    expected = whole(IDS, output_attentions=True, head_mask=np.linspace(0, 1, 4)).attentions[0]
    return {
        "difference": float((logits - whole(IDS).logits).abs().max()),
        "all_reduces": reduced,
        "tokens": same,
        "one_draw": all(torch.equal(other, drawn) for other in others),
        "attentions": float((attentions - expected).abs().max()),
    }


def adapted(model: Any, whole: Any, adapter: Path) -> dict[str, Any]:
    for one in (model, whole):
        one.load_adapter(adapter)
    mine, theirs = (one.generate(IDS, max_new_tokens=8) for one in (model, whole))
    logits, expected = model(IDS).logits, whole(IDS).logits
    for one in (model, whole):
        one.delete_adapter("default")
    base = whole(IDS).logits
    return {
        "adapted": float((logits - expected).abs().max()),
        "moved": float((expected - base).abs().max()),
        "adapted_tokens": bool((mine == theirs).all()),
        "after": float((model(IDS).logits - base).abs().max()),
    }


def train(model: Any, whole: Any, checkpoints: Path, words: str) -> dict[str, Any]:
    for module in (*model.modules(), *whole.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    whole.zero_grad()
    placement = model.placement
    rows = np.split(IDS, placement.mesh.dp)[placement.coordinates["dp"]]
    joined, real = [], dist.all_gather  # by which logits are joined; FSDP2 gathers weights by another
    dist.all_gather = lambda *words, **named: (joined.append(1), real(*words, **named))[1]
    output = model(rows, labels=rows)
    dist.all_gather = real
    no_logits = output.logits is None
    loss, expected = output.loss, whole(IDS, labels=IDS).loss
    (loss * 1.0).backward()
    expected.backward()
    norm = parallel.clip_grad_norm_(model, 1.0)
    expected_norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
    worst = 0.0
    for spec, parameter in parallel.named_parts(model):
        gradient = parallel.whole(parameter.grad, spec, placement)
        theirs = whole.get_parameter(spec.name).grad
        worst = max(worst, float((gradient - theirs).abs().max() / theirs.abs().max()))
    total = loss.detach().clone()
    dist.all_reduce(total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    if placement.strategy == "dp":
        return {"loss": [float(total) / dist.get_world_size(), float(expected.detach())],
                "norm": [float(norm), float(expected_norm)], "gradients": worst}  # fmt: skip
    parallel.save_training(checkpoints / f"step {words.replace(':', ' ')}", model, optimizer, step=1)
    saved = checkpoints / f"saved {words.replace(':', ' ')}"
    held = count_held(model)
    model.save_pretrained(saved, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    refused = False
    try:  # what keeps the first from writing keeps nobody waiting
        model.save_pretrained(saved)
    except WriteError:
        refused = True
    dist.barrier()
    return {
        "loss": [float(total) / dist.get_world_size(), float(expected.detach())],
        "norm": [float(norm), float(expected_norm)],
        "gradients": worst,
        "saved": digest(model, optimizer),
        "refused": refused,
        "whole at a time": held[0],
        "no_logits": no_logits,
        "logits_gathered": len(joined),
        "loss_in_float64": vocabulary_loss(placement),
    }


def count_held(model: Any) -> list[int]:
    """The most whole tensors that there are at a time while the model's folder is written, once it is."""
    alive: set[int] = set()
    most, real = [0], type(model)._read

    def read(self: Any, name: str) -> Any:
        array = real(self, name)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most[0] = max(most[0], len(alive))
        return array

    model._read = types.MethodType(read, model)
    return most


def vocabulary_loss(placement: Any) -> float:
    """The largest difference, loss or gradient, of the loss over parts of a vocabulary from the whole one, float64."""
    peers = parallel.peers_of(placement)
    made = np.random.default_rng(4)
    x = torch.tensor(made.normal(size=(6, 8)) * 9, requires_grad=True)
    weight = torch.tensor(made.normal(size=(12, 8)))
    labels = torch.tensor([0, 11, -100, 5, 6, 3])
    head = parallel.ParallelHead(parallel.Linear(8, 12 // peers.size, fused=False), peers).double()
    with torch.no_grad():
        head.weight.copy_(weight.chunk(peers.size)[peers.rank])
        head.bias.zero_()
    loss = head.loss(x, labels)
    (slope,) = torch.autograd.grad(loss, x)
    expected = torch.nn.functional.cross_entropy(x @ weight.T, labels)
    (wanted,) = torch.autograd.grad(expected, x)
    return max(float((loss - expected).detach().abs()), float((slope - wanted).abs().max()))


def digest(model: Any, optimizer: Any) -> str:
    """Of all parameters and moments, whole."""
    made = hashlib.sha256()
    for spec, parameter in parallel.named_parts(model):
        made.update(parallel.whole(parameter, spec, model.placement).detach().numpy().tobytes())
        for _, kept in sorted(optimizer.state[parameter].items()):
            if kept.dim():
                made.update(parallel.whole(kept, spec, model.placement).numpy().tobytes())
    return made.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
