"""Bounded slices of the long runs in benchmarks/: what they look for is looked for on every change."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gptj.errors import FormatError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gptj_benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = load("fuzz")
faults = load("faults")


@pytest.mark.parametrize("name", ["header", "index", "config", "training config", "manifest"])
def test_no_lie_in_json_crashes_a_reader(tmp_path, name):
    readers = fuzz.make_readers(tmp_path)
    assert readers.keys() == {"header", "index", "config", "training config", "manifest"}
    _, crashes = fuzz.fuzz(readers[name], 400, "a slice")
    assert crashes == []


def test_a_number_beyond_floats_in_an_index_is_refused(tmp_path):
    """Found by the fuzzer: int(1e999) is an OverflowError."""
    index = fuzz.make_readers(tmp_path)["index"]
    with pytest.raises(FormatError, match=r"a number too large .*1e999"):
        index.read(re.sub(rb'"total_size": \d+', b'"total_size": 1e999', index.good))


def test_the_fuzzer_notices_a_crash(tmp_path):
    _, crashes = fuzz.fuzz(fuzz.Reader(b"{}", lambda data: None if data == b"{}" else [][0]), 20, "x")
    assert crashes and crashes[0][0].startswith("IndexError")


@pytest.mark.parametrize(("to", "rounds"), [("safetensors", 8), ("tf", 4), ("mesh", 4)])
def test_S2_a_killed_conversion_leaves_the_old_directory_or_the_new_one(tmp_path, to, rounds):
    """In an interpreter of its own, since the driver forks."""
    options = ["--to", to, "--rounds", str(rounds), "--directory", tmp_path]
    done = subprocess.run([sys.executable, BENCHMARKS / "kill.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] == rounds
    assert counts["old"] + counts.get("new", 0) == rounds + counts.get("finished first", 0)
    for wrong in ("mixed or lost", "sources changed", "wrong after the next run", "leftovers after the next run"):
        assert not counts.get(wrong), counts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arrays", "5 of 5 kinds"),
        ("flipped", "5 of 5 formats, its tensor named"),
        ("modes", "0640"),
        ("hostile_containers", "h5 0 of 21, msgpack 0 of 38"),
        ("bad_weights", "0 of 2"),
        ("failing_calls", "0 of 7, at most 1 line"),
    ],
)
def test_the_figures_of_faults_are_what_they_should_be(tmp_path, monkeypatch, name, expected):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import fault_figures

    [(_, ours, _)] = getattr(fault_figures, name)(tmp_path)
    assert ours == expected


def test_the_conversion_benchmark_runs(tmp_path):
    sizes = ["--layers", "2", "--width", "2048", "--vocab", "128", "--rounds", "1", "--directory", tmp_path]
    command = [sys.executable, BENCHMARKS / "convert.py", *sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["cpu_ratio"] > 0 and figures["peak_bytes_over_imports"] < 40 * figures["largest_tensor_bytes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", faults.faults(), ids=lambda fault: f"{fault.row} {fault.what}"[:60])
def test_a_malformed_folder_is_refused_and_its_culprit_named(tmp_path, fault):
    outcome = faults.run(fault, tmp_path / "x")
    assert outcome.refused, outcome.error
    assert outcome.named, outcome.error
    assert outcome.took_s < 5
    assert not (tmp_path / "x" / "out").exists()


def test_the_tokenizer_benchmark_runs_and_its_encoders_agree(tmp_path):
    (tmp_path / "text").write_text(
        "Shall I compare thee to a summer's day? Naïve, it's 2,048 words.\n" * 9, encoding="utf-8"
    )
    command = [sys.executable, BENCHMARKS / "tokenizer.py", tmp_path / "text", "--megabytes", "0.05", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["text"], row["encoder"]) for row in rows] == [
        (text, encoder)
        for text in ("English", "code", "random Unicode")
        for encoder in ("gptj", "tiktoken", "tokenizers")
    ]
    assert all(0.04 < row["megabytes"] <= 0.05 and row["tokens"] > 9_000 for row in rows)


def test_the_benchmark_of_the_host_runs(tmp_path):
    words = [sys.executable, "-m", "benchmarks.host", "--turns", "1", "--steps", "2", "--only", "greedy"]
    words += ["--against", BENCHMARKS.parent / "src"]
    done = subprocess.run(words, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert head == "| strategy | rows | before, ms a step | here, ms a step |" and len(rows) == 6
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[3:5])


@pytest.mark.parametrize("wing", ["pt", "tf", "flax"])
def test_the_model_without_taps_has_none_left(wing):
    """Its code names them nowhere, and all else is as it was."""
    source = (BENCHMARKS.parent / "src" / "gptj" / wing / "model.py").read_text()
    tree = ast.parse(load("taps_unused").without_taps(source))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.arg | ast.keyword)
                and "taps" in (getattr(node, "id", None), getattr(node, "arg", None))]  # fmt: skip
    names = {"before": ast.parse(source), "after": tree}
    found = {when: [node.name for node in ast.walk(one) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
             for when, one in names.items()}  # fmt: skip
    assert found["before"] == found["after"] and ast.unparse(names["before"]).count("taps(") > 8
