"""The data that every backend shares: what a GPT-J's tensors are, start from, and are turned by.

schema, TensorSpec, HEADS        every tensor: its name, axes, shape and kind       tensors.py
initial_tensor                   the values that a fresh model starts from          initial.py
rotary_table, rotate_pairs       the sines and cosines of positions                 rotary.py
"""

from gptj.schema.tensors import (
    BASE_PREFIX,
    HEADS,
    SPLIT_AXES,
    Head,
    TensorSpec,
    axis_sizes,
    is_old_buffer,
    schema,
    schema_by_name,
)

__all__ = [
    "BASE_PREFIX",
    "HEADS",
    "SPLIT_AXES",
    "Head",
    "TensorSpec",
    "axis_sizes",
    "is_old_buffer",
    "schema",
    "schema_by_name",
]
