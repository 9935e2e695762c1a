"""What each process that torchrun starts does in tests/backends/test_pt_traffic.py; the first one prints JSON.

torchrun --standalone --nproc_per_node=2 traffic_pt.py FOLDER STEP CONFIG training:strategy:dp:tp:dtype:recompute ...
"""

from __future__ import annotations

import collections
import json
import sys
import warnings
from typing import Any

import numpy as np
import torch
from gptj_conversion.mesh.reader import open_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from watching import count_reads

import gptj.pt as gptj
from gptj.config.schema import schema
from gptj.pretrained import cut_model
from gptj.pt import parallel
from gptj.reading import npz
from gptj.sharding import Mesh

KINDS = {"allreduce_": ("all-reduce", 0), "_allgather_base_": ("all-gather", 0), "allgather_": ("all-gather", 0),
         "_reduce_scatter_base_": ("reduce-scatter", 1), "allgather_into_tensor_coalesced_": ("all-gather", 0),
         "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1)}  # fmt: skip


class CountedBytes(TorchDispatchMode):
    """Counts what the collectives are handed: for each kind, how many and how many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, rest = func.name().partition("::")
        if space == "c10d":
            kind, place = KINDS[rest.partition(".")[0]]
            self.found[kind][0] += 1
            self.found[kind][1] += count_bytes(args[place])
        return func(*args, **(kwargs or {}))


def count_bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(count_bytes, tensors))


def main(folder: str, step: str, config: str, *cases: str) -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    processes = parallel.join_processes()
    found: dict[str, Any] = {}
    for words in cases:
        training, strategy, dp, tp, dtype, recompute = words.split(":")
        mesh = Mesh(dp=int(dp), tp=int(tp))
        model = gptj.GPTJForCausalLM.from_pretrained(folder, mesh=mesh, strategy=strategy, dtype=dtype)
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
        ids = np.arange(2 * 8).reshape(2, 8) % model.config.vocab_size
        with CountedBytes() as counted:
            if training == "training":
                model.train()
                if recompute == "recompute":
                    model.gradient_checkpointing_enable()
                model(ids, labels=ids).loss.backward()
            else:
                with torch.inference_mode():
                    model(ids)
        found[words] = counted.found
    if processes.size == 4:
        for strategy, dp, tp in (("fsdp", 4, 1), ("tp_fsdp", 2, 2)):
            found[f"odd {strategy}"] = train(f"{folder}-odd", strategy, Mesh(dp=dp, tp=tp))
    if processes.size == 2:
        found["tpu"] = open_tpu_checkpoint(step, config)
    if processes.rank == 0:
        print(json.dumps(found))
    parallel.leave_processes()


def train(folder: str, strategy: str, mesh: Mesh) -> list[float]:
    """The norm of the gradient of four rows, over the processes and in one."""
    model = gptj.GPTJForCausalLM.from_pretrained(folder, mesh=mesh, strategy=strategy)
    whole = gptj.GPTJForCausalLM.from_pretrained(folder)
    ids = np.arange(4 * 8).reshape(4, 8)
    rows = np.split(ids, mesh.dp)[model.placement.coordinates["dp"]]
    model.train()(rows, labels=rows).loss.backward()
    whole.train()(ids, labels=ids).loss.backward()
    norm = parallel.clip_grad_norm_(model, 1e9)
    return [float(norm), float(torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()]))]


def open_tpu_checkpoint(step: str, config: str) -> dict[str, Any]:
    """The logits of a TPU checkpoint that is opened in parts, and the bytes that this took."""
    source = open_mesh(step, config=config)
    with count_reads(npz) as read:
        model = cut_model(gptj.GPTJForCausalLM, source.config, source.read_part, strategy="tp")
    whole = gptj.GPTJForCausalLM(source.config)
    whole._assign((row, source.read(row)) for row in schema(source.config))
    ids = np.arange(6).reshape(2, 3)
    with torch.inference_mode():
        difference = float((model(ids).logits - whole.eval()(ids).logits).abs().max())
    tokens = [m.generate(ids, max_new_tokens=4).tolist() for m in (model, whole)]
    return {"read": sum(read), "difference": difference, "tokens": tokens[0] == tokens[1]}


if __name__ == "__main__":
    main(*sys.argv[1:])
