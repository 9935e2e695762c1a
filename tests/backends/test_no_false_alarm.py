"""No false alarm: of random models in every dtype, a wing's trace is within what rounding explains, tap by tap."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj.checkpoint import write_checkpoint
from gptj.config import ACTIVATIONS
from gptj.config.schema import schema
from gptj.parity.differences import compare_traces
from gptj.parity.oracle import Oracle, positions_of_mask
from gptj.parity.revealing import revealing_config, revealing_tensor
from gptj.parity.run import open_reference
from gptj.parity.trace import TraceFacts, open_trace, write_trace
from gptj.parity.trace_record import record_trace

MODELS = {"pt": 25, "tf": 12, "flax": 4}
"""Of the suite; GPTJ_RANDOM_MODELS says another number. Flax compiles each shape, which takes two seconds."""


@st.composite
def models(draw):
    """A config, a dtype, a seed, how loud the kernels are, and a batch."""
    heads, width = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8, 16]))
    config = revealing_config(
        n_head=heads, n_embd=heads * width, rotary_dim=draw(st.sampled_from([2, 4])),
        n_inner=draw(st.sampled_from([8, 40, 130])), n_layer=draw(st.integers(1, 4)),
        vocab_size=draw(st.sampled_from([11, 216])), bos_token_id=None, eos_token_id=None, pad_token_id=None,
        activation_function=draw(st.sampled_from(ACTIVATIONS)),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-6, 1e-3])), tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 16))
    mask = np.ones((rows, length), np.int64)
    mask[-1, : draw(st.integers(0, length - 1))] = 0
    seed = draw(st.integers(0, 2**31))
    ids = np.random.Generator(np.random.Philox(seed)).integers(0, config.vocab_size, (rows, length))
    first = draw(st.sampled_from([0, 300, 1_900]))
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of_mask(mask) + first, "labels": ids}
    dtype, loud = draw(st.sampled_from(["float32", "bfloat16", "float16"])), draw(st.sampled_from([0.3, 1.0, 3.0]))
    return config, dtype, seed, np.float32(loud), batch


def test_rounding_alone_raises_no_alarm_in_the_wing(wing):
    count = int(os.environ.get("GPTJ_RANDOM_MODELS", MODELS[wing.name]))

    @settings(max_examples=count, deadline=None, derandomize=count == MODELS[wing.name], database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(models())
    def no_alarm(model):
        config, dtype, seed, loud, batch = model

        def fill(spec):
            values = revealing_tensor(spec, seed)
            return values if "ln_" in spec.name else values * loud

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(folder / "model", config, fill)
            record_trace(folder / "model", wing.name, folder / "trace", dtype=dtype, batch=batch)
            _, read = open_reference(folder / "model")
            weights = {spec.name: read(spec.name, dtype).astype(np.float64) for spec in schema(config)}
            taps = Oracle(config, weights).taps(**batch)
            write_trace(folder / "oracle", taps, TraceFacts("oracle", "float64", config), inputs=batch)
            traces = [open_trace(folder / name) for name in ("oracle", "trace")]
            found = compare_traces(traces, lambda name, _: weights[name])
            assert found.passed, [*found.lines()]

    no_alarm()
