"""Every tensor of an adapter, by named axes: rows of a kind of their own beside those of `gptj.config.schema`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.adapters.config import AdapterConfig, nothing_hint
from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec, schema_by_name
from gptj.errors import ConfigError, shown

__all__ = ["AdapterRow", "adapter_rows", "initial_arrays"]


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """The pair of matrices that is added to one matrix of the model: W + scale B A.

    Attributes:
        module: the matrix' layer, without the prefix of a head: `h.0.attn.q_proj`.
        scale: the factor of B A.
        a: (r, in), `h.0.attn.q_proj.lora_A.weight`.
        b: (out, r), `h.0.attn.q_proj.lora_B.weight`.
    """

    module: str
    scale: float
    a: TensorSpec
    b: TensorSpec

    @property
    def kernel(self) -> str:
        """The name of the matrix, without the prefix of a head."""
        return f"{self.module}.weight"

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.a.shape[0]

    @property
    def size(self) -> int:
        """Numbers in both."""
        return self.a.size + self.b.size


def adapter_rows(adapter: AdapterConfig, config: GPTJConfig) -> tuple[AdapterRow, ...]:
    """Every pair of matrices that an adapter has for a model, in the schema's order.

    >>> rows = adapter_rows(AdapterConfig(r=4), GPTJConfig(n_layer=1))
    >>> [(row.module, row.a.shape, row.b.shape) for row in rows]
    [('h.0.attn.v_proj', (4, 4096), (4096, 4)), ('h.0.attn.q_proj', (4, 4096), (4096, 4))]

    Raises:
        ConfigError: `target_modules` mean no matrix of the model, or name a block that there is none of.
    """
    kernels, rows = schema_by_name(config, "base"), []
    for n, target in adapter.places(config.n_layer):
        module, r = f"h.{n}.{target}", adapter.rank(n, target)
        kernel = kernels[f"{module}.weight"]
        (outputs, inputs), (out_axis, in_axis) = kernel.shape, kernel.axes
        a = TensorSpec(f"{module}.lora_A.weight", ("rank", in_axis), (r, inputs), "adapter")
        b = TensorSpec(f"{module}.lora_B.weight", (out_axis, "rank"), (outputs, r), "adapter")
        rows.append(AdapterRow(module, adapter.scale(n, target), a, b))
    chosen = adapter.layers_to_transform
    beyond = [n for n in ((chosen,) if isinstance(chosen, int) else chosen or ()) if n >= config.n_layer]
    if beyond:
        raise ConfigError(
            "no such block in this model",
            where="layers_to_transform",
            expected=f"0 to {config.n_layer - 1}",
            found=beyond[0],
        )
    if not rows:
        named = [adapter.target_modules] if isinstance(adapter.target_modules, str) else adapter.target_modules or ()
        found = ", ".join(shown(name) for name in named)
        hint = nothing_hint(adapter, config.n_layer)
        raise ConfigError("means no matrix of this model", where="target_modules", found=found, hint=hint)
    return tuple(rows)


def initial_arrays(row: AdapterRow, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The start values of a pair: A even in +-1/sqrt(in), as torch's Linear and so PEFT's; B is zero.

    Each A has random numbers of its own, of Philox keyed by the seed and its name; so the three wings begin with the
    same bits, whatever else an adapter has.
    """
    digest = hashlib.sha256(f"{seed}:{row.a.name}".encode()).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    bound = np.float32(1 / math.sqrt(row.a.shape[1]))
    a: NDArray[Any] = stream.random(row.a.shape, dtype=np.float32)
    return (a * 2 - 1) * bound, np.zeros(row.b.shape, np.float32)
