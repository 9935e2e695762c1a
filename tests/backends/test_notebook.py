"""The notebook in examples/ runs from its first cell to its last, as one who opens it would run it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wings import Wing

NOTEBOOK = Path(__file__).parents[2] / "examples" / "journey.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; its last line's value, as a notebook shows it, or None."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_it_runs_from_top_to_bottom(wing: Wing, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gptj.backends.installed_backends", lambda: (wing.name,))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    shown = [run_cell("".join(cell["source"]), names) for cell in cells]
    assert shown[0] == wing.name and "model.safetensors" in shown[1]
    assert capsys.readouterr().out.startswith("ROMEO:\nStay, by that is the sight of joy,")
    (verse, prose), taps, (change, trainable) = shown[3], shown[4], shown[5]
    assert verse > prose and "logits" in taps
    assert change == pytest.approx(0, abs=1e-5) and trainable == 5 * 2 * 2 * 192 * 4
    assert shown[6].passed and np.isfinite(verse)
