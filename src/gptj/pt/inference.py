"""The fast path of decoding: weights fused, packed, and where asked quantised, and no gradients.

A decoded token reads every weight once, so its time is that of reading memory. GPT-J's attention and feed-forward
stand side by side, so a block needs two matrix products: one into [q, k, v, fc_in], which is two where one of them can
apply the activation, and one out of [attention, activation]. On a CPU with AVX-512 the weights are kept in oneDNN's
own layout, which is read at memory's pace whatever the number of rows; where the processor multiplies in tiles or has
AVX2 alone, so are plain matrices on the left of a few rows. Quantised weights are whole numbers of 8 or 4 bits; the
activations that meet 8-bit weights are whole numbers of two digits, of 16 bits or of 14, so that what is lost is the
weights' rounding alone.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gptj.errors import InputError
from gptj.prepared import QUANTIZATIONS, check_quantize, give_up, refusal
from gptj.pt.model import (
    GELUS,
    MLP,
    Attention,
    Block,
    Remember,
    Sight,
    has_amx,
    left_linear,
    onednn_has,
    onednn_linear,
    rotate_pairs,
    turned,
    x86_lacks_avx512,
    x86_lacks_vnni,
)
from gptj.schema import BASE_PREFIX, TensorSpec


class PlainLinear(nn.Module):
    """`F.linear` over (n, k) and (n,), as every device and dtype has it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """The same over weights in oneDNN's layout.

    The layout for 8 rows is the best, or as good as any, for 1, 8 and 512 (measured in float32 and bfloat16).
    """

    gelu: str | None = None
    """By which approximation the products are activated."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, 8), bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        return onednn_linear(x, self.weight, self.bias, self.gelu)


class UnpackedLinear(PlainLinear):
    """The same where the processor is without AVX-512: by oneDNN over plain weights, on the left of a few rows.

    So one row takes as long as reading the weights, half of what it takes over packed ones, and eight take two thirds
    (measured in float32).
    """

    few = 64
    """Rows; more are multiplied as fast from the right."""

    gelu: str | None = None
    """By which approximation the products are activated."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        if not 1 < x.shape[:-1].numel() <= self.few:
            return onednn_linear(x, self.weight, self.bias, self.gelu)
        product = left_linear(x, self.weight, self.bias)
        return product if self.gelu is None else F.gelu(product, approximate=self.gelu)


class TiledLinear(PlainLinear):
    """The same where the processor multiplies in tiles: the weights as they are, on the left.

    Tiles of oneDNN's layouts come from memory at 8 to 14 GB/s; the rows of a left matrix, which the processor sees
    coming, at 15 to 18 (measured in bfloat16, where memory gives 20).
    """

    at_once = 64
    """Rows, whose products stay in the cache until they are turned."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1:
            product = torch.addmv(self.bias, self.weight, rows[0])
        else:
            products = [torch.addmm(self.bias[:, None], self.weight, part.t()) for part in rows.split(self.at_once)]
            product = torch.cat([part.t() for part in products])
        return product.view(*x.shape[:-1], -1)


class WidenedLinear(PlainLinear):
    """The same where the processor has no products in 16 bits: many rows meet weights widened in the cache."""

    few = 3
    """Rows, for which PyTorch's own product is the faster; with 512 it takes six times as long (measured)."""

    at_once = 2**21
    """Weights, 8 MiB of them widened."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= self.few:
            return super().forward(x)
        wide = rows.float().contiguous()
        parts = self.weight.split(max(1, self.at_once // rows.shape[1]))
        return turned(torch.cat([onednn_linear(part.float(), wide) for part in parts]), self.bias, x)


class Int8Linear(nn.Module):
    """Weights of 8 bits, a scale an output channel; activations of 16 bits, a scale a row; whole sums, float32 results.

    oneDNN multiplies unsigned bytes with signed ones fastest, so an activation is two bytes, each with its zero at
    128; the two digits are rows of one product, which reads the weights once.
    """

    at_once = 128
    """Rows, so that their sums come from memory that the last ones had, not from the kernel."""

    base = 256
    """What the high digit counts."""

    largest = 127 * 256
    """Of an activation: 127 times the high digit's worth."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias.float()
        parts = weight.split(256)  # small, to stay in the cache
        scales = [_peaks(part) / 127 for part in parts]
        whole = [(part / scale).round_().to(torch.int8) for part, scale in zip(parts, scales, strict=True)]
        self.scale = torch.cat(scales).flatten()
        self._hold(torch.cat(whole))

    def _hold(self, whole: Tensor) -> None:
        """Keep the whole numbers (n, k), and what else the product needs."""
        self.weight = torch.ops.onednn.qlinear_prepack(whole, None)
        self.zero = torch.zeros(len(whole), dtype=torch.int32)
        self.offset = torch.tensor(128 * 256 + 128.5)  # both digits' zeros, and a half, since the cast cuts

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        parts = x.reshape(-1, x.shape[-1]).float().split(self.at_once)
        product = self._product(parts[0]) if len(parts) == 1 else torch.cat([self._product(part) for part in parts])
        return product.to(x.dtype).view(*x.shape[:-1], -1)

    def _product(self, rows: Tensor) -> Tensor:
        """(r, k) to (r, n), in float32."""
        peak = _peaks(rows)
        whole = torch.addcmul(self.offset, rows, self.largest / peak).to(torch.uint16)
        digits = whole.view(torch.uint8).unflatten(-1, (-1, 2)).permute(2, 0, 1).reshape(-1, rows.shape[1])
        sums = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return self._joined(sums, peak)

    def _joined(self, sums: Tensor, peak: Tensor) -> Tensor:
        """The low digits' sums over the high ones', (2r, n), as what they stand for, (r, n)."""
        low, high = sums.chunk(2)
        return torch.addcmul(self.bias, low.add_(high, alpha=self.base), peak / self.largest)


class TiledInt8Linear(Int8Linear):
    """The same where the processor multiplies in tiles, which are of signed bytes; see `TiledLinear`."""

    at_once = 32
    """Rows. More take longer to turn around than to multiply (measured)."""

    def _hold(self, whole: Tensor) -> None:
        self.weight = whole

    def _product(self, rows: Tensor) -> Tensor:
        peak = _peaks(rows)
        whole = (rows * (self.largest / peak)).round_().to(torch.int16)
        # In v + 128 the high byte is the high digit, and the low byte the low digit and 128, which flips its top bit.
        digits = whole.add_(128).bitwise_xor_(128).view(torch.int8).unflatten(-1, (-1, 2)).permute(2, 0, 1)
        sums = torch._int_mm(self.weight, digits.reshape(-1, rows.shape[1]).t())
        worth = (peak / self.largest).flatten().diag()
        # One product adds the digits up, gives each row its scale, and turns rows and columns.
        return torch.addcmul(self.bias, torch.cat((worth, 256 * worth), dim=1) @ sums.float().t(), self.scale)


class NarrowInt8Linear(Int8Linear):
    """The same where the processor adds products of bytes in 16 bits, which overflow: digits of 7 bits, by FBGEMM."""

    base = 128

    largest = 64 * 128
    """Of an activation: both digits are from -64 to 64, so that two products of 128 and 127 stay below 2^15."""

    def _hold(self, whole: Tensor) -> None:
        zeros = torch.zeros(len(whole), dtype=torch.int64)
        with warnings.catch_warnings():  # of tensors that know their scale, which this product alone needs
            warnings.filterwarnings("ignore", ".*quantized tensor creation")
            scaled = torch._make_per_channel_quantized_tensor(whole, self.scale, zeros, 0)
        self.weight = torch.ops.quantized.linear_prepack(scaled, None)

    def _product(self, rows: Tensor) -> Tensor:
        peak = _peaks(rows)
        whole = (rows * (self.largest / peak)).round_()
        high = (whole / 128).round_()
        digits = torch.cat((whole.sub_(high, alpha=128), high))
        sums = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(digits, 1.0, 64, self.weight)
        return self._joined(sums, peak)


def _peaks(rows: Tensor) -> Tensor:
    """The largest magnitude of each row (n, k) as (n, 1), in float32 and never 0. (A norm takes 7 times as long.)"""
    return rows.abs().amax(1, keepdim=True).float().clamp_min_(torch.finfo(torch.float32).tiny)


class Int4Linear(nn.Module):
    """Weights of 4 bits, a scale and an offset a group of 32 along k; activations in bfloat16."""

    group = 32
    """The smallest group that PyTorch's product takes, which loses least."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        if k % self.group or n % 16:
            raise InputError(
                "the model's sizes do not divide into groups",
                where="quantize",
                expected=f"outputs in multiples of 16, inputs of {self.group}",
                found=f"a matrix of {n} outputs by {k} inputs",
                hint='Take quantize="int8"',
            )
        self.bias = bias.float()
        groups = weight.float().unflatten(1, (-1, self.group))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).clamp_min_(1e-8).bfloat16().float()
        middle = (low + 8 * scale).bfloat16().float()
        whole = ((groups - middle[..., None]) / scale[..., None]).round_().add_(8).clamp_(0, 15).to(torch.int32)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.flatten(1), 1)
        self.scale = torch.stack((scale, middle), dim=2).transpose(0, 1).contiguous().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scale)
        return (product.float() + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def packed(weights: list[Tensor], biases: list[Tensor | None], quantize: str | None) -> nn.Module:
    """One linear layer of the stacked weights (n_i, k) and biases (n_i,), None for zeros, in the fastest form there is.

    Raises:
        InputError: the weights cannot be quantised so.
    """
    weight, bias = stacked(weights, biases)
    return kind_of_linear(weight, quantize)(weight, bias)


def stacked(weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The weights (n_i, k) and the biases (n_i,), None for zeros, over one another."""
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    return weight, torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])


def kind_of_linear(weight: Tensor, quantize: str | None) -> type[nn.Module]:
    """The fastest form that is right on this processor, for the weight's dtype and device."""
    if quantize == "int4":
        return Int4Linear
    if quantize == "int8":
        return TiledInt8Linear if has_amx() else NarrowInt8Linear if x86_lacks_vnni() else Int8Linear
    device, dtype = weight.device, weight.dtype
    if not onednn_has(device, torch.float32):
        return PlainLinear
    if dtype.itemsize == 2 and not onednn_has(device, dtype):
        return WidenedLinear
    if dtype == torch.bfloat16 and has_amx():
        return TiledLinear
    if dtype == torch.float32 and x86_lacks_avx512():
        return UnpackedLinear
    return PackedLinear if dtype in (torch.float32, torch.bfloat16) else PlainLinear


class OneProduct(nn.Module):
    """From a block's normed stream (b, t, m) to [q, k, v] (b, t, 3m) and fc_in's activated outputs (b, t, f)."""

    def __init__(self, attn: Attention, mlp: MLP, quantize: str | None) -> None:
        super().__init__()
        self.both = packed(*_inward(attn, mlp), quantize)
        self.width, self.activation = 3 * attn.q_proj.out_features, mlp.activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two."""
        both = self.both(x)
        return both[..., : self.width], self.activation(both[..., self.width :])


class TwoProducts(nn.Module):
    """The same where a product can apply GELU as it goes, which takes 5 % off 512 rows, and nothing on one (measured).

    Args:
        attn, mlp: whose weights these are.
        kind: of both products; it has a `gelu`.
        gelu: by which approximation.
    """

    def __init__(self, attn: Attention, mlp: MLP, kind: type[nn.Module], gelu: str) -> None:
        super().__init__()
        # Cut from one large array, which is given back; smaller ones would leave holes between what is packed.
        weight, bias = stacked(*_inward(attn, mlp))
        sizes = 3 * attn.q_proj.out_features, mlp.fc_in.out_features
        self.qkv, self.fc_in = map(kind, weight.split(sizes), bias.split(sizes))
        self.fc_in.gelu = gelu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two."""
        return self.qkv(x), self.fc_in(x)


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
        kind, gelu = kind_of_linear(mlp.fc_in.weight, quantize), GELUS.get(activation_function)
        if gelu is not None and hasattr(kind, "gelu"):
            self.into: nn.Module = TwoProducts(attn, mlp, kind, gelu)
        else:
            self.into = OneProduct(attn, mlp, quantize)
        self.out_of = packed([torch.cat((attn.out_proj.weight, mlp.fc_out.weight), dim=1)], [mlp.fc_out.bias], quantize)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            delattr(attn, name)
        attn.fused = True
        # Complex numbers are pairs; where a head begins in the middle of a pair, the numbers are turned one by one.
        self.in_pairs = not attn.head_dim % 2 and not mlp.fc_in.out_features % 2

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        sight: Sight,
        remember: Remember,
        head_mask: Tensor | None,
        weigh: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (b, t, m), and the attention weights or None; see `Block.forward`."""
        if x.requires_grad:
            raise refusal("a gradient")
        qkv, activated = self.into(self.ln_1(x))
        q, k = self._rotated(qkv[..., : 2 * self.m], *rotation)
        v = self._heads(qkv[..., 2 * self.m :])
        if x.shape[1] > 1:  # of their own, so that a cache does not keep the whole of `qkv`
            k, v = k.contiguous(), v.contiguous()
        k, v = remember(k, v)
        mixed, weights = self.attn.mix(q, k, v, sight, head_mask, weigh)
        return self.out_of(torch.cat((mixed, activated), dim=-1)).add_(x), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.attn.head_dim)).transpose(1, 2)  # b t m -> b h t d

    def _rotated(self, qk: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
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
    """What a model can do to decode faster."""

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
        self.lm_head = packed([self.lm_head.weight], [self.lm_head.bias], quantize)

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
