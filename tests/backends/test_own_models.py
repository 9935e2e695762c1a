"""The programs of docs/recording.md for a model of one's own, run on one in each framework that is none of ours.

The models are the beginning of a block: embedding, layer norm, queries and their rotation. A mistake in one is named.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pages import block
from recorded import facts_of, inputs_of, recorded_taps, small_batch

from gptj.checkpoint import write_checkpoint
from gptj.config.rotary import rotary_rows
from gptj.parity.differences import compare_traces
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.run import open_reference
from gptj.parity.tap_names import TapNames
from gptj.parity.trace import open_trace, write_trace

CONFIG = revealing_config(n_layer=1, n_positions=512)
BATCH = small_batch(CONFIG)
WEIGHTS = revealing_weights(CONFIG)
AT = "transformer.h.0."
HEADS, WIDTH = CONFIG.n_head, CONFIG.rotary_width
HEADINGS = {
    "pt": "A PyTorch module of your own",
    "tf": "A Keras model of your own",
    "flax": "A Flax module of your own",
}


def turn(x: Any, positions: Any, make: Any, stack: Any, join: Any, sign: float) -> Any:
    """x (b, t, h, d) with its pairs turned, by functions that make an array, stack on a last axis and join the last."""
    sin, cos = (make(values[:, :, None]) for values in rotary_rows(np.asarray(positions), WIDTH, "float32"))
    even, odd = x[..., 0:WIDTH:2], x[..., 1:WIDTH:2]
    pairs = stack([even * cos - sign * odd * sin, odd * cos + sign * even * sin])
    return join([pairs, x[..., WIDTH:]])


def pytorch_model(sign: float) -> dict[str, Any]:
    import torch
    from torch import nn

    class Start(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(CONFIG.n_embd, CONFIG.layer_norm_epsilon)
            self.query = nn.Linear(CONFIG.n_embd, CONFIG.n_embd, bias=False)
            self.turned = nn.Identity()

        def forward(self, x: Any, positions: Any) -> Any:
            q = self.query(self.norm(x)).unflatten(-1, (HEADS, -1))
            stack = lambda parts: torch.stack(parts, -1).flatten(-2)  # noqa: E731
            return self.turned(turn(q, positions, torch.tensor, stack, lambda parts: torch.cat(parts, -1), sign))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(CONFIG.vocab_size, CONFIG.n_embd), nn.ModuleList([Start()])

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
            return self.blocks[0](self.embed(input_ids), position_ids)

    model = Model()
    tensors = {name: torch.tensor(values) for name, values in WEIGHTS.items()}
    model.load_state_dict({
        "embed.weight": tensors["transformer.wte.weight"], "blocks.0.query.weight": tensors[f"{AT}attn.q_proj.weight"],
        "blocks.0.norm.weight": tensors[f"{AT}ln_1.weight"], "blocks.0.norm.bias": tensors[f"{AT}ln_1.bias"],
    })  # fmt: skip
    return {"model": model}


def keras_model(sign: float) -> dict[str, Any]:
    import keras
    from keras import ops

    class Turn(keras.layers.Layer):
        def call(self, x: Any, positions: Any) -> Any:
            def stack(parts: Any) -> Any:
                return ops.reshape(ops.stack(parts, -1), (*parts[0].shape[:-1], WIDTH))

            return turn(x, positions, ops.convert_to_tensor, stack, lambda parts: ops.concatenate(parts, -1), sign)

    class Block(keras.layers.Layer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.norm = keras.layers.LayerNormalization(epsilon=CONFIG.layer_norm_epsilon, name="norm")
            self.query = keras.layers.Dense(CONFIG.n_embd, use_bias=False, name="query")
            self.turned = Turn(name="turned")

        def call(self, x: Any, positions: Any) -> Any:
            q = self.query(self.norm(x))
            return self.turned(ops.reshape(q, (*q.shape[:2], HEADS, -1)), positions)

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="model")
            self.embed = keras.layers.Embedding(CONFIG.vocab_size, CONFIG.n_embd, name="embed")
            self.first = Block(name="block_0")

        def call(self, asked: Any) -> Any:
            return self.first(self.embed(asked["input_ids"]), asked["position_ids"])

    model = Model()
    model({name: values for name, values in inputs_of(BATCH).items() if name != "labels"})
    model.embed.set_weights([WEIGHTS["transformer.wte.weight"]])
    model.first.norm.set_weights([WEIGHTS[f"{AT}ln_1.weight"], WEIGHTS[f"{AT}ln_1.bias"]])
    model.first.query.set_weights([WEIGHTS[f"{AT}attn.q_proj.weight"].T])
    return {"model": model}


def flax_model(sign: float) -> dict[str, Any]:
    import jax.numpy as jnp
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, positions: Any) -> Any:
            x = nn.LayerNorm(epsilon=CONFIG.layer_norm_epsilon, name="norm", use_fast_variance=False)(x)
            q = nn.Dense(CONFIG.n_embd, use_bias=False, name="query")(x).reshape(*x.shape[:2], HEADS, -1)
            stack = lambda parts: jnp.stack(parts, -1).reshape(*parts[0].shape[:-1], WIDTH)  # noqa: E731
            q = turn(q, positions, jnp.asarray, stack, lambda parts: jnp.concatenate(parts, -1), sign)
            self.sow("intermediates", "turned", q)
            return q

    class Model(nn.Module):
        @nn.compact
        def __call__(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
            x = nn.Embed(CONFIG.vocab_size, CONFIG.n_embd, name="embed")(input_ids)
            return Block(name="block_0")(x, position_ids)

    norm = {"scale": WEIGHTS[f"{AT}ln_1.weight"], "bias": WEIGHTS[f"{AT}ln_1.bias"]}
    query = {"kernel": WEIGHTS[f"{AT}attn.q_proj.weight"].T}
    params = {"embed": {"embedding": WEIGHTS["transformer.wte.weight"]}, "block_0": {"norm": norm, "query": query}}
    return {"module": Model(), "params": params}


MODELS = {"pt": pytorch_model, "tf": keras_model, "flax": flax_model}
MAPS = {
    "pt": ("embed", "blocks.{block}", ""),
    "tf": ("model/embed", "model/block_{block}", 'ignore = ["model/block_{block}"]\n'),
    "flax": ("embed", "block_{block}", 'ignore = ["block_{block}"]\n'),
}


def mapping(backend: str) -> str:
    """The page's map, in the names that the framework gives."""
    embed, within, ignored = MAPS[backend]
    text = block("recording.md", HEADINGS["pt"], "toml").replace('"embed"', f'"{embed}"')
    if backend == "tf":
        text = text.replace("{block}.norm", "{block}/norm").replace("{block}.query", "{block}/query")
        text = text.replace("{block}.turned", "{block}/turned")
    ignored = ignored or 'ignore = ["blocks.{block}"]\n'
    return ignored + text.replace("blocks.{block}", within)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_pages_program_records_a_model_of_ones_own(wing, tmp_path, monkeypatch, sign):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("model", CONFIG, revealing_fill())
    asked = {name: values for name, values in inputs_of(BATCH).items() if name != "labels"}
    write_trace("base.safetensors", recorded_taps(CONFIG, BATCH), facts_of(CONFIG), inputs=asked)
    exec(block("recording.md", HEADINGS[wing.name]), MODELS[wing.name](sign))
    (tmp_path / "names.toml").write_text(mapping(wing.name))
    theirs = open_trace("theirs.safetensors", TapNames.find("names.toml"))
    assert [*theirs.places] == ["embedding", "h.0.ln_1", "h.0.q", "h.0.q_rotated"]
    _, read = open_reference("model")
    found = compare_traces([open_trace("base.safetensors"), theirs], read)
    if sign == 1:
        assert found.passed, [*found.lines()]
    else:
        assert found.pairs[0].headline.endswith("looks like: rotary sign")
