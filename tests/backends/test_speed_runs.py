"""The speed benchmark runs: every measure of each wing at a tiny shape. How fast it was is nobody's claim here."""

import subprocess
import sys
from pathlib import Path

from benchmarks.speed.measures import FIGURES
from benchmarks.speed.results import Results

ROOT = Path(__file__).parents[2]


def test_every_measure_gives_its_figures(wing, tmp_path):
    name, path = f"gptj-{wing.name}", tmp_path / "speed.json"
    options = ["--shape", "tiny", "--contenders", name, "--repeats", "1", "--steps", "4", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.speed", *options, "--json", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = Results.opened(path, "now")
    assert [figure for figure in FIGURES if results.median("tiny", name, figure) is None] == []
    assert results.agreement("tiny", name, name) == (24, 24)
    assert name in done.stdout


def test_the_way_from_the_shell_to_the_first_token_is_measured(wing):
    ways = [wing.name] if wing.name == "pt" else [wing.name, f"{wing.name}, programs on disk"]
    options = ["--shape", "tiny", "--turns", "1", *(word for way in ways for word in ("--only", way))]
    command = [sys.executable, "-m", "benchmarks.cold", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert head.endswith("| to the first token |") and [row.split(" | ")[0] for row in rows] == [f"| {w}" for w in ways]
    assert ("MB on disk" in done.stderr) == (len(ways) == 2)


def test_another_checkout_is_measured_beside_this_one(wing, tmp_path):
    name, elsewhere = f"gptj-{wing.name}", tmp_path / "before"
    elsewhere.mkdir()
    (elsewhere / "gptj").symlink_to(ROOT / "src" / "gptj")
    options = ["--shape", "tiny", "--contenders", name, "--only", "decode1", "--repeats", "1", "--steps", "4"]
    command = [sys.executable, "-m", "benchmarks.speed", *options, "--against", elsewhere]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{name}-before" in done.stdout
    (elsewhere / "gptj").unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no gptj in it" in done.stderr
