"""LoRA adapters for the revealing model, as PEFT writes them, every mistake of whose reading shows in the logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptj import GPTJConfig
from gptj.adapters import AdapterConfig, adapter_rows, write_adapter
from gptj.parity.revealing import revealing_config
from gptj.reading.safetensors_file import pack_header

EVERY = ("k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out")
"""All matrices of a block."""

KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 3, "lora_alpha": 5, "target_modules": EVERY},
    "default": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["out_proj", "fc_in"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "fc_in", "fc_out"],
        "rank_pattern": {"fc_in": 5, r"h\.1\.attn\.q_proj": 1},
        "alpha_pattern": {"fc_out": 9},
    },
    "some blocks": {"r": 2, "target_modules": ["q_proj", "fc_out"], "layers_to_transform": [0, 2]},
    "a regular expression": {"r": 2, "target_modules": r".*\.h\.[12]\.(attn\.v_proj|mlp\.fc_in)"},
    "all but": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["fc_in", "k_proj"]},
}
"""Configs of adapters, each with another way to say what is adapted and how."""


def sample_values(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values of size 0.15, float32, by name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return (0.15 * stream.standard_normal(shape)).astype(np.float32)


def sample_pairs(adapter: AdapterConfig, config: GPTJConfig | None = None, seed: int = 0) -> dict[str, Any]:
    """Scale, A and B of a sample by layer, as the oracle takes them."""
    rows = adapter_rows(adapter, config or revealing_config())
    values = {spec.name: sample_values(spec.name, spec.shape, seed) for row in rows for spec in (row.a, row.b)}
    return {row.module: (row.scale, values[row.a.name], values[row.b.name]) for row in rows}


def write_sample_adapter(
    folder: Path,
    kind: str = "all",
    *,
    config: GPTJConfig | None = None,
    seed: int = 0,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """The folder of a sample; `change` spoils its adapter_config.json."""
    adapter = AdapterConfig(**KINDS[kind])
    rows = adapter_rows(adapter, config or revealing_config())
    pairs = sample_pairs(adapter, config, seed)
    write_adapter(folder, adapter, rows, lambda row: pairs[row.module][1:])
    if change is not None:
        path = folder / "adapter_config.json"
        members = json.loads(path.read_text())
        change(members)
        path.write_text(json.dumps(members))
    return folder


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of these arrays."""
    header = pack_header([(name, array.dtype.name, array.shape) for name, array in arrays.items()], {})
    path.write_bytes(header + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values()))
