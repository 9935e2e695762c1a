"""GPT-J a second time, one number at a time, so that the oracle itself is checked by something.

This is deliberately naive and shares no code with `gptj.parity.oracle`: no batch, no broadcasting, no table, a loop
for every head, position and pair, and each line names the equation that it is. It is read against the papers;
the oracle is then held to it within 1e-12, and the backends to the oracle.

    [GPT-J]  Wang and Komatsuzaki 2021, mesh_transformer/layers.py and transformer_shard.py of the original code
    [RoPE]   Su et al. 2021, arXiv:2104.09864
    [Attn]   Vaswani et al. 2017, arXiv:1706.03762
    [LN]     Ba, Kiros and Hinton 2016, arXiv:1607.06450
    [GELU]   Hendrycks and Gimpel 2016, arXiv:1606.08415
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj import GPTJConfig

Vector = NDArray[np.float64]

MESH_FIXTURE = Path(__file__).parents[1] / "data" / "mesh_mp2"
"""A checkpoint that the original code trained and wrote, and what the original model computed from it."""

MESH_CONFIG = {"vocab_size": 160, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8}
"""Its config in our names."""


def mesh_weights() -> dict[str, NDArray[np.float32]]:
    """The fixture's float32 weights under their canonical names, as the original's own converter wrote them."""
    with np.load(MESH_FIXTURE / "hf_state_dict_fp32.npz") as file:
        return {name: file[name] for name in file.files}


def mesh_outputs() -> dict[str, NDArray[Any]]:
    """What the original model computed: inputs, and for each of its dtypes logits, losses and greedy tokens."""
    with np.load(MESH_FIXTURE / "reference_outputs.npz") as file:
        return {name: file[name] for name in file.files}


def reference_logits(
    config: GPTJConfig,
    weights: Mapping[str, NDArray[Any]],
    tokens: Sequence[int],
    *,
    visible: Sequence[bool] | None = None,
    positions: Sequence[int] | None = None,
) -> Vector:
    """The logits (t, v) of one sequence. `visible` is False for padding; `positions` default to 0, 1, 2, ..."""
    visible = [True] * len(tokens) if visible is None else visible
    positions = range(len(tokens)) if positions is None else positions

    def w(name: str) -> Vector:
        return np.asarray(weights[name], np.float64)

    # [GPT-J] the stream begins as the token's row of the embedding; no position is added to it.
    stream = [w("transformer.wte.weight")[token] for token in tokens]

    for layer in range(config.n_layer):
        at = f"transformer.h.{layer}."
        # [GPT-J] one layer norm feeds both branches of the block.
        normed = [layer_norm(x, w(at + "ln_1.weight"), w(at + "ln_1.bias"), config.layer_norm_epsilon) for x in stream]
        attended = attention(config, at, w, normed, visible, positions)
        # [GPT-J] feed-forward: W_out gelu(W_in h + b_in) + b_out.
        fed = [
            w(at + "mlp.fc_out.weight")
            @ np.array([gelu_new(z) for z in w(at + "mlp.fc_in.weight") @ h + w(at + "mlp.fc_in.bias")])
            + w(at + "mlp.fc_out.bias")
            for h in normed
        ]
        # [GPT-J] parallel residual: both branches read the same h, and both are added to x.
        stream = [a + f + x for a, f, x in zip(attended, fed, stream, strict=True)]

    final = [
        layer_norm(x, w("transformer.ln_f.weight"), w("transformer.ln_f.bias"), config.layer_norm_epsilon)
        for x in stream
    ]
    # [GPT-J] the projection to the vocabulary has a bias.
    return np.array([w("lm_head.weight") @ x + w("lm_head.bias") for x in final])


def attention(
    config: GPTJConfig, at: str, w: Any, normed: list[Vector], visible: Sequence[bool], positions: Sequence[int]
) -> list[Vector]:
    """[Attn] section 3.2.2: every head attends on its own dimensions; the heads are joined, then projected."""
    d = config.n_embd // config.n_head
    width = d if config.rotary_dim is None else min(config.rotary_dim, d)
    # [GPT-J] q, k, v and the output projection have no bias.
    q, k, v = ([w(f"{at}attn.{kind}_proj.weight") @ h for h in normed] for kind in "qkv")
    joined = [np.zeros(config.n_embd) for _ in normed]
    for head in range(config.n_head):
        mine = slice(head * d, (head + 1) * d)
        queries = [rotated(x[mine], p, width) for x, p in zip(q, positions, strict=True)]
        keys = [rotated(x[mine], p, width) for x, p in zip(k, positions, strict=True)]
        for t, query in enumerate(queries):
            # [Attn] equation 1, over the positions s <= t that are no padding; none of them: nothing is attended to.
            seen = [s for s in range(t + 1) if visible[s]]
            scores = [float(query @ keys[s]) / math.sqrt(d) for s in seen]
            total = math.fsum(math.exp(score - max(scores)) for score in scores)
            for s, score in zip(seen, scores, strict=True):
                joined[t][mine] += math.exp(score - max(scores)) / total * v[s][mine]
    return [w(f"{at}attn.out_proj.weight") @ x for x in joined]


def rotated(x: Vector, position: int, width: int) -> Vector:
    """[RoPE] equation 15: pair i of the first `width` dimensions turns by position * 10000^(-2i/width)."""
    y = x.copy()
    for i in range(width // 2):
        angle = position * 10000.0 ** (-2 * i / width)
        # [RoPE] equation 13, the rotation matrix; [GPT-J] the pair is (2i, 2i + 1), "rotate every two".
        y[2 * i] = x[2 * i] * math.cos(angle) - x[2 * i + 1] * math.sin(angle)
        y[2 * i + 1] = x[2 * i] * math.sin(angle) + x[2 * i + 1] * math.cos(angle)
    return y


def layer_norm(x: Vector, scale: Vector, offset: Vector, epsilon: float) -> Vector:
    """[LN] equation 4, with the epsilon inside the root."""
    mean = math.fsum(x) / len(x)
    variance = math.fsum((value - mean) ** 2 for value in x) / len(x)
    return np.array([(value - mean) / math.sqrt(variance + epsilon) for value in x]) * scale + offset


def gelu_new(z: float) -> float:
    """[GELU] section 2, the approximation by tanh."""
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def reference_loss(logits: Vector, labels: Sequence[int]) -> float:
    """The mean of -log p(label t+1 | tokens to t), labels of -100 not counted."""
    losses = []
    for row, label in zip(logits[:-1], labels[1:], strict=True):
        if label != -100:
            largest = max(row)
            log_sum = largest + math.log(math.fsum(math.exp(value - largest) for value in row))
            losses.append(log_sum - row[label])
    return math.fsum(losses) / len(losses)
