"""What each process does in tests/backends/test_flax_parallel.py; the first one prints JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python parallel_flax.py FOLDER strategy:dp:tp ...
"""

from __future__ import annotations

import json
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from watching import count_reads, refusal_of

import gptj.flax as gptj
from gptj.config.schema import schema
from gptj.flax import parallel
from gptj.flax import processes as talk
from gptj.flax.weights import flat, to_numpy
from gptj.reading import safetensors_file
from gptj.sharding import Mesh, held_by_one

IDS = np.random.default_rng(0).integers(0, 96, (4, 9)).astype(np.int32)


def main(folder: str, saved: str, *meshes: str) -> None:
    processes = parallel.join_processes()
    whole = gptj.GPTJForCausalLM.from_pretrained(folder)
    expected = np.asarray(whole(IDS).logits)
    expected_loss, expected_gradients = gradients(whole, whole.params)
    found = {}
    for words in meshes:
        strategy, dp, tp = words.split(":")
        mesh = Mesh(dp=int(dp), tp=int(tp))
        with count_reads(safetensors_file) as read:
            model = gptj.GPTJForCausalLM.from_pretrained(folder, mesh=mesh, strategy=strategy)
        rows = schema(model.config)
        arrays = flat(model.params)
        facts: dict[str, Any] = {
            "read": sum(read),
            "held": [arrays[row.name].addressable_shards[0].data.size for row in rows],
            "table": [held_by_one(row, strategy, mesh) for row in rows],
            "difference": float(np.abs(to_numpy(model(IDS).logits) - expected).max()),
            "sums": count_sums(model),
            "summed": summed_bytes(model),
        }
        loss, slopes = gradients(model, model.params)
        pairs = zip(jax.tree.leaves(slopes), jax.tree.leaves(expected_gradients), strict=True)
        worst = max(float(np.abs(to_numpy(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs)
        facts |= {"loss": [float(loss), float(expected_loss)], "gradients": worst}
        if strategy in ("tp", "dp"):
            facts["tokens"] = [
                bool(
                    (
                        to_numpy(model.generate(IDS, max_new_tokens=6, **s))
                        == np.asarray(whole.generate(IDS, max_new_tokens=6, **s))
                    ).all()
                )
                for s in ({}, {"do_sample": True, "seed": 3})
            ]
            facts |= adapted(model, whole, Path(saved) / "adapter")
            drawn = to_numpy(model.generate(IDS, max_new_tokens=6, do_sample=True))
            facts["one_draw"] = len(set(talk.gather_texts(str(drawn.tolist())))) == 1
        else:
            facts["restored"] = restore(model, slopes, Path(saved) / words.replace(":", "-"))
        if strategy == "dp":
            facts |= rows_facts(model, whole)
        if processes.size == 1:
            facts["held in a folder's writing"] = held_in_writing(model)
            out = Path(saved) / f"folder {words}"
            model.save_pretrained(out)
            facts["folder"] = (out / "model.safetensors").read_bytes()[-1000:] == Path(
                folder, "model.safetensors"
            ).read_bytes()[-1000:]
        found[words] = facts
    if processes.rank == 0:
        print(json.dumps(found))
    parallel.leave_processes()


def adapted(model: Any, whole: Any, adapter: Path) -> dict[str, Any]:
    for one in (model, whole):
        one.load_adapter(adapter)
    mine, theirs = (to_numpy(one.generate(IDS, max_new_tokens=6)) for one in (model, whole))
    logits, expected = to_numpy(model(IDS).logits), to_numpy(whole(IDS).logits)
    trained = to_numpy(model(IDS, train=True).logits)
    for one in (model, whole):
        one.delete_adapter("default")
    base = to_numpy(whole(IDS).logits)
    differences = {"adapted": logits - expected, "moved": expected - base, "after": to_numpy(model(IDS).logits) - base}
    differences["in training"] = trained - expected
    facts = {name: float(np.abs(array).max()) for name, array in differences.items()}
    return {**facts, "adapted_tokens": bool((mine == theirs).all())}


def rows_facts(model: Any, whole: Any) -> dict[str, Any]:
    """How many rows a device has of a batch of 4, whether scores of 3 texts are the whole model's; what is refused."""
    decoder = model._decoder(4, 16)
    arrays = [model(IDS).logits, decoder.cache.keys[0]]
    model.generate(IDS, max_new_tokens=2, num_beams=2)  # which moves rows about
    pairs = zip(*(m.score(IDS[:3].tolist(), prefix_token_id=None) for m in (model, whole)), strict=True)
    return {
        "rows": [array.addressable_shards[0].data.shape[0] for array in arrays],
        "scores": max(float(np.abs(a.log_likelihoods - b.log_likelihoods).max()) for a, b in pairs),
        "refused": [refusal_of(lambda: model(IDS[:3])), refusal_of(lambda: model.generate(IDS[:3], max_new_tokens=2)),
                    refusal_of(lambda: model(IDS[:1], labels=IDS[:1]))],
    }  # fmt: skip


def held_in_writing(model: Any) -> int:
    """The most of the model's tensors that are whole at a time while its folder is read off; none may stay."""
    alive: set[int] = set()
    most = 0
    for row in schema(model.config):
        array = model._read(row.name)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most = max(most, len(alive))
    kept = [a for a in jax.tree.leaves(model.params) if a._npy_value is not None and len(a.sharding.device_set) > 1]
    return most + len(kept)


def gradients(model: Any, params: Any) -> Any:
    def loss(params: Any) -> Any:
        logits = model.module.apply({"params": params}, IDS).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def count_sums(model: Any) -> dict[str, int]:
    def logits(params: Any, ids: Any) -> Any:
        return model.module.apply({"params": params}, ids).logits

    text = jax.jit(logits).lower(model.params, IDS).compile().as_text()
    operands = [len(one.split(",")) for one in re.findall(r"all-reduce(?:-start)?\(([^)]*)\)", text)]
    return {"most operands": max(operands, default=0)} | {
        name: len(re.findall(rf"[\])}}] {name}(?:-start)?\(", text))
        for name in ("all-reduce", "all-to-all", "collective-permute")
    }


def summed_bytes(model: Any) -> list[list[int]]:
    """The bytes of each buffer of each all-reduce in a forward pass' program."""
    text = jax.jit(model.module.apply).lower({"params": model.params}, IDS).compile().as_text()
    results = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    return [[4 * int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", result)]
            for result in results]  # fmt: skip


def restore(model: Any, slopes: Any, place: Path) -> bool:
    """Whether what orbax wrote on this mesh comes back bit for bit on another."""
    other = (
        Mesh(dp=model.placement.mesh.tp, tp=model.placement.mesh.dp)
        if model.placement.strategy == "tp_fsdp"
        else Mesh(dp=2)
    )
    cut = parallel.choose_placement(other, model.placement.strategy)
    rows = {row.name: row for row in schema(model.config)}
    wanted = {
        name: jax.ShapeDtypeStruct(row.shape, np.float32, sharding=parallel.sharding_of(row, cut))
        for name, row in rows.items()
    }
    arrays = flat(slopes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, arrays)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(place, wanted)
    return all(np.array_equal(to_numpy(back[name]), to_numpy(arrays[name])) for name in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
