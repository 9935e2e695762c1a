"""The paths of benchmarks/gpu.py run on a CPU with the smallest model, so that they run where there is a GPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks import gpu
from benchmarks.speed.folders import lively_tensor
from benchmarks.speed.shapes import SHAPES
from gptj.checkpoint import write_checkpoint


def test_every_measure_of_ours_runs(wing, tmp_path, monkeypatch):
    # TensorFlow's threads are chosen before its first operation, and other tests of the process came before.
    monkeypatch.setattr("benchmarks.speed.engines.limit_tensorflow", lambda threads: None)
    shape = SHAPES["tiny"]
    folder = write_checkpoint(tmp_path / "tiny", shape.config, lively_tensor, dtype="float32")
    found = gpu.work(f"gptj-{wing.name}", str(folder), shape, "float32", gpu.MEASURES, turns=1, device="cpu")
    assert found["figures"].keys() == {f"{measure}_s" for measure in gpu.MEASURES}
    assert found["figures"]["prefill_s"] > 0 and found["figures"]["train_s"] > 0 and found["versions"]
    if wing.name == "pt":
        assert all(value > 0 for value in gpu.limits_of_card("float32", 1, 64, "cpu").values())
    assert Path(folder).exists()
