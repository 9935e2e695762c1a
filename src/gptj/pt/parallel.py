"""A PyTorch model on several processes: each holds its part of every tensor, as `gptj.sharding` cuts it.

Along `tp` heads, feed-forward and vocabulary are plain local tensors, and each block sums what its attention and its
feed-forward made of them in one all-reduce, as Megatron-LM does (Shoeybi et al. 2019, arXiv:1909.08053). Along `dp`,
where the strategy says so, torch's FSDP2 (`fully_shard`) keeps a part of what is left and gathers a block at a time.
A forward pass of n blocks makes n + 1 all-reduces: the embedding's and one a block; so does a backward pass.

DTensor keeps what must know its place in the whole, parameters under FSDP2 and checkpoints; what computes does not,
since eager DTensors cost several times a decoded token's time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from gptj.config.labels import IGNORED_LABEL
from gptj.config.schema import TensorSpec, schema
from gptj.errors import InputError, MissingFileError, SchemaError, WriteError, shown
from gptj.pt.crossing import CopyToPeers, JoinedColumns, LossOfColumns, Peers, SumOfPeers
from gptj.pt.kernels import Linear
from gptj.pt.layers import at_least_float32
from gptj.pt.processes import gather_texts
from gptj.pt.processes import join_processes as join_processes
from gptj.pt.processes import leave_processes as leave_processes
from gptj.sharding import (
    Mesh,
    MeshAxis,
    Placement,
    Strategy,
    choose_mesh,
    partition_of,
)

TRAINING = frozenset({"fsdp", "tp_fsdp"})
"""Strategies under which FSDP2 holds the parameters."""


# ---- the parts of the model


class ParallelEmbedding(nn.Module):
    """A part of the vocabulary's rows: tokens of the other parts come from the other processes."""

    def __init__(self, weight: Tensor, peers: Peers) -> None:
        super().__init__()
        self.weight, self.peers = nn.Parameter(weight, requires_grad=False), peers

    def forward(self, token_ids: Tensor) -> Tensor:
        """The embeddings (b, t, m) of every token (b, t)."""
        rows = self.weight.shape[0]
        places = token_ids - self.peers.rank * rows
        held = (places >= 0) & (places < rows)
        x = F.embedding(torch.where(held, places, 0), self.weight) * held[..., None].to(self.weight.dtype)
        return SumOfPeers.apply(x, self.peers.group)


class ParallelBlock(nn.Module):
    """A block's own parts, with this process' heads and feed-forward columns, and one sum over all processes."""

    def __init__(self, block: Any, peers: Peers) -> None:
        super().__init__()
        self.ln_1, self.attn, self.mlp, self.peers = block.ln_1, block.attn, block.mlp, peers
        self.attn.n_head //= peers.size

    def forward(self, x: Tensor, *attention_arguments: Any, taps: Any = None) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (b, t, m), and the attention weights of all heads or None."""
        rotation, mask, update_cache, head_mask, output_attentions = attention_arguments
        peers, heads, mlp = self.peers, self.attn.n_head, self.mlp
        if head_mask is not None:
            head_mask = head_mask[peers.rank * heads : (peers.rank + 1) * heads]
        h = CopyToPeers.apply(self.ln_1(x), peers.group)
        attended, weights = self.attn(h, rotation, mask, update_cache, head_mask, output_attentions)
        inner = mlp.activation(mlp.fc_in(h))
        fed = F.linear(inner, mlp.fc_out.weight)
        partial = attended + (fed if mlp.fc_out.lora is None else mlp.fc_out.lora(inner, fed))
        x = mlp.resid_dropout(SumOfPeers.apply(partial, peers.group) + mlp.fc_out.bias) + x
        if weights is not None:
            weights = JoinedColumns.apply(weights.movedim(1, -1), peers).movedim(-1, 1)
        return x, weights


class ParallelHead(Linear):
    """A part of the vocabulary's logits, joined with those of the other processes."""

    def __init__(self, head: Linear, peers: Peers) -> None:
        super().__init__(head.in_features, head.out_features, fused=head.fused)
        self.peers = peers

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) to (..., v)."""
        return JoinedColumns.apply(self._own(x), self.peers)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy of the labels (n,) that count, after x (n, m): no process sees other logits."""
        total = LossOfColumns.apply(at_least_float32(self._own(x)), labels, self.peers).sum()
        return total / (labels != IGNORED_LABEL).sum().clamp(min=1)

    def _own(self, x: Tensor) -> Tensor:
        return super().forward(CopyToPeers.apply(x, self.peers.group))


# ---- placing


def choose_placement(mesh: Any, strategy: Strategy) -> Placement:
    """This process' place among those of torch.distributed.

    Args:
        mesh: a `Mesh`, a DeviceMesh whose axes are called dp and tp, or None: all processes along one axis.

    Raises:
        InputError: the processes know nothing of each other, or the mesh is not of their number.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "the processes know nothing of each other",
            where="mesh",
            hint="Start them with torchrun, and call torch.distributed.init_process_group() first",
        )
    if isinstance(mesh, DeviceMesh):
        return _placement_of(mesh, strategy)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            "no mesh", where="mesh", expected="a gptj.sharding.Mesh or a DeviceMesh", found=shown(type(mesh).__name__)
        )
    sizes = choose_mesh(mesh, strategy, dist.get_world_size(), processes=dist.get_world_size())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return _placement_of(init_device_mesh(kind, (sizes.dp, sizes.tp), mesh_dim_names=("dp", "tp")), strategy)


def _placement_of(mesh: DeviceMesh, strategy: Strategy) -> Placement:
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= {"dp", "tp"}:
        raise InputError("its axes have other names", where="mesh", expected="dp, tp", found=shown(names))
    if names != ("dp", "tp"):  # one axis of the two: the other has one device
        sizes = Mesh(**{name: mesh.size(n) for n, name in enumerate(names)})
        devices = mesh.mesh.T if names == ("tp", "dp") else mesh.mesh
        mesh = DeviceMesh(mesh.device_type, devices.reshape(sizes.dp, sizes.tp), mesh_dim_names=("dp", "tp"))
    sizes = Mesh(dp=mesh.size(0), tp=mesh.size(1))
    place = mesh.get_coordinate()
    if place is None:
        raise InputError("this process is not in it", where="mesh", expected="every process of the group")
    return Placement(strategy, sizes, {"dp": place[0], "tp": place[1]}, mesh)


def peers_of(placement: Placement) -> Peers:
    """The processes that share this one's rows of the batch."""
    return Peers(placement.native.get_group("tp"), placement.coordinates["tp"], placement.mesh.tp)


def placements_of(spec: TensorSpec, placement: Placement) -> tuple[TorchPlacement, TorchPlacement]:
    """DTensor's placements along dp and tp of the tensor, as the table says."""
    cuts = partition_of(spec, placement.strategy)
    axis = {name: next((n for n, cut in enumerate(cuts) if name in cut), None) for name in ("dp", "tp")}
    tp = Replicate() if axis["tp"] is None else Shard(axis["tp"])
    if axis["dp"] is None:
        return Replicate(), tp
    if axis["dp"] == axis["tp"]:  # tp cuts first, dp cuts what is left
        return _StridedShard(axis["dp"], split_factor=placement.mesh.tp), tp
    return Shard(axis["dp"]), tp


def distribute(model: Any, parts: Iterable[tuple[TensorSpec, Tensor]], placement: Placement) -> None:
    """Make a model without values this process' part of it, of which `parts` are the values, a row at a time."""
    base, peers = model.base_model, peers_of(placement)
    if peers.size > 1:
        with torch.device("meta"):
            base.wte = ParallelEmbedding(base.wte.weight, peers)
            base.h = nn.ModuleList(ParallelBlock(block, peers) for block in base.h)
            if model.head == "causal_lm":
                model.lm_head = ParallelHead(model.lm_head, peers)
    trains = placement.strategy in TRAINING
    device = device_of(placement)
    rows = {spec.name: spec for spec in schema(model.config, model.head)}
    if not trains:
        _assign_local(model, parts, device)
        model.requires_grad_(False)
        if placement.strategy == "dp":
            learn_all(model, placement)
        return
    parts = iter(parts)
    first = next(parts)
    _assign_shapes(model, rows, placement, first[1].dtype)
    mesh = placement.native["dp"]
    dims = {
        parameter: next(n for n, cut in enumerate(partition_of(rows[name], placement.strategy)) if "dp" in cut)
        for name, parameter in model.named_parameters()
    }
    for module in (*base.h, model):
        fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: Shard(dims[parameter]))
    model.to_empty(device=device)
    with torch.no_grad():
        for spec, tensor in itertools.chain([first], parts):
            model.get_parameter(spec.name).to_local().copy_(tensor)
    model.base_model._place_rotary()


def learn_all(model: Any, placement: Placement) -> None:
    """Give every parameter a gradient, which is the mean of the copies' as soon as it is there."""
    if next(model.parameters()).requires_grad:  # FSDP's are so, and what it has been done to
        return
    model.requires_grad_(True)
    group, count = placement.native.get_group("dp"), placement.mesh.dp

    def average(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(count)

    for parameter in model.parameters() if count > 1 else ():
        parameter.register_post_accumulate_grad_hook(average)


def device_of(placement: Placement) -> torch.device:
    """This process' device of the mesh."""
    kind = placement.native.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _assign_local(model: Any, parts: Iterable[tuple[TensorSpec, Tensor]], device: torch.device) -> None:
    for spec, tensor in parts:
        owner, _, leaf = spec.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device)))
    model.tie_weights()
    model.base_model._place_rotary()


def _assign_shapes(model: Any, rows: Mapping[str, TensorSpec], placement: Placement, dtype: torch.dtype) -> None:
    """Give every parameter the shape that this process' share along tp alone has."""
    whole_rows: dict[MeshAxis, int] = {"tp": placement.coordinates["tp"], "dp": 0}
    along_tp = Placement("tp" if placement.strategy == "tp_fsdp" else "dp", placement.mesh, whole_rows)
    for name, spec in rows.items():
        shape = tuple(part.stop - part.start for part in along_tp.slices(spec))
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    model.tie_weights()


# ---- what a training loop needs besides


def whole(tensor: Tensor, spec: TensorSpec, placement: Placement) -> Tensor:
    """The whole of a tensor of which this process has a part; every process calls it, for the same tensor."""
    cut = as_dtensor(tensor, spec, placement)
    along_dp, along_tp = cut.placements
    if isinstance(along_dp, _StridedShard):  # one axis twice, which torch would warn of: the inner cut first
        inner = DTensor.from_local(cut.to_local(), placement.native["dp"], [Shard(along_dp.dim)], run_check=False)
        outer = DTensor.from_local(inner.full_tensor(), placement.native["tp"], [along_tp], run_check=False)
        return outer.full_tensor()
    return cut.full_tensor()


def as_dtensor(tensor: Tensor, spec: TensorSpec, placement: Placement) -> DTensor:
    """This process' part as a DTensor on the whole mesh, which torch.distributed.checkpoint cuts anew for another one.

    Args:
        tensor: a parameter, or what an optimizer keeps of one.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    shape = torch.Size(spec.shape)
    stride = tuple(int(n) for n in np.cumprod((1, *spec.shape[:0:-1]))[::-1])
    return DTensor.from_local(
        local.detach(), placement.native, placements_of(spec, placement), run_check=False, shape=shape, stride=stride
    )


def cut_again(model: Any) -> None:
    """Let go of what FSDP2 holds whole after a call without a gradient: it would be taken for this process' part."""
    if isinstance(model, FSDPModule):
        model.reshard()


def named_parts(model: Any) -> Iterator[tuple[TensorSpec, nn.Parameter]]:
    """Each row of the schema with this process' part of its parameter."""
    cut_again(model)
    for spec in schema(model.config, model.head):
        yield spec, model.get_parameter(spec.name)


def clip_grad_norm_(model: Any, max_norm: float) -> Tensor:
    """Scale the gradients so that the norm of all of them, over all processes, is at most `max_norm`.

    torch's own function knows one mesh alone. Returns the norm before, the same in every process.
    """
    norm = gradient_norm(model)
    scale = float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    for grad in local_gradients(model):
        grad.mul_(scale)
    return norm


def local_gradients(model: Any) -> list[Tensor]:
    """This process' part of each gradient that there is."""
    grads = (parameter.grad for _, parameter in named_parts(model))
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads if grad is not None]


def gradient_norm(model: Any) -> Tensor:
    """The norm of the whole gradient, over all processes; a scalar in float64, the same in every one."""
    placement: Placement = model.placement
    total = torch.zeros((), dtype=torch.float64)
    for spec, parameter in named_parts(model):
        cut = {axis for axes in partition_of(spec, placement.strategy) for axis in axes}
        first = all(axis in cut or placement.coordinates[axis] == 0 for axis in ("dp", "tp"))
        if first and parameter.grad is not None:  # what several processes hold alike counts once
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            total = total + grad.double().square().sum().cpu()
    total = total.to(device_of(placement))
    for axis in ("dp", "tp"):
        dist.all_reduce(total, group=placement.native.get_group(axis))
    return total.sqrt()


# ---- copies


def copy_of(model: Any) -> tuple[int, int]:
    """This process' number among the copies of the model, and how many there are: each may read other rows."""
    return model.placement.coordinates["dp"], model.placement.mesh.dp


def mesh_of_copy(mesh: Mesh, strategy: Strategy) -> Any:
    """The mesh that the processes of one command open a model on."""
    return mesh


# ---- checkpoints of a training run


def save_training(directory: str | os.PathLike[str], model: Any, optimizer: Any, *, step: int) -> None:
    """Write parameters and optimizer with torch.distributed.checkpoint, each process its own parts.

    It appears whole or not at all: it is written beside its place, and put there when every process is done.

    Raises:
        WriteError: there is one, or the processes do not share the folder.
    """
    place = Path(directory)
    if place.exists():
        raise WriteError("is there already", file=place, hint="Name each step's checkpoint anew")
    partial = place.with_name(f"{place.name}.partial")
    checkpoint.save(training_state(model, optimizer, {"step": step}), checkpoint_id=partial)
    dist.barrier()
    missing = ""
    if dist.get_rank() == 0:
        written = checkpoint.FileSystemReader(partial).read_metadata().storage_data or {}
        names = sorted({part.relative_path for part in written.values()})
        missing = next((name for name in names if not (partial / name).is_file()), "")
        if not missing:
            partial.rename(place)
    missing = gather_texts(missing)[0]
    if missing:
        raise WriteError(
            "another process wrote its part into a folder of its own", file=partial, where=missing,
            expected="a folder that all processes share", hint="Save on a file system that every host has",
        )  # fmt: skip


def load_training(directory: str | os.PathLike[str], model: Any, optimizer: Any) -> int:
    """Read what `save_training` wrote, on whatever mesh, in place; returns the step.

    Raises:
        MissingFileError: there is no such checkpoint.
        SchemaError: it is another model's.
    """
    place = Path(directory)
    if not (place / ".metadata").is_file():
        raise MissingFileError("no checkpoint of a training run", file=place, hint="A .partial one was not finished")
    stored = checkpoint.FileSystemReader(place).read_metadata().state_dict_metadata
    for spec, parameter in named_parts(model):
        found = stored.get(f"model.{spec.name}")
        if found is None or tuple(found.size) != spec.shape:
            shape = None if found is None else tuple(found.size)
            raise SchemaError("another model's", file=place, where=spec.name, expected=spec.shape, found=shape)
        held = optimizer.state[parameter]
        prefix = f"optimizer.{spec.name}."
        for name in (key.removeprefix(prefix) for key in stored if key.startswith(prefix)):
            if name not in held:
                whole_one = tuple(stored[prefix + name].size) == spec.shape
                held[name] = torch.zeros_like(parameter) if whole_one else torch.zeros(())
    state = training_state(model, optimizer, {"step": 0})
    checkpoint.load(state, checkpoint_id=place)
    return int(state["step"])


def training_state(model: Any, optimizer: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters and what the optimizer keeps of each, by names, as DTensors that share their memory."""
    state: dict[str, Any] = dict(facts)
    for spec, parameter in named_parts(model):
        state[f"model.{spec.name}"] = as_dtensor(parameter, spec, model.placement)
        for name, kept in optimizer.state.get(parameter, {}).items():
            key = f"optimizer.{spec.name}.{name}"
            state[key] = kept if kept.dim() == 0 else as_dtensor(kept, spec, model.placement)
    return state
