"""Record the traces of this folder: run a program of docs/recording.md where transformers 4.57.6 is installed.

    python make.py ask FOLDER                          # with gptj: the model, and what it is asked
    python make.py "transformers in PyTorch" FOLDER    # with transformers: FOLDER/theirs.safetensors
    python make.py save-tf FOLDER                      # with tf-keras: the model as TensorFlow saves it
    python make.py "transformers in TensorFlow" FOLDER
    python make.py save-flax FOLDER
    python make.py "transformers in Flax" FOLDER

Only the first needs gptj and tests/support on the path; what is asked is the tests' `small_batch`.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "recording.md"


def program(heading: str) -> str:
    """The Python below a heading of the page."""
    _, found, rest = PAGE.read_text().partition(f"## {heading}\n")
    assert found, heading
    match = re.search(r"```python\n(.*?)```", rest.split("\n## ")[0], re.DOTALL)
    assert match is not None, heading
    return match[1]


def ask(folder: Path) -> None:
    """Write the model and the oracle's trace of it."""
    from recorded import small_batch, write_sample

    from gptj.checkpoint import write_checkpoint
    from gptj.parity.revealing import revealing_config, revealing_fill

    config = revealing_config(n_layer=2)
    write_checkpoint(folder / "model", config, revealing_fill(), overwrite=True)
    write_sample(folder / "base.safetensors", config, batch=small_batch(config))


def save_tf(folder: Path) -> None:
    """Save the model's weights with TensorFlow; FOLDER/model holds tf_model.h5 alone from then on.

    transformers 4.57.6 cannot read a PyTorch model's safetensors file there: "'safe_open' object is not iterable".
    """
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import numpy as np
    from safetensors.numpy import load_file
    from transformers import GPTJConfig, TFGPTJForCausalLM

    model = TFGPTJForCausalLM(GPTJConfig.from_pretrained(folder / "model"))
    model(np.zeros((1, 2), np.int32))
    weights = load_file(folder / "model" / "model.safetensors")
    for variable in model.weights:
        *path, kind = variable.name.removesuffix(":0").split("/")[1:]
        kind = {"kernel": "weight", "gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias",
                "embeddings": "weight"}[kind]  # fmt: skip
        value = weights[".".join([*path, kind]).replace("h_._", "h.")]
        variable.assign(value.T if variable.name.endswith("kernel:0") else value)
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model", safe_serialization=False)


def save_flax(folder: Path) -> None:
    """Save the model's weights with Flax; FOLDER/model holds flax_model.msgpack alone from then on."""
    from flax.traverse_util import unflatten_dict
    from safetensors.numpy import load_file
    from transformers import FlaxGPTJForCausalLM, GPTJConfig

    model = FlaxGPTJForCausalLM(GPTJConfig.from_pretrained(folder / "model"))
    tree = {}
    for name, value in load_file(folder / "model" / "model.safetensors").items():
        *path, kind = name.split(".")
        is_norm = path[-1].startswith("ln_")
        kind = kind if kind == "bias" else "embedding" if path[-1] == "wte" else "scale" if is_norm else "kernel"
        tree[(*path, kind)] = value.T if kind == "kernel" else value
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model", params=unflatten_dict(tree))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    steps = {"ask": ask, "save-tf": save_tf, "save-flax": save_flax}
    if what in steps:
        steps[what](folder)
    else:
        os.chdir(folder)
        exec(program(what), {})
