"""The fast path of decoding: weights fused, packed, and where asked quantised, and no gradients.

A decoded token reads every weight once, so its time is that of reading memory. GPT-J's attention and feed-forward
stand side by side, so a block needs two matrix products: one into [q, k, v, fc_in], which is two where one of them can
apply the activation, and one out of [attention, activation]. Each is the best that `gptj.pt.kernels` has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gptj.calls.prepared import QUANTIZATIONS, check_quantize, give_up, refusal
from gptj.config.schema import BASE_PREFIX, TensorSpec
from gptj.errors import InputError
from gptj.pt.adapters import LowRanks
from gptj.pt.arguments import AttentionMask, UpdateCache
from gptj.pt.kernels import can_apply_gelu, pack, stack
from gptj.pt.layers import GELUS, rotate_pairs
from gptj.pt.model import MLP, Attention, Block


class OneProduct(nn.Module):
    """The product from a block's normed stream (b, t, m) to [q, k, v] (b, t, 3m) and fc_in's activations (b, t, f)."""

    def __init__(self, attn: Attention, mlp: MLP, quantize: str | None) -> None:
        super().__init__()
        self.both = pack(*_inward(attn, mlp), quantize)
        self.width, self.activation = 3 * attn.q_proj.out_features, mlp.activation

    def forward(self, x: Tensor, beside: nn.ModuleDict) -> tuple[Tensor, Tensor]:
        """The two, with what the adapters beside the weights add."""
        both = self.both(x)
        qkv = add_into_qkv(x, both[..., : self.width], beside)
        return qkv, self.activation(beside["fc_in"](x, both[..., self.width :]))

    def use_adapters(self, beside: nn.ModuleDict) -> None:
        """Take note of which adapter is at work."""


class TwoProducts(nn.Module):
    """`OneProduct` in two, of which one applies GELU as it goes: 5 % off 512 rows, nothing off one (measured).

    Args:
        attn, mlp: whose weights these are.
        gelu: `F.gelu`'s `approximate=`.
    """

    def __init__(self, attn: Attention, mlp: MLP, gelu: str) -> None:
        super().__init__()
        # Cut from one large array, which is given back; smaller ones would leave holes between what is packed.
        weight, bias = stack(*_inward(attn, mlp))
        sizes = 3 * attn.q_proj.out_features, mlp.fc_in.out_features
        parts = zip(weight.split(sizes), bias.split(sizes), strict=True)
        self.qkv, self.fc_in = (pack([part], [its_bias], quantize=None) for part, its_bias in parts)
        self.fc_in.gelu = self.gelu = gelu

    def forward(self, x: Tensor, beside: nn.ModuleDict) -> tuple[Tensor, Tensor]:
        """The two, with what the adapters beside the weights add."""
        qkv, inner = add_into_qkv(x, self.qkv(x), beside), self.fc_in(x)
        if self.fc_in.gelu is None:
            inner = F.gelu(beside["fc_in"](x, inner), approximate=self.gelu)
        return qkv, inner

    def use_adapters(self, beside: nn.ModuleDict) -> None:
        """Apply GELU as the product goes only where no adapter adds to what enters it."""
        self.fc_in.gelu = None if beside["fc_in"].works else self.gelu


def add_into_qkv(x: Tensor, qkv: Tensor, beside: nn.ModuleDict) -> Tensor:
    """`qkv` (b, t, 3m) with what the adapters beside its three matrices make of `x` (b, t, m) added."""
    names = ("q_proj", "k_proj", "v_proj")
    if not any(beside[name].works for name in names):
        return qkv
    parts = zip(names, qkv.chunk(3, dim=-1), strict=True)
    return torch.cat([beside[name](x, part) for name, part in parts], dim=-1)


def _inward(attn: Attention, mlp: MLP) -> tuple[list[Tensor], list[Tensor | None]]:
    """The weights and the biases of what a block's normed stream meets."""
    linears = attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


class PreparedBlock(nn.Module):
    """A block in two or three matrix products.

    Args:
        block: whose weights these are; they are taken out of it.
        quantize: None, "int8" or "int4".
        activation_function: the name of its activation.
    """

    def __init__(self, block: Block, quantize: str | None, activation_function: str) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.ln_1, self.attn, self.m = block.ln_1, attn, attn.q_proj.out_features
        gelu = GELUS.get(activation_function)
        if gelu is not None and can_apply_gelu(mlp.fc_in.weight, quantize):
            self.into: nn.Module = TwoProducts(attn, mlp, gelu)
        else:
            self.into = OneProduct(attn, mlp, quantize)
        self.out_of = pack([torch.cat((attn.out_proj.weight, mlp.fc_out.weight), dim=1)], [mlp.fc_out.bias], quantize)
        linears = {name: getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linears |= {"fc_in": mlp.fc_in, "fc_out": mlp.fc_out}
        self.beside = nn.ModuleDict({name: linear.lora or LowRanks() for name, linear in linears.items()})
        into: Any = self.into
        into.use_adapters(self.beside)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            delattr(attn, name)
        attn.fused = True
        # Complex numbers are pairs; where a head begins in the middle of a pair, the numbers are turned one by one.
        self.in_pairs = not attn.head_dim % 2 and not mlp.fc_in.out_features % 2

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: AttentionMask,
        update_cache: UpdateCache,
        head_mask: Tensor | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (b, t, m), and the attention weights or None; see `Block.forward`."""
        if x.requires_grad:
            raise refusal("a gradient")
        qkv, activated = self.into(self.ln_1(x), self.beside)
        q, k = self._rotate(qkv[..., : 2 * self.m], *rotation)
        v = self._heads(qkv[..., 2 * self.m :])
        if x.shape[1] > 1:  # of their own, so that a cache does not keep the whole of `qkv`
            k, v = k.contiguous(), v.contiguous()
        k, v = update_cache(k, v)
        mixed, weights = self.attn.mix(q, k, v, attention_mask, head_mask, output_attentions)
        out = self.out_of(torch.cat((mixed, activated), dim=-1))
        out = self.beside["fc_out"](activated, self.beside["out_proj"](mixed, out))
        return out.add_(x), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.attn.head_dim)).transpose(1, 2)  # b t m -> b h t d

    def _rotate(self, qk: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (b, h, t, d) of their concatenation (b, t, 2m); `rotate_pairs` in one multiplication."""
        if not self.in_pairs:
            q, k = rotate_pairs(self._heads(qk), sin, cos).chunk(2, dim=1)
            return q, k
        exact = self._heads(qk.to(sin.dtype))
        pairs = torch.view_as_complex(exact[..., : 2 * sin.shape[-1]].unflatten(-1, (-1, 2)))
        pairs.mul_(torch.complex(cos, sin)[:, None])
        q, k = exact.to(qk.dtype).chunk(2, dim=1)
        return q, k


class InferenceMixin:
    """Faster decoding, a base class of the models with a language-model head."""

    transformer: Any
    lm_head: Any

    def prepare_for_inference(self, *, quantize: str | None = None) -> Self:
        """The model itself, its weights fused and packed for decoding, in evaluation mode and without gradients.

        `model(...)`, `generate` and `stream` take the fast path from then on. Training, saving, resizing, casting and
        moving are over, and say so; so first move the model to its device and cast it to its dtype.

        Args:
            quantize: None keeps the parameters' dtype. "int8": 8 bits a weight, one scale an output channel. "int4": 4
                bits, a scale and an offset for 32 weights, activations in bfloat16. Both on the CPU alone; embeddings
                and layer norms stay as they are.

        Raises:
            InputError: another `quantize`, sizes or a device that it does not fit, or a model prepared already.
        """
        model: Any = self
        model._refuse_prepared("prepare_for_inference")
        model._refuse_cut("prepare_for_inference")
        check_quantize(quantize, QUANTIZATIONS)
        model._require_values("prepare_for_inference")
        check_device_of(model.device, quantize)
        with torch.no_grad():
            for n in range(len(self.transformer.h)):
                self._pack_block(n, quantize)
            self._pack_head(quantize)
        self._give_up_parameters()
        return self

    def _assign_prepared(self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]], quantize: str | None) -> None:
        """Fill a model without values with prepared ones, a block at a time: no more than one is there twice."""
        model: Any = self
        check_quantize(quantize, QUANTIZATIONS)
        check_device_of(torch.get_default_device(), quantize)
        with torch.no_grad():
            for n, rows in itertools.groupby(arrays, key=lambda row: _block_number(row[0].name)):
                model._assign(rows)
                if n is not None:
                    self._pack_block(n, quantize)
            self._pack_head(quantize)
        self._give_up_parameters()

    def _pack_block(self, n: int, quantize: str | None) -> None:
        blocks = self.transformer.h
        blocks[n] = PreparedBlock(blocks[n], quantize, self.transformer.config.activation_function)

    def _pack_head(self, quantize: str | None) -> None:
        self.lm_head = pack([self.lm_head.weight], [self.lm_head.bias], quantize)

    def _give_up_parameters(self) -> None:
        """From now on, refuse by name all that needs the parameters, on this model and on the one inside."""
        inner: Any = self
        for model in (inner, inner.transformer):
            model.requires_grad_(False).eval()
            model._is_prepared = True
            model.train = functools.partial(_train, model)
            give_up(model, _GIVEN_UP)


_GIVEN_UP = {
    "load_state_dict": "load_state_dict",
    "requires_grad_": "requires_grad_",
    "state_dict": "state_dict",
    "_apply": "a cast or a move",
    "__deepcopy__": "a copy",
}
"""Methods of torch's own that a prepared model has no longer, and what each is called."""


def check_device_of(device: torch.device, quantize: str | None) -> None:
    """Refuse quantized weights anywhere but on the CPU."""
    if quantize is not None and device.type != "cpu":
        raise InputError("only on the CPU", where="quantize", found=device.type, hint="Prepare without quantize")


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """Evaluation mode, in which a prepared model is anyway."""
    if mode:
        raise refusal("train")
    return model


def _block_number(name: str) -> int | None:
    """Which block a row of the schema belongs to, None where to none."""
    parts = name.removeprefix(BASE_PREFIX).split(".")
    return int(parts[1]) if parts[0] == "h" else None
