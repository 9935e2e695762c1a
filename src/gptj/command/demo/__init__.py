"""The demo: a TPU checkpoint's whole journey, on what the package ships, in the frameworks that are installed.

* `shakespeare/` is a GPT-J that `examples/train_shakespeare.py` trained and wrote as a TPU checkpoint (bfloat16, eight
  shards) with its tokenizer: small, but it writes verse.
* `original/` is a smaller checkpoint that mesh-transformer-jax itself trained and wrote (bfloat16, two shards), with
  what the original model computed from it on prompts of its own: so the last column of truth is not ours.
"""

from gptj.command.demo.journey import run_demo

__all__ = ["run_demo"]
