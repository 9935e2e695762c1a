"""The demo: a TPU checkpoint's whole journey, on what the package ships, in the frameworks that are installed.

`original/` is a small checkpoint that mesh-transformer-jax itself trained and wrote (bfloat16, two shards), with
what the original model computed from it on prompts of its own: so the last column of truth is not ours.
"""

from gptj.demo.journey import run_demo

__all__ = ["run_demo"]
