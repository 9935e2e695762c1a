"""LoRA adapters in PyTorch: the pairs of matrices beside a layer, and the hooks of `gptj.pretrained.adapted`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gptj.adapters import AdapterConfig, AdapterRow


class LowRank(nn.Module):
    """scale B A of one adapter beside one matrix.

    Args:
        row: its place, and the scale.
        a, b: A (r, in) and B (out, r).
        dropout: of A's input in training.
    """

    def __init__(self, row: AdapterRow, a: Tensor, b: Tensor, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = row.scale, dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` (..., out) with what the adapter makes of `x` (..., in) added, in its own precision, rounded once."""
        x = F.dropout(x.to(self.a.dtype), self.dropout, self.training)
        return (y + self.scale * F.linear(F.linear(x, self.a), self.b)).to(y.dtype)


class LowRanks(nn.Module):
    """The adapters held beside one matrix, by name, of which one at most is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None

    @property
    def works(self) -> bool:
        """Whether the adapter at work adds to this matrix."""
        return self.active in self._modules

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` (..., out), the product of `x` (..., in), with what the adapter at work adds."""
        added = None if self.active is None else self._modules.get(self.active)
        result: Tensor = y if added is None else added(x, y)
        return result

    def hold(self, name: str, added: LowRank) -> None:
        """Keep an adapter under a name, whatever names modules have already."""
        self._modules[name] = added

    def drop(self, name: str) -> None:
        """Let an adapter go."""
        self._modules.pop(name, None)


class AdapterMixin:
    """The hooks of `gptj.pretrained.adapted.Adapted`: an adapter's matrices are parameters of the layers."""

    _adapted_strategies = frozenset({"tp", "dp"})

    def _hold_adapter(
        self, name: str, config: AdapterConfig, arrays: list[tuple[AdapterRow, NDArray[Any], NDArray[Any]]]
    ) -> None:
        model: Any = self
        for row, a, b in arrays:
            beside = self._beside(row.module)
            if model.placement is not None:
                a, b = a[model.placement.slices(row.a)], b[model.placement.slices(row.b)]
            # Copies: the arrays may be a mapped file's, and these are written to.
            a_, b_ = (torch.tensor(array, device=model.device) for array in (a, b))
            added = LowRank(row, a_, b_, float(config.lora_dropout)).train(model.training)
            beside.hold(name, added)

    def _read_adapter(self, name: str, row: AdapterRow) -> tuple[NDArray[Any], NDArray[Any]]:
        added = self._beside(row.module)._modules[name]
        assert isinstance(added, LowRank)
        a, b = (x.detach().cpu() for x in (added.a, added.b))
        if a.dtype in (torch.bfloat16, torch.float16):  # the whole model was cast
            a, b = a.float(), b.float()
        return np.asarray(a), np.asarray(b)

    def _activate_adapter(self, name: str | None) -> None:
        model: Any = self
        for module in model.base_model.modules():
            if isinstance(module, LowRanks):
                module.active = name
        for block in model.base_model.h if model._is_prepared else ():
            block.into.use_adapters(block.beside)

    def _drop_adapter(self, name: str) -> None:
        model: Any = self
        for module in model.base_model.modules():
            if isinstance(module, LowRanks):
                module.drop(name)

    def _let_adapter_train(self, name: str, trains: bool) -> None:
        model: Any = self
        for module in model.base_model.modules():
            if isinstance(module, LowRanks) and (added := module._modules.get(name)) is not None:
                for parameter in added.parameters():
                    parameter.requires_grad_(trains)

    def _freeze_base(self) -> dict[str, bool]:
        model: Any = self
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return before

    def _let_base_train(self, before: dict[str, bool]) -> None:
        model: Any = self
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, parameter.requires_grad))

    def _beside(self, module: str) -> LowRanks:
        """The adapters beside a matrix: `h.0.attn.q_proj`."""
        model: Any = self
        _, number, _, leaf = module.split(".")
        block = model.base_model.h[int(number)]
        if model._is_prepared:
            beside: LowRanks = block.beside[leaf]
            return beside
        layer = model.base_model.get_submodule(module)
        if layer.lora is None:
            layer.lora = LowRanks()
        found: LowRanks = layer.lora
        return found
