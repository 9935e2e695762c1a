"""The oracle: GPT-J in plain NumPy, from the equations, in float64. What every backend is compared with.

It is slow and it is simple, and it reads top to bottom: `forward` is the model. Nothing is fused, cached or
compiled, so that a reader can check each line against its equation:

* Wang and Komatsuzaki 2021, GPT-J-6B: the parallel block, x + attn(ln(x)) + mlp(ln(x)), one layer norm a block.
* Su et al. 2021 (arXiv:2104.09864), equation 34: the rotary embedding, on interleaved pairs.
* Vaswani et al. 2017 (arXiv:1706.03762), equation 1: softmax(q k' / sqrt(d)) v.
* Ba et al. 2016 (arXiv:1607.06450): layer normalisation; Hendrycks and Gimpel 2016 (arXiv:1606.08415): GELU.

Weights are read one at a time through `read`, when they are needed, and forgotten: a forward pass of the 6B
model holds one matrix, not one model. Every step is a method of its own, which is what lets the tests plant the
classic mistakes one by one and see that each is caught (`tests/support/mutants.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gptj.calls.inputs import check_call
from gptj.calls.taps import TapCollector, choose_taps
from gptj.config import GPTJConfig
from gptj.config.rotary import rotary_rows, rotate_pairs
from gptj.config.schema import BASE_PREFIX
from gptj.errors import InputError
from gptj.generation.scoring import Score, windows_of
from gptj.generation.scoring.sequences import Prefix, sequences_of
from gptj.generation.scoring.windows import limits_of
from gptj.parity.losses import causal_lm_loss, classification_loss, question_answering_loss, token_losses

__all__ = [
    "Oracle",
    "OracleOutput",
    "Read",
    "activation",
    "causal_lm_loss",
    "classification_loss",
    "positions_of_mask",
    "question_answering_loss",
    "token_losses",
]

Array = NDArray[Any]
Read = Callable[[str], Any]
"""From a tensor's canonical name to its values, anything that `numpy.asarray` takes."""


@dataclasses.dataclass(frozen=True)
class OracleOutput:
    """The output of a forward pass, all in the oracle's dtype.

    Attributes:
        logits: (b, t, v) of lm_head; None where the head was not asked for.
        hidden_states: n_layer + 1 arrays (b, t, m). Entry i is what block i reads; the last is ln_f's output,
            as in transformers (so the last block's own output is not among them).
        attentions: n_layer arrays (b, h, t, s) of attention weights, or () where they were not asked for.
    """

    logits: Array | None
    hidden_states: tuple[Array, ...]
    attentions: tuple[Array, ...]


class Oracle:
    """A GPT-J whose every step is an equation.

    Args:
        config: the sizes and options.
        read: a mapping or a function from a tensor's name to its values. Names are those of a model with a head
            (`transformer.wte.weight`); with `bare=True`, those of a GPTJModel (`wte.weight`).
        dtype: what everything is computed in, "float64" or "float32". float32 shows what rounding alone does.
        bare: whether names lack the prefix `transformer.`.
        adapter: a LoRA adapter's scale, A (r, in) and B (out, r), by the layer: `h.0.attn.q_proj`.

    >>> config = GPTJConfig(vocab_size=7, n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    >>> from gptj.config.schema import schema
    >>> weights = {row.name: np.full(row.shape, 0.5) for row in schema(config)}
    >>> Oracle(config, weights).forward([[1, 2, 3]]).logits.shape
    (1, 3, 7)
    """

    def __init__(
        self,
        config: GPTJConfig,
        read: Mapping[str, Any] | Read,
        *,
        dtype: DTypeLike = "float64",
        bare: bool = False,
        adapter: Mapping[str, tuple[float, Any, Any]] | None = None,
    ) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self._read: Read = read.__getitem__ if isinstance(read, Mapping) else read
        self._prefix = "" if bare else BASE_PREFIX
        self._adapter = adapter or {}
        self._collector: TapCollector | None = None

    # ---- the model

    def forward(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        token_type_ids: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        head_mask: ArrayLike | None = None,
        logits: bool = True,
        attentions: bool = False,
    ) -> OracleOutput:
        """The logits of every position, and what stood between.

        Args:
            input_ids: (b, t) token ids.
            attention_mask: (b, t), 1 In, 0 Out; None is all In.
            position_ids: (b, t) or (1, t); None counts 0, 1, 2 ... from the left, padding included, which is
                transformers' meaning. `positions_of_mask` gives the positions that generation uses.
            token_type_ids: (b, t); their embeddings, from the same table, are added.
            inputs_embeds: (b, t, m) in place of input_ids.
            head_mask: (h,) or (n_layer, h), a factor for each head's attention weights.
            logits: whether to apply lm_head.
            attentions: whether to keep the attention weights.

        Raises:
            InputError: an argument breaks its rule, as in every backend.
        """
        ids = None if input_ids is None else np.asarray(input_ids)
        embeds = None if inputs_embeds is None else np.asarray(inputs_embeds, self.dtype)
        types, mask, positions, heads = (
            None if value is None else np.asarray(value)
            for value in (token_type_ids, attention_mask, position_ids, head_mask)
        )
        check_call(
            self.config,
            np.asarray,
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            token_type_ids=types,
            position_ids=positions,
            head_mask=heads,
        )
        x = embeds if embeds is not None else self.embed(ids)
        if types is not None:
            x = x + self.embed(types)
        self._keep(embedding=x)
        b, t, _ = x.shape
        if positions is None:
            positions = np.arange(t)[None]
        positions = np.broadcast_to(positions, (b, t))
        visible = self.visible_keys(t, None if mask is None else mask.astype(bool))
        factors = None
        if heads is not None:
            factors = np.broadcast_to(heads.astype(self.dtype), (self.config.n_layer, self.config.n_head))

        states, kept = [x], []
        for layer in range(self.config.n_layer):
            x, weights = self.block(layer, x, visible, positions, None if factors is None else factors[layer])
            self._keep(f"h.{layer}.", sum=x)
            states.append(x)
            if attentions:
                kept.append(weights)
        states[-1] = self.layer_norm(f"{self._prefix}ln_f", x)
        self._keep(ln_f=states[-1])
        return OracleOutput(self.lm_head(states[-1]) if logits else None, tuple(states), tuple(kept))

    def taps(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        labels: ArrayLike | None = None,
        names: str | Iterable[str] | None = None,
    ) -> dict[str, Array]:
        """The intermediate values of a forward pass by the names of `gptj.calls.taps`."""
        absent = ("loss",) if labels is None else ()
        chosen = choose_taps(names, self.config.n_layer, absent=absent)
        oracle, collector = copy.copy(self), TapCollector(chosen)
        oracle._collector = collector
        logits = oracle.forward(input_ids, attention_mask, position_ids, logits=collector.asks("logits", "loss")).logits
        if logits is not None:
            collector(logits=logits)
            if labels is not None:
                collector(loss=np.asarray(causal_lm_loss(logits, labels), self.dtype))
        return {name: collector.kept[name] for name in chosen}

    def _keep(self, prefix: str = "", **values: Array) -> None:
        """Hand values over to whom `taps` asks for; in any other call there is nobody."""
        if self._collector is not None:
            TapCollector(self._collector.names, prefix, self._collector.kept)(**values)

    def embed(self, ids: Any) -> Array:
        """Rows of the token embedding, (b, t) -> (b, t, m). Positions have no embedding in GPT-J."""
        rows: Array = np.asarray(self._read(f"{self._prefix}wte.weight"))[ids]
        return rows.astype(self.dtype)

    def visible_keys(self, t: int, mask: Array | None) -> Array:
        """Which position may attend to which, (b or 1, 1, t, s): causal and, where there is a mask, not padding."""
        causal = np.tril(np.ones((t, t), bool))[None, None]
        return causal if mask is None else causal & mask[:, None, None, :]

    def block(
        self, layer: int, x: Array, visible: Array, positions: Array, factors: Array | None
    ) -> tuple[Array, Array]:
        """Block `layer` of x, and its attention weights: attn(h) + mlp(h) + x with h = ln_1(x), in that order."""
        name = f"{self._prefix}h.{layer}."
        h = self.layer_norm(f"{name}ln_1", x)
        attended, weights = self.attention(f"{name}attn.", h, visible, positions, factors)
        return attended + self.mlp(f"{name}mlp.", h) + x, weights

    def layer_norm(self, name: str, x: Array) -> Array:
        """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis; the variance in two passes."""
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        normal = centred / np.sqrt(variance + self.config.layer_norm_epsilon)
        y: Array = normal * self.read(f"{name}.weight") + self.read(f"{name}.bias")
        return y

    def attention(
        self, name: str, h: Array, visible: Array, positions: Array, factors: Array | None
    ) -> tuple[Array, Array]:
        """Multi-head attention of h (b, t, m), and its weights (b, h, t, s). No projection has a bias."""
        k, v, q = (self.split_heads(self.linear(f"{name}{kind}_proj", h)) for kind in "kvq")  # the schema's order
        block = name.removeprefix(self._prefix).removesuffix("attn.")
        self._keep(block, ln_1=h, q=q, k=k, v=v)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        scores = self.scores(q, k)
        self._keep(block, q_rotated=q, k_rotated=k, scores=scores)
        weights = self.attention_weights(scores, visible)
        if factors is not None:
            weights = weights * factors[:, None, None]
        merged = np.swapaxes(weights @ v, 1, 2).reshape(h.shape)
        out = self.linear(f"{name}out_proj", merged)
        visible = np.broadcast_to(visible, (len(h), *visible.shape[1:]))
        self._keep(block, visible=visible, weights=weights, mixed=merged, out_proj=out)
        return out, weights

    def split_heads(self, x: Array) -> Array:
        """(b, t, m) -> (b, h, t, d): head n owns the n-th run of d consecutive dimensions."""
        b, t, _ = x.shape
        return np.swapaxes(x.reshape(b, t, self.config.n_head, self.config.head_dim), 1, 2)

    def rotary(self, positions: Array) -> tuple[Array, Array]:
        """The sines and cosines of `positions`, (b, t) -> twice (b, 1, t, rotary_width / 2)."""
        sin, cos = rotary_rows(positions, self.config.rotary_width, str(self.dtype))
        return sin[:, None], cos[:, None]

    def rotate(self, x: Array, positions: Array) -> Array:
        """x (b, h, t, d) with each interleaved pair of its first rotary_width dimensions turned.

        Pair i at position p turns by a = p * base^(-2i / width): (x0, x1) becomes (x0 cos a - x1 sin a,
        x1 cos a + x0 sin a). Dimensions past rotary_width stay.
        """
        return rotate_pairs(x, *self.rotary(positions))

    def scores(self, q: Array, k: Array) -> Array:
        """q k' / sqrt(d), (b, h, t, s)."""
        scores: Array = q @ np.swapaxes(k, -1, -2)
        return scores / math.sqrt(self.config.head_dim)

    def attention_weights(self, scores: Array, visible: Array) -> Array:
        """Softmax over the visible keys, and exactly 0 elsewhere.

        So a query that sees no key (a padded position that only sees padding) attends to nothing. Without
        the second `where` it would attend evenly to every slot, and its value would hang on how many there are.
        """
        scores = np.where(visible, scores, np.finfo(self.dtype).min)
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        return np.where(visible, exponentials / exponentials.sum(-1, keepdims=True), 0)

    def mlp(self, name: str, h: Array) -> Array:
        """fc_out(activation(fc_in(h))), both with bias."""
        inner = self.linear(f"{name}fc_in", h, bias=True)
        activated = activation(self.config.activation_function, inner)
        out = self.linear(f"{name}fc_out", activated, bias=True)
        self._keep(name.removeprefix(self._prefix).removesuffix("mlp."), fc_in=inner, activation=activated, fc_out=out)
        return out

    def linear(self, name: str, x: Array, *, bias: bool = False) -> Array:
        """x W' (+ bias): weights are stored output axis first."""
        y: Array = x @ self.read(f"{name}.weight").T + self.adapted(name.removeprefix(self._prefix), x)
        return y + self.read(f"{name}.bias") if bias else y

    def adapted(self, name: str, x: Array) -> Any:
        """The adapter's part of a layer's output, scale B (A x), Hu et al. 2021 (arXiv:2106.09685), equation 3."""
        pair = self.adapter_of(name)
        if pair is None:
            return 0
        scale, a, b = pair
        return self.scaled(scale, x @ np.asarray(a, self.dtype).T @ np.asarray(b, self.dtype).T)

    def adapter_of(self, name: str) -> tuple[float, Any, Any] | None:
        """The adapter's scale, A and B beside a layer, None where there are none."""
        return self._adapter.get(name.removeprefix(self._prefix))

    def scaled(self, scale: float, added: Array) -> Array:
        """The product of an adapter's matrices, times its scale."""
        return scale * added

    def read(self, name: str) -> Array:
        """The tensor `name` in the oracle's dtype."""
        return np.asarray(self._read(name)).astype(self.dtype, copy=False)

    # ---- heads

    def lm_head(self, hidden: Array) -> Array:
        """Logits over the vocabulary, (b, t, m) -> (b, t, v). A tied head shares wte.weight and keeps its own bias."""
        tied = self.config.tie_word_embeddings
        weight = self.read(f"{self._prefix}wte.weight" if tied else "lm_head.weight")
        logits: Array = hidden @ weight.T + self.read("lm_head.bias")
        return logits

    def classify(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **options: Any) -> Array:
        """Logits over the labels, (b, num_labels): `score`, read at each row's last token that is not padding.

        As in transformers, padding is told by the token: the last one that is not pad_token_id counts, wherever
        the padding stands; without a pad_token_id, the last of all.
        """
        ids = np.asarray(input_ids)
        output = self.forward(ids, attention_mask, logits=False, **options)
        every = self.linear("score", output.hidden_states[-1])
        b, t = ids.shape
        pad = self.config.pad_token_id
        last = np.full(b, t - 1) if pad is None else (np.arange(t) * (ids != pad)).argmax(-1)
        pooled: Array = every[np.arange(b), last]
        return pooled

    def answer(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **options: Any
    ) -> tuple[Array, Array]:
        """Start and end logits of an answer's span, each (b, t): the two columns of `qa_outputs`."""
        output = self.forward(input_ids, attention_mask, logits=False, **options)
        span = self.linear("qa_outputs", output.hidden_states[-1], bias=True)
        return span[..., 0], span[..., 1]

    # ---- scoring

    def score(
        self,
        texts: Any,
        continuations: Any = None,
        *,
        tokenizer: Any = None,
        prefix_token_id: Prefix = "bos",
        max_length: int | None = None,
        stride: int | None = None,
    ) -> list[Score]:
        """The log-likelihood of every token of each text, or of its continuation, window by window without padding.

        The arguments are those of a model's `score` (see `gptj.generation.scoring.Scores`).
        """
        limits = limits_of(self.config, max_length, stride)
        scores = []
        for one in sequences_of(self.config, texts, continuations, tokenizer, prefix_token_id):
            values, greedy = [0.0][:0], [True][:0]
            for window in windows_of(one.token_ids, one.first, limits):
                logits = self.forward([window.token_ids]).logits
                assert logits is not None
                scored, targets = logits[0, -len(window.targets) :], np.array(window.targets)
                values += (-token_losses(scored, targets)).tolist()
                greedy += (scored.argmax(-1) == targets).tolist()
            ids = np.array(one.token_ids[one.first :], np.int64)
            scores.append(Score(ids, np.array(values, np.float64), np.array(greedy, bool), one.n_bytes))
        return scores

    # ---- generation

    def generate(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, max_new_tokens: int,
        guess: ArrayLike | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Greedy continuation without a cache: the sequences (b, t + n), and each step's logits (b, n, v).

        Every step runs the whole sequence again. Positions are `positions_of_mask`; the lowest id wins a tie;
        nothing stops early.

        Args:
            input_ids, attention_mask: (b, t).
            max_new_tokens: n.
            guess: (b, n) or fewer tokens that may be the answer: as far as they are, one pass gives all their steps.
        """
        ids = np.asarray(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        guess = np.zeros((len(ids), 0), ids.dtype) if guess is None else np.asarray(guess)[:, : max_new_tokens - 1]
        steps: list[Array] = []
        while len(steps) < max_new_tokens:
            t = ids.shape[1]
            whole = np.concatenate([ids, guess.astype(ids.dtype)], 1)
            seen = np.concatenate([mask, np.ones((len(ids), guess.shape[1]), mask.dtype)], 1)
            logits = self.forward(whole, seen, positions_of_mask(seen)).logits
            assert logits is not None
            chosen = logits[:, t - 1 :].argmax(-1).astype(ids.dtype)
            wrong = np.flatnonzero((chosen[:, : guess.shape[1]] != guess).any(0))
            right = int(wrong[0]) if wrong.size else guess.shape[1]
            steps += [logits[:, t - 1 + step] for step in range(right + 1)]
            ids = np.concatenate([ids, chosen[:, : right + 1]], 1)
            mask = np.concatenate([mask, np.ones((len(ids), right + 1), mask.dtype)], 1)
            guess = guess[:, :0]  # what follows a wrong token was guessed of another text
        return ids, np.stack(steps, 1)


def positions_of_mask(attention_mask: ArrayLike) -> Array:
    """Positions that count only the tokens that are In, (b, t): what generation uses with padded prompts.

    Padding gets position 0, which nothing sees.

    >>> positions_of_mask([[0, 0, 1, 1, 1]]).tolist()
    [[0, 0, 0, 1, 2]]
    """
    positions: Array = np.maximum(np.asarray(attention_mask, np.int64).cumsum(-1) - 1, 0)
    return positions


# ---- activations


def activation(name: str, x: Array) -> Array:
    """The activation function `name` (one of `gptj.config.ACTIVATIONS`) of x, in x's dtype."""
    function = _ACTIVATIONS.get(name)
    if function is None:
        raise InputError("no such activation", where=name, expected="one of " + ", ".join(_ACTIVATIONS))
    y: Array = function(x).astype(x.dtype, copy=False)
    return y


def _gelu(x: Array) -> Array:
    """x times the normal distribution's integral up to x, exactly (by the error function)."""
    integral = np.array([math.erf(value / math.sqrt(2)) for value in x.flat], x.dtype).reshape(x.shape)
    y: Array = 0.5 * x * (1 + integral)
    return y


def _gelu_tanh(x: Array) -> Array:
    """GELU by tanh, the 2016 paper's approximation; GPT-J's own."""
    cube = x * x * x  # x**3 takes NumPy ten times as long as all the rest
    y: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * cube)))
    return y


def _gelu_fast(x: Array) -> Array:
    """The same with sqrt(2 / pi) rounded to ten digits, as transformers spells "gelu_fast"."""
    y: Array = 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))
    return y


def _silu(x: Array) -> Array:
    """x times its sigmoid; exp only of what is not positive, so nothing overflows."""
    small = np.exp(-np.abs(x))
    y: Array = x * np.where(x >= 0, 1, small) / (1 + small)
    return y


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _tanh(x: Array) -> Array:
    y: Array = np.tanh(x)
    return y


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
    "tanh": _tanh,
}
