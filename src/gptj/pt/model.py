"""GPT-J's blocks in PyTorch, top to bottom.

Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax; rotary position embedding, Su et
al. 2021, arXiv:2104.09864. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward. Parameter names and layouts are the schema's. Precision is written where it matters: rotation,
scores, softmax, layer norms and logits are float32 at least whatever the parameters' dtype.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gptj import inputs
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.generation.typed import ReturnDict, same_as, typed_call
from gptj.outputs import BaseModelOutputWithPast, KVCache
from gptj.pretrained import one_dtype
from gptj.pt.weights import PretrainedModel, as_ids, as_tensor, empty_parameters, host
from gptj.rotary import rotary_table

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's new keys and values (b, h, t, d) and gives all that its queries may look at (b, h, s, d)."""

GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
"""By which approximation each is computed, in `F.gelu`'s words."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: functools.partial(F.gelu, approximate=approximate) for name, approximate in GELUS.items()},
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


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
    if not torch.cpu._is_avx512_supported():
        return False
    linux = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (linux.read_text() if linux.exists() else platform.processor())


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

    A weight with gaps between its rows takes some 400 times as long (measured); `x` may have them. `gelu` is by which
    approximation to apply that to the sums, while they are at hand.
    """
    after = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after[0], [], after[1])


def left_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for a few rows, with the weight on the left, whose rows the processor sees coming from memory."""
    rows = x.reshape(-1, x.shape[-1])
    return turned(onednn_linear(weight, rows.contiguous()), bias, x)


def turned(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What a weight on the left made of `x`, (n, r) to (..., n) in x's dtype, with the bias."""
    out = x.new_empty(product.shape[::-1])
    out = out.copy_(product.t()) if bias is None else torch.add(product.t(), bias, out=out)
    return out.view(*x.shape[:-1], -1)


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


class Linear(nn.Linear):
    """nn.Linear, in float32 by oneDNN where that is the faster (all measured).

    That is, on an x86 for the `few` rows of a short prompt or a batch, while `generate` runs: in 0.4 to 0.9 of the
    time. And where MKL is slow, for any rows and their gradients, if `fused` says that the model asks for speed.
    """

    few = range(4, 65)

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, fused: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n)."""
        weight = self.weight
        if onednn_may(x, weight):
            if x.shape[:-1].numel() in self.few and is_x86() and torch.is_inference_mode_enabled():
                return left_linear(x, weight, self.bias)
            if self.fused and mkl_is_slow():
                return Product.apply(x, weight, self.bias)
        return super().forward(x)


def onednn_may(x: Tensor, weight: Tensor) -> bool:
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


class RotaryTable:
    """The sine and cosine of every position, looked up by position ids.

    Not a buffer: `.half()` and `.bfloat16()` must leave it in float32, so the owner places it (`GPTJModel._apply`).
    """

    def __init__(self, config: GPTJConfig) -> None:
        self.n_positions, self.width = config.n_positions, config.rotary_width
        self.sin = self.cos = torch.empty(0)
        self.place(torch.device("cpu"), torch.float32)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the table on `device`, in float64 for a float64 model and in float32 for any other."""
        precision = "float64" if dtype == torch.float64 else "float32"
        if (self.sin.device, self.sin.dtype) == (device, getattr(torch, precision)) and self.sin.numel():
            return
        sin, cos = rotary_table(self.n_positions, self.width, precision)
        self.sin, self.cos = torch.tensor(sin, device=device), torch.tensor(cos, device=device)

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sine and cosine of each position, (b, t, pairs)."""
        return self.sin[position_ids], self.cos[position_ids]


def rotate_pairs(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """`x` (b, h, t, d) with its first 2 * pairs dimensions turned, pair by interleaved pair.

    (x0, x1) at angle a becomes (x0 cos a - x1 sin a, x1 cos a + x0 sin a), in the table's precision.
    """
    width = 2 * sin.shape[-1]
    sin, cos = sin[:, None], cos[:, None]  # b 1 t pairs
    turned = x[..., :width].to(sin.dtype).unflatten(-1, (-1, 2))
    x0, x1 = turned.unbind(-1)
    turned = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., width:]), dim=-1)


def visible(attention_mask: Tensor | None, slots: Tensor, length: int) -> Tensor:
    """Which keys each query sees, (b or 1, 1, t, s): those at or before its own slot that the mask has In.

    Args:
        attention_mask: (b, up to s) of 0 and 1, or None for all 1.
        slots: (t,) the slot of each query among the keys.
        length: s.
    """
    causal = torch.arange(length, device=slots.device) <= slots[:, None]
    if attention_mask is None:
        return causal[None, None]
    keys = F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
    return causal & keys[:, None, None]


class Sight(NamedTuple):
    """Which keys each query sees.

    Attributes:
        mask: (b or 1, 1, t, s), or None where each sees all.
        triangle: whether each query sees its own key and those before it, and nothing else is hidden.
    """

    mask: Tensor | None
    triangle: bool

    @classmethod
    def of(cls, attention_mask: Tensor | None, slots: Tensor, length: int) -> Sight:
        """The sight of the queries in `slots` over `length` keys; the arguments are `visible`'s."""
        if attention_mask is None and len(slots) == 1:
            return cls(None, triangle=False)
        triangle = attention_mask is None and len(slots) == length
        return cls(visible(attention_mask, slots, length), triangle)


class Memory:
    """Joins each layer's new keys and values to those that a cache holds, and becomes the next cache.

    Args:
        past: the cache, or None. A fixed one is written in place, from its length on.
    """

    def __init__(self, past: KVCache | None) -> None:
        self.past = past
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def of(self, layer: int, keep: bool) -> Remember:
        """The function that the layer's attention calls; with `keep` the result is part of the next cache."""

        def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            past = self.past
            if past is None:
                whole = k, v
            elif past.fixed:
                whole, end = (past.keys[layer], past.values[layer]), past.length + k.shape[2]
                for kept, new in zip(whole, (k, v), strict=True):
                    kept[:, :, past.length : end] = new
                k, v = (x[:, :, :end] for x in whole)
            else:
                whole = k, v = torch.cat((past.keys[layer], k), dim=2), torch.cat((past.values[layer], v), dim=2)
            if keep:
                self.keys.append(whole[0])
                self.values.append(whole[1])
            return k, v

        return remember

    def cache(self, length: int) -> KVCache:
        """The cache after this call, `length` tokens long."""
        return KVCache(tuple(self.keys), tuple(self.values), length, self.past is not None and self.past.fixed)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and no biases."""

    def __init__(self, config: GPTJConfig, *, attn_implementation: str) -> None:
        super().__init__()
        m = config.n_embd
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.fused = attn_implementation == "sdpa"
        self.k_proj = Linear(m, m, bias=False, fused=self.fused)
        self.v_proj = Linear(m, m, bias=False, fused=self.fused)
        self.q_proj = Linear(m, m, bias=False, fused=self.fused)
        self.out_proj = Linear(m, m, bias=False, fused=self.fused)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        sight: Sight,
        remember: Remember,
        head_mask: Tensor | None,
        weigh: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's contribution (b, t, m), and where `weigh` is asked its weights (b, h, t, s).

        `remember` takes the new keys and values and gives all that the queries may look at.
        """
        q = rotate_pairs(self._heads(self.q_proj(x)), *rotation)
        k = rotate_pairs(self._heads(self.k_proj(x)), *rotation)
        k, v = remember(k, self._heads(self.v_proj(x)))
        mixed, weights = self.mix(q, k, v, sight, head_mask, weigh)
        return self.resid_dropout(self.out_proj(mixed)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)  # b t m -> b h t d

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, sight: Sight, head_mask: Tensor | None, weigh: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The values mixed by the attention's weights (b, t, m), and the weights, or None where they were fused away.

        Args:
            q, k, v: (b, h, t, d), (b, h, s, d), (b, h, s, d); q and k rotated.
            sight, head_mask: which keys count, and how much each head does.
            weigh: whether the weights are asked for.
        """
        if self.fused and head_mask is None and not weigh:
            mixed, weights = self._fused(q, k, v, sight), None
        else:
            mixed, weights = self._attend(q, k, v, sight.mask, head_mask)
        return mixed.transpose(1, 2).flatten(2), weights

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        p = self.attn_dropout.p if self.training else 0.0
        if sight.triangle:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, dropout_p=p)
        return mixed if sight.mask is None else torch.where(sight.mask.any(-1, keepdim=True), mixed, 0)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = at_least_float32(q) @ at_least_float32(k).mT / math.sqrt(self.head_dim)
        if mask is None:
            weights = scores.softmax(-1)
        else:
            scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
            weights = torch.where(mask, scores.softmax(-1), 0)  # a row that sees nothing attends to nothing
        weights = self.attn_dropout(weights.to(v.dtype))
        if head_mask is not None:
            weights = weights * head_mask.to(weights.dtype)[:, None, None]
        return weights @ v, weights


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: GPTJConfig, *, attn_implementation: str) -> None:
        super().__init__()
        fused = attn_implementation == "sdpa"
        self.fc_in = Linear(config.n_embd, config.inner_width, fused=fused)
        self.fc_out = Linear(config.inner_width, config.n_embd, fused=fused)
        self.activation = ACTIVATIONS[config.activation_function]
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's contribution, (b, t, m)."""
        return self.resid_dropout(self.fc_out(self.activation(self.fc_in(x))))


class Block(nn.Module):
    """Attention and feed-forward side by side: both read the same normed input."""

    def __init__(self, config: GPTJConfig, *, attn_implementation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, attn_implementation=attn_implementation)
        self.mlp = MLP(config, attn_implementation=attn_implementation)

    def forward(self, x: Tensor, *attention_arguments: Any) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (b, t, m), and the attention weights or None."""
        h = self.ln_1(x)
        attended, weights = self.attn(h, *attention_arguments)
        return attended + self.mlp(h) + x, weights


class GPTJModel(PretrainedModel):
    """The bare model: token ids in, hidden states out.

    Args:
        config: the sizes.
        dtype: of the parameters: float32, float64, bfloat16 or float16, as a name or the framework's own.
        param_dtype: the same.
        seed: of the start values, which are the same in all three backends.
        attn_implementation: "eager", the reference, or "sdpa": PyTorch's fused attention, and in float32 on AMD's
            CPUs oneDNN's matrix products.
        _do_init: False leaves the parameters without values or memory, for `from_pretrained` to fill.
    """

    head = "base"

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        seed: int = 0,
        attn_implementation: str = "eager",
        _do_init: bool = True,
    ) -> None:
        super().__init__(config)
        if attn_implementation not in ("eager", "sdpa"):
            raise InputError(
                "no such attention", where="attn_implementation", expected="eager or sdpa", found=attn_implementation
            )
        with empty_parameters():
            # A weight that is given gets no start values: those of an embedding without memory import torch._dynamo,
            # which takes a second.
            weight = torch.empty(config.vocab_size, config.n_embd)
            self.wte = nn.Embedding(config.vocab_size, config.n_embd, _weight=weight)
            self.drop = nn.Dropout(config.embd_pdrop)
            blocks = [Block(config, attn_implementation=attn_implementation) for _ in range(config.n_layer)]
            self.h = nn.ModuleList(blocks)
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.rotary = RotaryTable(config)
        self.gradient_checkpointing = False
        if _do_init:
            self.initialise(dtype=one_dtype("float32", dtype=dtype, param_dtype=param_dtype), seed=seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPTJModel:
        super()._apply(fn, recurse)
        self._place_rotary()
        return self

    def _place_rotary(self) -> None:
        """Bring the rotary table to where the parameters are, in its own precision."""
        if not self.wte.weight.is_meta:
            self.rotary.place(self.wte.weight.device, self.wte.weight.dtype)

    @typed_call
    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: ReturnDict = None,
    ) -> BaseModelOutputWithPast[Tensor] | tuple[Any, ...]:
        """The hidden states of every token.

        Args:
            input_ids: (b, t) token ids, or None where inputs_embeds is given.
            past_key_values: a `KVCache` from an earlier call or from `init_cache`.
            attention_mask: (b, cached + t) of 0 and 1; 1 In, 0 Out (padding). None: all In.
            token_type_ids: (b, t) ids whose wte embeddings are added.
            position_ids: (b, t) or (1, t). None: counted on from the cache's length.
            head_mask: (h,) or (n_layer, h) factors of each head's weights.
            inputs_embeds: (b, t, m) in place of input_ids.
            use_cache, output_attentions, output_hidden_states, return_dict: None means the config's.

        Raises:
            InputError: see `gptj.inputs.check_call`.
        """
        config = self.config
        device, dtype = self.wte.weight.device, self.wte.weight.dtype
        past = KVCache.of(past_key_values, config.n_layer)
        ids = as_ids(input_ids, device, where="input_ids")
        types = as_ids(token_type_ids, device, where="token_type_ids")
        positions = as_ids(position_ids, device, where="position_ids")
        mask = as_tensor(attention_mask, device, where="attention_mask")
        embeds = as_tensor(inputs_embeds, device, where="inputs_embeds")
        factors = as_tensor(head_mask, device, where="head_mask")
        inputs.check_call(
            config,
            host,
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            token_type_ids=types,
            position_ids=positions,
            head_mask=factors,
            past=past,
        )
        recompute = self.gradient_checkpointing and self.training
        remember = (config.use_cache if use_cache is None else use_cache) and not recompute
        weigh = config.output_attentions if output_attentions is None else output_attentions
        trace = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        x = self.wte(ids) if embeds is None else embeds.to(dtype)
        if types is not None:
            x = x + self.wte(types)
        x = self.drop(x)

        t, seen = x.shape[1], 0 if past is None else past.length
        slots = seen + torch.arange(t, device=device)
        rotation = self.rotary((slots[None] if positions is None else positions).expand(x.shape[0], -1))
        sight = Sight.of(mask, slots, seen + t)
        if factors is not None:
            factors = factors.expand(config.n_layer, config.n_head)

        memory = Memory(past)
        hidden, attentions = [], []
        for n, block in enumerate(self.h):
            if trace:
                hidden.append(x)
            arguments = (rotation, sight, memory.of(n, remember), None if factors is None else factors[n], weigh)
            if recompute:
                x, weights = checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x, weights = block(x, *arguments)
            attentions.append(weights)
        x = self.ln_f(x)

        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=memory.cache(seen + t) if remember else None,
            hidden_states=(*hidden, x) if trace else None,
            attentions=tuple(attentions) if weigh else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """What `forward` gives."""

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of fixed capacity, written in place: n_layer pairs of (b, h, max_length, d).

        Raises:
            InputError: max_length is more than n_positions, or a size is below 1.
        """
        inputs.check_cache_size(self.config, batch_size, max_length)
        shape = (batch_size, self.config.n_head, max_length, self.config.head_dim)
        weight = self.wte.weight
        keys, values = (tuple(weight.new_zeros(shape) for _ in self.h) for _ in range(2))
        return KVCache(keys, values, 0, fixed=True)
