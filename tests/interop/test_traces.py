"""The program of docs/recording.md for transformers in PyTorch, run on the real one: each difference is explained."""

from __future__ import annotations

import pytest
from pages import block
from recorded import facts_of, inputs_of, recorded_taps, small_batch

from gptj.checkpoint import write_checkpoint
from gptj.parity.differences import compare_traces
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.parity.run import open_reference
from gptj.parity.tap_names import TapNames
from gptj.parity.trace import open_trace, write_trace

CONFIG = revealing_config(n_layer=2)
LOOKS_LIKE = {
    "bfloat16": "rotary table made in bfloat16, as by transformers 4.28 to 4.57",
    "float16": "rotary table made in float16, as by transformers 4.28 to 4.57",
    "float32": "rotary angles and frequencies in float32, as by transformers",
}


@pytest.mark.parametrize("dtype", LOOKS_LIKE)
def test_transformers_in_pytorch_is_recorded_and_explained(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("model", CONFIG, revealing_fill())
    asked = {name: values for name, values in inputs_of(small_batch(CONFIG)).items() if name != "labels"}
    write_trace("base.safetensors", recorded_taps(CONFIG, small_batch(CONFIG)), facts_of(CONFIG), inputs=asked)
    program = block("recording.md", "transformers in PyTorch")
    assert program.count('"bfloat16"') == 1
    exec(program.replace('"bfloat16"', f'"{dtype}"'), {})
    theirs = open_trace("theirs.safetensors", TapNames.find("transformers-pt"))
    _, read = open_reference("model")
    found = compare_traces([open_trace("base.safetensors"), theirs], read)
    assert found.pairs[0].first.tap == "h.0.q_rotated"
    assert found.pairs[0].looks_like == LOOKS_LIKE[dtype]
    at_tokens = {tap.tap for tap in found.born[theirs.name] if not tap.padding}
    assert at_tokens == {f"h.{number}.{kind}_rotated" for number in (0, 1) for kind in "qk"}
