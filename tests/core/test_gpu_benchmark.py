"""benchmarks/gpu.py without a GPU: what it says then, its arguments, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.speed.shapes import SHAPES

ROOT = Path(__file__).parents[2]
L = SHAPES["L"]


def test_without_a_gpu_it_says_so_with_status_2() -> None:
    line = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": _path()})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("no GPU: ")


def _path() -> str:
    import os

    return os.pathsep.join([str(ROOT / "src"), str(ROOT / "conversion")])


@pytest.mark.parametrize(
    ("status", "out", "expected"),
    [
        (0, "NVIDIA H100 80GB HBM3, 81559 MiB, 570.1\n\n", ["NVIDIA H100 80GB HBM3, 81559 MiB, 570.1"]),
        (9, "NVIDIA-SMI has failed", []),
        (0, "", []),
    ],
)
def test_cards_are_those_that_nvidia_smi_shows(
    monkeypatch: pytest.MonkeyPatch, status: int, out: str, expected: list[str]
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **o: SimpleNamespace(returncode=status, stdout=out))
    assert gpu.cards() == expected


def test_a_program_that_hangs_shows_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.cards() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "XL"], "invalid choice: 'XL'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--only", "gptj-pt,keras"], "keras: not one of gptj-pt"),
        (["--only", ","], "none: not one of"),
        (["--measures", "decode2"], "decode2: not one of decode1"),
        (["--turns", "0"], "0: not a number of turns"),
        (["--turns", "few"], "few: not a number of turns"),
    ],
)
def test_arguments_are_checked(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_names_are_chosen_with_commas() -> None:
    said = gpu.parser().parse_args(["--only", "vllm, gptj-pt", "--measures", "prefill"])
    assert said.only == ["vllm", "gptj-pt"] and said.measures == ["prefill"] and said.shape == "L"


def test_the_limits_arithmetic() -> None:
    assert gpu.copied_per_s(10**9, 0.001) == 2e12  # a byte is read and written
    assert gpu.multiplied_per_s(1000, 0.5) == 4e9


def test_shares_are_those_of_the_bytes_and_operations_of_the_shape() -> None:
    bytes_a_token = L.bytes_a_token("bfloat16")
    assert 11.6e9 < bytes_a_token < 11.8e9  # 6.05e9 weights without the embedding's 206e6, two bytes each
    limits = {"read": 2e12, "bfloat16": 500e12}
    figures = {
        "decode1_s": bytes_a_token / 2e12 * 2,  # half the bandwidth
        "decode8_s": bytes_a_token / 2e12,
        "prefill_s": L.prefill_operations(512) / 500e12 * 4,
        "train_s": L.training_operations(4, 128) / 500e12 * 5,
    }
    head, ours, theirs = gpu.rows_of({"gptj-pt": {"figures": figures}, "vllm": {"figures": {}}}, L, "bfloat16", limits)
    assert head[1:] == ["decode1", "decode8", "prefill", "train"]
    assert [cell.partition("(")[2] for cell in ours[1:]] == ["50%)", "100%)", "25%)", "20%)"]
    assert ours[1].startswith(f"{1 / figures['decode1_s']:,.0f} ")
    assert ours[2].startswith(f"{8 / figures['decode8_s']:,.0f} ")
    assert ours[3].startswith(f"{512 / figures['prefill_s']:,.0f} ")
    assert theirs == ["vllm", "-", "-", "-", "-"]
    assert "(" not in gpu.rows_of({"x": {"figures": figures}}, L, "bfloat16", {})[1][1]


def test_a_contender_that_fails_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> Any:
        name = arguments[arguments.index("--worker") + 1]
        if name == "vllm":
            raise RuntimeError("out of memory")
        if name == "limits":
            return {"read": 1e12, "bfloat16": 1e14}
        return {"versions": {"torch": "2"}, "figures": {"decode1_s": 0.02}}

    monkeypatch.setattr(gpu, "cards", lambda: ["A card, 80 GB"])
    monkeypatch.setattr(gpu, "_in_process_of_its_own", run)
    monkeypatch.setattr(gpu.Folders, "find", lambda self, copy: tmp_path / copy)
    figures = tmp_path / "figures.json"
    assert gpu.main(["--only", "gptj-pt,vllm", "--json", str(figures)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("A card, 80 GB\ncopies 1,000 GB/s, multiplies 100.0 T/s in bfloat16\n")
    assert "50 (" in out and err == "vllm: out of memory\n"
    record = json.loads(figures.read_text())
    assert record["cards"] == ["A card, 80 GB"] and record["results"].keys() == {"gptj-pt"}
