"""Open in transformers' own TensorFlow and Flax classes what gptj writes for them: nothing missing, every bit equal.

Run where make.py runs, with gptj installed beside:

    TF_USE_LEGACY_KERAS=1 python check.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="")

import flax
import numpy as np
import transformers
from gptj_conversion.convert import convert

HERE = Path(__file__).parent
CLASSES = {"pt": "ForCausalLM", "tf_base": "Model", "tf_classifier": "ForSequenceClassification"}
NAMES = {"kernel": "weight", "gamma": "weight", "scale": "weight", "embedding": "weight", "beta": "bias"}


def canonical(name: str, values: np.ndarray, base: bool) -> tuple[str, np.ndarray]:
    """A foreign variable under its canonical name, in the canonical layout."""
    module, _, last = name.rpartition(".")
    module = module.removeprefix("transformer.") if base else module
    return f"{module}.{NAMES.get(last, last)}", values.T if last == "kernel" else values


def from_tensorflow(folder: Path, kind: str) -> dict[str, np.ndarray]:
    model, info = getattr(transformers, f"TFGPTJ{kind}").from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    names = {
        v.name.split("/", 1)[1].removesuffix(":0").replace("h_._", "h.").replace("/", "."): v for v in model.weights
    }
    return dict(canonical(name, variable.numpy(), kind == "Model") for name, variable in names.items())


def from_flax(folder: Path, kind: str) -> dict[str, np.ndarray]:
    model = getattr(transformers, f"FlaxGPTJ{kind}").from_pretrained(folder)
    flat = flax.traverse_util.flatten_dict(model.params, sep=".")
    return dict(canonical(name, np.asarray(values), False) for name, values in flat.items())


def main() -> int:
    """Print a line a case; 1 if any differs."""
    wrong = 0
    for source, kind in CLASSES.items():
        own = HERE / source / "expected.npz"
        with np.load(own if own.exists() else HERE / "expected.npz") as arrays:
            expected = {name: arrays[name] for name in arrays.files}
        for to, load in (("tf", from_tensorflow), ("flax", from_flax)):
            if to == "flax" and source == "tf_classifier":
                continue  # transformers has no such class
            for limit in (10**9, 5000):
                with tempfile.TemporaryDirectory() as folder:
                    target = Path(folder) / "out"
                    convert(HERE / source, target, to=to, max_shard_bytes=limit)
                    found = load(target, kind)
                same = found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)
                print(f"{source} -> {to}, {'one file' if limit > 5000 else 'shards'}: {'equal' if same else 'DIFFERS'}")
                wrong += not same
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
