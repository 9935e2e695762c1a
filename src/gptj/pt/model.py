"""GPT-J's blocks in PyTorch, top to bottom.

Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax; rotary position embedding, Su et
al. 2021, arXiv:2104.09864. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward. Parameter names and layouts are the schema's. Precision is written where it matters: rotation,
scores, softmax, layer norms and logits are float32 at least whatever the parameters' dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptj.calls import inputs
from gptj.calls.outputs import BaseModelOutputWithPast, KVCache, object_or_tuple
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.generation.decoder import PIECE
from gptj.generation.typed import ReturnDict, same_as, typed_call
from gptj.pretrained import one_dtype
from gptj.pt.arguments import (
    AttentionMask,
    CacheBuilder,
    Call,
    JoinedCalls,
    RowsCache,
    UpdateCache,
    cache_length,
    convert_arguments,
)
from gptj.pt.kernels import Linear
from gptj.pt.layers import ACTIVATIONS, RotaryTable, at_least_float32, rotate_pairs
from gptj.pt.weights import PretrainedModel, empty_parameters, zeros


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
        attention_mask: AttentionMask,
        update_cache: UpdateCache,
        head_mask: Tensor | None,
        output_attentions: bool,
        *,
        taps: TapCollector | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's contribution (b, t, m), and where `output_attentions` asks, its weights (b, h, t, s).

        `update_cache` takes the new keys and values, and returns those to attend over; `taps` is given what is between.
        """
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if taps is not None:
            taps(q=q, k=k, v=v)
        q, k = rotate_pairs(q, *rotation), rotate_pairs(k, *rotation)
        if taps is not None:
            taps(q_rotated=q, k_rotated=k)
        k, v = update_cache(k, v)
        mixed, weights = self.mix(q, k, v, attention_mask, head_mask, output_attentions, taps)
        x = self.resid_dropout(self.out_proj(mixed))
        if taps is not None:
            taps(mixed=mixed, out_proj=x)
        return x, weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)  # b t m -> b h t d

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        head_mask: Tensor | None,
        output_attentions: bool,
        taps: TapCollector | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The values mixed by the attention's weights (b, t, m), and the weights, or None where nobody asks for them.

        Args:
            q, k, v: (b, h, t, d), (b, h, s, d), (b, h, s, d); q and k rotated.
            mask, head_mask: which keys count, and how much each head does.
            output_attentions: whether the weights are asked for.
            taps: is given the scores, what is visible and the weights; where it asks for them, nothing is fused.
        """
        if isinstance(mask, JoinedCalls):
            calls = zip(mask.part_heads(q), k, v, mask.masks, strict=True)
            return mask.join(self._mix_apart(*its) for its in calls), None
        by_step = output_attentions or (taps is not None and taps.asks("scores", "visible", "weights"))
        if self.fused and head_mask is None and not by_step:
            mixed, weights = self._attend_fused(q, k, v, mask), None
        else:
            mixed, weights = self._attend(q, k, v, mask.values, head_mask, taps)
        # Kept for nobody, they would outgrow the cache: all blocks' of 2,048 tokens are 7.5 GB at 6B in float32.
        return mixed.transpose(1, 2).flatten(2), weights if output_attentions else None

    def _mix_apart(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """`mix` of one of several calls: on a CPU the same bits for a query, whichever others are in its call.

        PyTorch's kernel sums in another order for more queries, and where the keys do not end with a query's block.
        """
        if not self.fused or q.device.type != "cpu":
            return self.mix(q, k, v, mask, None, False)[0]
        t, s = q.shape[2], k.shape[2]
        if t == 1 and mask.values is not None:
            return self._attend_rows(q, k, v, mask).flatten(1)[:, None]
        if mask.values is None:
            return self._attend_fused(q, k, v, mask).transpose(1, 2).flatten(2)
        begin, values = s - t, mask.values.expand(-1, -1, t, -1)
        edges = [begin, *range(begin // PIECE * PIECE + PIECE, s, PIECE), s]
        parts = []
        for start, end in itertools.pairwise(edges):
            rows = slice(start - begin, end - begin)
            block = AttentionMask(values[:, :, rows, :end], is_causal=False)
            parts.append(self._attend_fused(q[:, :, rows], k[:, :, :end], v[:, :, :end], block))
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """The values mixed for one query a row, (b, h, 1, d), each the same bits whatever other rows there are.

        See `RowsCache.of`.
        """
        if mask.lengths is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.values)
        seen = zip(q.split(1), k.split(1), v.split(1), mask.lengths, strict=True)
        rows = [F.scaled_dot_product_attention(q, k.narrow(2, 0, s), v.narrow(2, 0, s)) for q, k, v, s in seen]
        return torch.cat(rows)

    def _attend_fused(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        p = self.attn_dropout.p if self.training else 0.0
        if mask.is_causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.values, dropout_p=p)
        return mixed if mask.values is None else torch.where(mask.values.any(-1, keepdim=True), mixed, 0)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        head_mask: Tensor | None,
        taps: TapCollector | None,
    ) -> tuple[Tensor, Tensor]:
        scores = at_least_float32(q) @ at_least_float32(k).mT / math.sqrt(self.head_dim)
        if taps is not None:
            visible = scores.new_ones((), dtype=torch.bool) if mask is None else mask
            taps(scores=scores, visible=visible.expand(len(q), 1, *scores.shape[2:]))
        if mask is None:
            weights = scores.softmax(-1)
        else:
            scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
            weights = torch.where(mask, scores.softmax(-1), 0)  # a row whose mask is all Out attends to nothing
        weights = self.attn_dropout(weights.to(v.dtype))
        if head_mask is not None:
            weights = weights * head_mask.to(weights.dtype)[:, None, None]
        if taps is not None:
            taps(weights=weights)
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

    def forward(self, x: Tensor, taps: TapCollector | None = None) -> Tensor:
        """The layer's contribution, (b, t, m)."""
        x = self.fc_in(x)
        if taps is not None:
            taps(fc_in=x)
        x = self.activation(x)
        if taps is not None:
            taps(activation=x)
        x = self.resid_dropout(self.fc_out(x))
        if taps is not None:
            taps(fc_out=x)
        return x


class Block(nn.Module):
    """Attention and feed-forward side by side: both read the same normed input."""

    def __init__(self, config: GPTJConfig, *, attn_implementation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, attn_implementation=attn_implementation)
        self.mlp = MLP(config, attn_implementation=attn_implementation)

    def forward(
        self, x: Tensor, *attention_arguments: Any, taps: TapCollector | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (b, t, m), and the attention weights or None."""
        h = self.ln_1(x)
        if taps is not None:
            taps(ln_1=h)
        attended, weights = self.attn(h, *attention_arguments, taps=taps)
        x = attended + self.mlp(h, taps) + x
        if taps is not None:
            taps(sum=x)
        return x, weights


class GPTJModel(PretrainedModel):
    """The bare model: token ids in, hidden states out.

    Args:
        config: the sizes.
        dtype: of the parameters: float32, float64, bfloat16 or float16, as a name or the framework's own.
        param_dtype: the same.
        seed: of the start values, which are the same in all three backends.
        attn_implementation: "eager", the reference, or "sdpa": PyTorch's fused attention, and in float32 the fastest
            matrix products (see `gptj.pt.kernels`).
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
            InputError: see `gptj.calls.inputs.check_call`.
        """
        config = self.config
        call = convert_arguments(
            config,
            self.wte.weight.device,
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
        )
        flags = inputs.output_flags(config, use_cache, output_attentions, output_hidden_states)
        return object_or_tuple(self._run(call, *flags), return_dict, default=config.return_dict)

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The outputs of `forward`."""

    def _run(
        self,
        call: Call,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        taps: TapCollector | None = None,
    ) -> BaseModelOutputWithPast[Tensor]:
        """The outputs of a call whose arguments are checked; `taps` is given what is between."""
        config = self.config
        recompute = self.gradient_checkpointing and self.training and taps is None
        use_cache = use_cache and not recompute

        x = self.wte(call.input_ids) if call.inputs_embeds is None else call.inputs_embeds.to(self.wte.weight.dtype)
        if call.token_type_ids is not None:
            x = x + self.wte(call.token_type_ids)
        x = self.drop(x)
        if taps is not None:
            taps(embedding=x)

        past, (b, t, _) = call.past_key_values, x.shape
        past_length = cache_length(past)
        slots = past_length + torch.arange(t, device=x.device)
        positions = slots[None] if call.position_ids is None else call.position_ids
        rotation = self.rotary(positions.expand(b, -1))
        mask = AttentionMask.of(call.attention_mask, slots, past_length + t)
        factors = None if call.head_mask is None else call.head_mask.expand(config.n_layer, config.n_head)

        cache = CacheBuilder(past)
        hidden, attentions = [], []
        for n, block in enumerate(self.h):
            if output_hidden_states:
                hidden.append(x)
            update_cache = cache.update_of(n, use_cache)
            arguments = (rotation, mask, update_cache, None if factors is None else factors[n], output_attentions)
            if recompute:
                x, weights = checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x, weights = block(x, *arguments) if taps is None else block(x, *arguments, taps=taps.in_block(n))
            attentions.append(weights)
        x = self.ln_f(x)
        if taps is not None:
            taps(ln_f=x)

        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache.build(past_length + t) if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _run_together(self, calls: Sequence[Any]) -> list[Tensor]:
        """The hidden states (b, t, m) of several calls, which all have a cache, positions and no more than they need.

        Their tokens are one stream (1, n, m), so that each matrix is read once; attention alone parts them.
        """
        masks: list[AttentionMask] = []
        updates: list[Callable[[int], UpdateCache]] = []
        shapes = [(len(call.input_ids), call.input_ids.shape[1]) for call in calls]
        for call, (_, t) in zip(calls, shapes, strict=True):
            past: KVCache | RowsCache = call.past_key_values
            if isinstance(past, RowsCache):
                masks.append(past.mask)
                updates.append(past.update_of)
                continue
            slots = past.length + torch.arange(t, device=self.wte.weight.device)
            masks.append(AttentionMask.of(call.attention_mask, slots, past.length + t))
            updates.append(CacheBuilder(past).update_of)
        joined = JoinedCalls(masks, shapes)
        x = self.wte(joined.join(call.input_ids for call in calls))
        rotation = self.rotary(joined.join(call.position_ids for call in calls))
        for n, block in enumerate(self.h):
            update_caches = joined.update_all([update_of(n) for update_of in updates])
            x, _ = block(x, rotation, joined, update_caches, None, False)
        return joined.part(self.ln_f(x))

    def _rotation_of(self, position_ids: Any) -> tuple[Tensor, Tensor]:
        return self.rotary(torch.as_tensor(position_ids, device=self.rotary.sin.device))

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> Tensor:
        """The hidden states (b, t, m); a hook."""
        call = convert_arguments(self.config, self.wte.weight.device, **given)
        return self._run(call, False, False, False, taps=collector).last_hidden_state

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of fixed capacity, written in place: n_layer pairs of (b, h, max_length, d).

        Raises:
            InputError: max_length is more than n_positions, or a size is below 1.
        """
        inputs.check_cache_size(self.config, batch_size, max_length)
        shape = (batch_size, self.h[0].attn.n_head, max_length, self.config.head_dim)
        held = zeros(2 * len(self.h), shape, self.wte.weight)
        return KVCache(tuple(held[::2]), tuple(held[1::2]), 0, fixed=True)
