"""A checkpoint: a directory of config.json and safetensors, and the doors through which it is read and written.

    open_checkpoint    names, shapes, dtypes and places of what a directory holds; no data is read
    plan_load          which stored tensor goes to which row of a model, or one error that lists all that is wrong
    write_checkpoint   the one way to write one; the directory appears whole or not at all
    verify_checkpoint  reads everything and compares it with the hashes in manifest.json

The directory is transformers': what is written here opens there unchanged, and the other way round.
"""

from __future__ import annotations

from gptj.reading.folder import Checkpoint, open_checkpoint, verify_checkpoint
from gptj.reading.load_plan import LoadPlan, Mismatch, plan_load
from gptj.reading.manifest import Manifest
from gptj.reading.safetensors_file import StoredTensor
from gptj.writing.checkpoint_writer import write_checkpoint

__all__ = [
    "Checkpoint",
    "LoadPlan",
    "Manifest",
    "Mismatch",
    "StoredTensor",
    "open_checkpoint",
    "plan_load",
    "verify_checkpoint",
    "write_checkpoint",
]
