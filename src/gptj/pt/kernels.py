"""Products of matrices in PyTorch: in which library and which layout of the weights each is fastest.

One door: given rows, a weight, a bias and what may be done with the weight, the best product for their dtype, their
device and the processor. `multiply` is the door for weights that stay as they are, and chooses at each call; `pack`
is the same for weights that may be laid out anew, and chooses once. All else here is what these two choose from, each
with what was measured. No other file of the wing names a processor or a library.

Differs: XLA chooses its kernels itself; PyTorch's callers choose among several libraries.

On a CPU with AVX-512 packed weights are in oneDNN's own layout, which is read at memory's pace whatever the number of
rows; where the processor multiplies in tiles or has AVX2 alone, they are plain matrices on the left of a few rows.
Quantised weights are whole numbers of 8 or 4 bits; the activations that meet 8-bit weights are whole numbers of two
digits, of 16 bits or of 14, so that what is lost is the weights' rounding alone. Axes: r rows, n outputs, k inputs.
"""

from __future__ import annotations

import functools
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptj.errors import InputError
from gptj.pt.adapters import LowRanks

FEW_ROWS = range(4, 65)
"""Rows of a short prompt or of a batch, which are multiplied weights-first in inference mode on x86."""


class Linear(nn.Linear):
    """nn.Linear by the best product that leaves its weight as it is.

    Args:
        inputs, outputs, bias: as nn.Linear's.
        fused: whether the model asks for speed, as `multiply` takes it.

    Attributes:
        lora: the adapters beside the weight, None until there are some.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, fused: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.fused = fused
        self.lora: LowRanks | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        y = multiply(x, self.weight, self.bias, fused=self.fused)
        return y if self.lora is None else self.lora(x, y)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, fused: bool) -> Tensor:
    """x @ weight.T + bias, (..., k) to (..., n): by `F.linear`, or in float32 by oneDNN where that is the faster.

    In inference mode on x86, 4 to 64 rows are multiplied weights-first, which takes 0.4 to 0.9 of F.linear's time
    (measured). Where MKL is slow, oneDNN multiplies any rows, and computes their gradients.

    Args:
        x: (..., k), of the weight's dtype.
        weight: (n, k).
        bias: (n,), or None.
        fused: whether any rows may go to oneDNN where MKL is slow; only the few may without it.
    """
    if may_use_onednn(x, weight):
        if x.shape[:-1].numel() in FEW_ROWS and is_x86() and torch.is_inference_mode_enabled():
            return multiply_weights_first(x, weight, bias)
        if fused and mkl_is_slow():
            return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def pack(weights: list[Tensor], biases: list[Tensor | None], quantize: str | None) -> nn.Module:
    """One linear layer of the stacked weights (n_i, k) and biases (n_i,), None for zeros, in the fastest form there is.

    Raises:
        InputError: the weights cannot be quantised so.
    """
    weight, bias = stack(weights, biases)
    return choose_layer(weight, quantize)(weight, bias)


def stack(weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The weights (n_i, k) and the biases (n_i,), None for zeros, over one another."""
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    return weight, torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])


def choose_layer(weight: Tensor, quantize: str | None) -> type[nn.Module]:
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


def can_apply_gelu(weight: Tensor, quantize: str | None) -> bool:
    """Whether `pack` makes a layer of this weight that has a `gelu`, which it applies as it multiplies."""
    return hasattr(choose_layer(weight, quantize), "gelu")


def may_use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can multiply the two in the place of `F.linear`, with nothing between that must see it done."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and onednn_has(x.device, x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


@functools.cache
def onednn_has(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on the device, and fast."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    onednn = torch.ops.mkldnn
    narrow = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
    return bool(narrow[dtype]()) if dtype in narrow else dtype == torch.float32


@functools.cache
def mkl_is_slow() -> bool:
    """Whether the processor is AMD's with AVX-512, which MKL leaves unused: at half of oneDNN's pace (measured)."""
    return torch.cpu._is_avx512_supported() and amd_family() is not None


@functools.cache
def waits_for_sums() -> bool:
    """Whether the processor is a Zen 4, whose sums of one row or two come later than the weights do (measured)."""
    return torch.cpu._is_avx512_supported() and amd_family() == 25


def amd_family() -> int | None:
    """The family of an AMD processor, by which its generations are told apart; None for another maker's."""
    linux = Path("/proc/cpuinfo")
    told = linux.read_text() if linux.exists() else platform.processor()
    family = re.search(r"family\s*:?\s*(\d+)", told, re.IGNORECASE)
    return int(family[1]) if family and "AuthenticAMD" in told else None


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies in tiles, as Intel's server processors since 2023 do."""
    return bool(torch.cpu._is_amx_tile_supported())


def x86_lacks_avx512() -> bool:
    """Whether the processor is an x86 whose registers are no wider than AVX2's."""
    return is_x86() and not torch.cpu._is_avx512_supported()


def x86_lacks_vnni() -> bool:
    """Whether the processor is an x86 that adds products of bytes in 16 bits, in which they overflow."""
    return is_x86() and not torch.cpu._is_vnni_supported()


def is_x86() -> bool:
    """Whether the processor is Intel's or AMD's, of which alone there are measurements."""
    return platform.machine() in ("x86_64", "AMD64")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """x @ weight.T + bias; the weight (n, k) as it is, transposed, or in oneDNN's own layout.

    A weight with gaps between its rows takes some 400 times as long (measured); `x` may have them. `gelu` is
    `F.gelu`'s `approximate=`: it is applied to the sums while they are at hand.
    """
    after = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after[0], [], after[1])


def multiply_weights_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias for a few rows, the weight on the left: the processor sees its rows coming from memory."""
    rows = x.reshape(-1, x.shape[-1])
    return untranspose(onednn_linear(weight, rows.contiguous()), bias, like=x)


def fill_rows(rows: Tensor, fewest: int) -> Tensor:
    """The rows (r, k), with rows of zeros after them where they are fewer than `fewest`."""
    return rows if len(rows) >= fewest else F.pad(rows, (0, 0, 0, fewest - len(rows)))


def untranspose(product: Tensor, bias: Tensor | None, *, like: Tensor) -> Tensor:
    """A product computed weights-first, (n, r), as (..., n) in the shape and dtype of `like`, plus the bias."""
    out = like.new_empty(product.shape[::-1])
    out = out.copy_(product.t()) if bias is None else torch.add(product.t(), bias, out=out)
    return out.view(*like.shape[:-1], -1)


class Product(torch.autograd.Function):
    """`onednn_linear` with gradients, which are two more of its kind."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., k) to (..., n)."""
        return onednn_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the two factors."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The slopes of x, weight and bias, each where it is asked for."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = slope.flatten(0, -2)
        return (
            onednn_linear(slope, weight.t()) if of_x else None,
            onednn_linear(rows.t(), x.flatten(0, -2).contiguous().t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class PlainLinear(nn.Module):
    """`F.linear` over (n, k) and (n,), as every device and dtype has it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer over weights in oneDNN's layout.

    The layout for 8 rows is the best, or as good as any, for 1, 8 and 512 (measured in float32 and bfloat16). Three
    rows are multiplied as 4, which takes 0.91 of the time on Zen 5, and so are one and two on Zen 4: each weight then
    meets enough sums to hide the wait for the next (shape M: a step of one row in float32 takes 0.80 of the time, of
    two 0.67; in bfloat16 0.90 and 0.87). On Zen 5 the same costs one row nothing where memory is slow, and up to 0.18
    where it is fast.
    """

    gelu: str | None = None
    """`F.gelu`'s `approximate=` of the activation that follows, None for no activation."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, 8), bias
        self.filled = (1, 2, 3) if waits_for_sums() else (3,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        count = x.shape[:-1].numel()
        if count not in self.filled:
            return onednn_linear(x, self.weight, self.bias, self.gelu)
        rows = fill_rows(x.reshape(count, x.shape[-1]), 4)
        product = onednn_linear(rows, self.weight, self.bias, self.gelu)[:count]
        return product.view(*x.shape[:-1], product.shape[-1])


class UnpackedLinear(PlainLinear):
    """A linear layer for processors without AVX-512: oneDNN over plain weights, on the left of a few rows.

    So one row takes as long as reading the weights, half of what it takes over packed ones, and eight take two thirds
    (measured in float32).
    """

    few = 64
    """Rows; more are multiplied as fast from the right."""

    gelu: str | None = None
    """`F.gelu`'s `approximate=` of the activation that follows, None for no activation."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        if not 1 < x.shape[:-1].numel() <= self.few:
            return onednn_linear(x, self.weight, self.bias, self.gelu)
        product = multiply_weights_first(x, self.weight, self.bias)
        return product if self.gelu is None else F.gelu(product, approximate=self.gelu)


class TiledLinear(PlainLinear):
    """A linear layer for processors that multiply in tiles: the weights as they are, on the left.

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
    """A linear layer for processors without products in 16 bits: many rows meet weights widened in the cache."""

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
        return untranspose(torch.cat([onednn_linear(part.float(), wide) for part in parts]), self.bias, like=x)


class Int8Linear(nn.Module):
    """Weights of 8 bits, a scale an output channel; activations of 16 bits, a scale a row; whole sums, float32 results.

    oneDNN multiplies unsigned bytes with signed ones fastest, so an activation is two bytes, each with its zero at
    128; the two digits are rows of one product, which reads the weights once.
    """

    at_once = 128
    """Rows, so that their sums come from memory that the last ones had, not from the kernel."""

    fewest = 2
    """Rows of a product: one alone takes 1.15 times as long as two (Zen 4, shape M)."""

    base = 256
    """The high digit's worth."""

    largest = 127 * 256
    """The largest magnitude of an activation: 127 times the high digit's worth."""

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
        count = x.shape[:-1].numel()
        parts = fill_rows(x.reshape(count, x.shape[-1]).float(), self.fewest).split(self.at_once)
        product = self._product(parts[0]) if len(parts) == 1 else torch.cat([self._product(part) for part in parts])
        return product[:count].to(x.dtype).view(*x.shape[:-1], product.shape[1])

    def _product(self, rows: Tensor) -> Tensor:
        """(r, k) to (r, n), in float32."""
        peak = _peaks(rows)
        whole = torch.addcmul(self.offset, rows, self.largest / peak).to(torch.uint16)
        digits = whole.view(torch.uint8).unflatten(-1, (-1, 2)).permute(2, 0, 1).reshape(-1, rows.shape[1])
        sums = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return self._join_digits(sums, peak)

    def _join_digits(self, sums: Tensor, peak: Tensor) -> Tensor:
        """The low digits' sums over the high ones', (2r, n), as what they stand for, (r, n)."""
        low, high = sums.chunk(2)
        return torch.addcmul(self.bias, low.add_(high, alpha=self.base), peak / self.largest)


class TiledInt8Linear(Int8Linear):
    """`Int8Linear` for processors that multiply in tiles, which are of signed bytes; see `TiledLinear`."""

    fewest = 1

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
    """`Int8Linear` for processors that add products of bytes in 16 bits, which overflow: 7-bit digits, by FBGEMM."""

    fewest = 1

    base = 128

    largest = 64 * 128
    """The largest magnitude of an activation: both digits are from -64 to 64, so that two products stay below 2^15."""

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
        return self._join_digits(sums, peak)


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
