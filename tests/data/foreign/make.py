"""Make the files of this folder: one tiny GPT-J in every format that transformers and torch can save it in.

Run with transformers 4.57.6, torch 2.13.0, tensorflow 2.21.0, tf-keras 2.21.0, jax 0.10.2, flax 0.12.8,
h5py 3.14.0 on Python 3.11:

    TF_USE_LEGACY_KERAS=1 python make.py

The values are revealing: kernels N(0, 1/fan_in), every bias and every scale random, so that no tensor can be taken
for another. All axes differ: vocab 40, embed 12, feed-forward 20, heads 3 of 4. Each framework's own class
saves; its parameters are set from the same NumPy arrays, which are kept in expected.npz.
"""

from __future__ import annotations

import collections
import os
import shutil
from pathlib import Path

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SHARD = "8KB"


def values_of(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Revealing values for a state dict, by name."""
    random = np.random.default_rng(20211126)
    values = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        noise = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            noise /= np.sqrt(np.float32(shape[1]))
        values[name] = 1 + 0.3 * noise if "ln_" in name and name.endswith("weight") else noise
    return values


def set_flax(tree: dict, values: dict[str, np.ndarray], prefix: str = "") -> dict:
    """The Flax tree with the same values: kernels transposed."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out[key] = set_flax(value, values, f"{prefix}{key}.")
            continue
        name = prefix + {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(key, key)
        array = values[name].T if key == "kernel" else values[name]
        assert array.shape == value.shape, name
        out[key] = np.ascontiguousarray(array)
    return out


def set_tensorflow(model, values: dict[str, np.ndarray]) -> None:
    """Assign the same values to the Keras variables: kernels transposed."""
    left = set(values)
    for variable in model.weights:
        name = variable.name.split("/", 1)[1].removesuffix(":0").replace("h_._", "h.").replace("/", ".")
        module, _, last = name.rpartition(".")
        name = f"{module}.{ {'kernel': 'weight', 'gamma': 'weight', 'beta': 'bias'}.get(last, last) }"
        variable.assign(values[name].T if last == "kernel" else values[name])
        left.remove(name)
    assert not left, left


def save(model, name: str, **options) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    config = transformers.GPTJConfig(
        vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=3, rotary_dim=2, n_inner=20,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GPTJForCausalLM(config)
    values = values_of(model.state_dict())
    np.savez(HERE / "expected.npz", **values)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()})
    save(model, "pt")
    save(model, "pt_bin", safe_serialization=False)
    save(model, "pt_bin_sharded", safe_serialization=False, max_shard_size=SHARD)
    for dtype in ("bfloat16", "float16"):
        half = transformers.GPTJForCausalLM(config).to(getattr(torch, dtype))
        half.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()})
        save(half, f"pt_bin_{dtype}", safe_serialization=False)
    torch_variants(model)

    flax_model = transformers.FlaxGPTJForCausalLM(config)
    flax_model.params = set_flax(flax_model.params, values)
    save(flax_model, "flax")
    save(flax_model, "flax_sharded", max_shard_size=SHARD)
    save(flax_model, "flax_safetensors", safe_serialization=True)

    for kind, name in (("ForCausalLM", ""), ("ForSequenceClassification", "_classifier"), ("Model", "_base")):
        tf_model = getattr(transformers, f"TFGPTJ{kind}")(config)
        tf_model(np.array([[1, 2, 3]]))
        reference = getattr(transformers, f"GPTJ{kind}")(config)
        prefixed = values_of(reference.state_dict())
        set_tensorflow(tf_model, {f"transformer.{n}" if kind == "Model" else n: v for n, v in prefixed.items()})
        save(tf_model, f"tf{name}", safe_serialization=False)
        np.savez(HERE / f"tf{name}" / "expected.npz", **prefixed)
        if not name:
            save(tf_model, "tf_sharded", safe_serialization=False, max_shard_size=SHARD)
            save(tf_model, "tf_safetensors", safe_serialization=True)


def torch_variants(model) -> None:
    """Single files that torch.save makes of the same state: whatever people have on their disks."""
    folder = HERE / "torch_save"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    state = model.state_dict()
    torch.save(state, folder / "ordered_dict_with_metadata.bin")
    torch.save(dict(state), folder / "protocol_4.bin", pickle_protocol=4)
    torch.save(dict(model.named_parameters()), folder / "parameters.bin")
    torch.save({n: t.T.contiguous().T if t.ndim == 2 else t for n, t in state.items()}, folder / "column_major.bin")
    buffers = collections.OrderedDict(state)
    for layer in range(2):
        buffers[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        buffers[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    torch.save(buffers, folder / "old_buffers.bin")
    flat = torch.cat([t.reshape(-1) for t in state.values()])
    views, start = {}, 0
    for name, tensor in state.items():
        views[name] = flat[start : start + tensor.numel()].reshape(tensor.shape)
        start += tensor.numel()
    torch.save(views, folder / "views_of_one_storage.bin")
    small = {"lm_head.bias": state["lm_head.bias"]}
    torch.save(small, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), folder / "whole_module.bin")
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "torchscript.bin")
    torch.save({"step": 3, "state_dict": small}, folder / "nested.bin")


if __name__ == "__main__":
    main()
