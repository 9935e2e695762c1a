"""Steps of each framework's own optimizers, as a trace records them: right, and with a number of another."""

from __future__ import annotations

import numpy as np
import pytest

from gptj.checkpoint import write_checkpoint
from gptj.config.dtypes import numpy_dtype
from gptj.errors import InputError
from gptj.parity import trace_record
from gptj.parity.differences import compare_traces
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.trace import open_trace
from gptj.parity.trace_record import record_trace

CONFIG = revealing_config(n_layer=1)
WEIGHTS = revealing_weights(CONFIG)
WRONG = {"BETAS": [(0.9, 0.96875), (0.875, 0.999)], "EPSILON": [2**-19], "DECAY": [0.0], "SHARES": [
    {"sgd": (1.0,), "adamw": (1.0,)}]}  # fmt: skip


def read(name, dtype):
    return WEIGHTS[name].astype(numpy_dtype(dtype))


def test_steps_are_the_definitions_and_a_wrong_number_shows(wing, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "model", CONFIG, lambda spec: WEIGHTS[spec.name])

    def recorded(name):
        record_trace(tmp_path / "model", wing.name, tmp_path / name, gradients="steps")
        return open_trace(tmp_path / name)

    right = recorded("right")
    assert len(right.extras.steps) == 2 * len(right.extras.gradients)
    for name, values in WRONG.items():
        for number, value in enumerate(values):
            with monkeypatch.context() as patch:
                patch.setattr(trace_record, name, value)
                wrong = recorded(f"{name} {number}")
            found = compare_traces([right, wrong], read).steps
            beyond = {(one.base, one.other, one.kind) for one in found if not one.holds}
            assert beyond == {("right", wrong.name, "adamw"), ("oracle", wrong.name, "adamw")}, (name, value)
    assert all(np.isfinite(one.difference) for one in found)


def test_no_steps_are_recorded_in_16_bits(wing, tmp_path):
    write_checkpoint(tmp_path / "model", CONFIG, lambda spec: WEIGHTS[spec.name])
    with pytest.raises(InputError, match="no steps are taken in it"):
        record_trace(tmp_path / "model", wing.name, tmp_path / "trace", dtype="bfloat16", gradients="steps")
