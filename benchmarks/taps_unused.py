"""What taps cost who does not ask for them: plain calls, beside the same model with every line of the taps taken out.

    python -m benchmarks.taps_unused --shape S
    python -m benchmarks.taps_unused --shape S --backends pt --turns 40

The other model is this checkout with the taps' lines taken out of its blocks: conditions on `taps`, what depends on
them, and the argument itself. Each is a process of its own, on two threads; turns alternate between the two, and which
is first alternates too, while the other waits. A turn is some calls of a kind: a prompt of 64 tokens, or a token over
a cache of 64. Printed are the medians in milliseconds of processor time (all threads', which other work on the machine
disturbs less than the clock's), their ratio, and the quartiles of the ratios turn by turn.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.shapes import SHAPES

ROOT = Path(__file__).parents[1]
KINDS = {"prompt": 4, "token": 8}
"""What is called, and how often in a turn."""

PROMPT, WARM_UP = 64, 3


class _WithoutTaps(ast.NodeTransformer):
    """Takes `taps` out of a module: conditions on it are settled, and nobody takes it or hands it on."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if isinstance(node.left, ast.Name) and node.left.id == "taps" and isinstance(node.ops[0], ast.Is | ast.IsNot):
            return ast.Constant(isinstance(node.ops[0], ast.Is))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        absorbing = isinstance(node.op, ast.Or)
        if any(isinstance(value, ast.Constant) and value.value is absorbing for value in node.values):
            return ast.Constant(absorbing)
        node.values = [value for value in node.values if not isinstance(value, ast.Constant)]
        if len(node.values) > 1:
            return node
        return node.values[0] if node.values else ast.Constant(not absorbing)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return node.body if node.test.value else node.orelse

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return (node.body if node.test.value else node.orelse) or None

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        node.args = [given for given in node.args if not (isinstance(given, ast.Name) and given.id == "taps")]
        node.keywords = [given for given in node.keywords if given.arg != "taps"]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self.generic_visit(node)
        taken = node.args
        if any(given.arg == "taps" for given in taken.args):
            last = taken.args.pop()
            assert last.arg == "taps", "only the last argument can be taken out"
            taken.defaults = taken.defaults[:-1]  # without a default, no other has one
        for number, given in reversed([*enumerate(taken.kwonlyargs)]):
            if given.arg == "taps":
                del taken.kwonlyargs[number], taken.kw_defaults[number]
        return node


def without_taps(source: str) -> str:
    """The same module without taps.

    >>> print(without_taps("def f(x, taps=None):\\n    if taps is not None:\\n        taps()\\n    return g(x, taps)"))
    def f(x):
        return g(x)
    """
    return ast.unparse(ast.fix_missing_locations(_WithoutTaps().visit(ast.parse(source))))


def work(backend: str, shape: str) -> None:
    """Answer each line on stdin, a kind, with the seconds of a turn's calls; the first answer says that it can."""
    import numpy as np

    import gptj

    wing = gptj.backend(backend)
    if backend == "pt":
        import torch

        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
    model = wing.GPTJForCausalLM(SHAPES[shape].config)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT))
    past = model(ids, use_cache=True).past_key_values
    calls = {
        "prompt": lambda: model(ids, use_cache=False).logits,
        "token": lambda: model(ids[:, :1], past_key_values=past, use_cache=False).logits,
    }

    def turn(kind: str) -> float:
        start = time.process_time()
        for _ in range(KINDS[kind]):
            wing.to_numpy(calls[kind]())
        return (time.process_time() - start) / KINDS[kind]

    for kind in KINDS:
        for _ in range(WARM_UP):
            turn(kind)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(line.strip())), flush=True)


class _Worker:
    """A process with one of the two models."""

    def __init__(self, source: Path, backend: str, shape: str) -> None:
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2",
                 "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
        path = os.pathsep.join([str(source), str(ROOT / "conversion"), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.taps_unused", "--work", backend, "--shape", shape],
            env=os.environ | quiet | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait(self) -> Any:
        """The next answer."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, kind: str) -> float:
        """The seconds of a call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        return float(self.wait())

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()


def compare(source: Path, backend: str, shape: str, turns: int) -> Iterator[str]:
    """A line a kind of call.

    Args:
        source: of the model without taps.
        backend, shape: which.
        turns: of each kind and model.
    """
    workers = [_Worker(folder, backend, shape) for folder in (ROOT / "src", source)]
    for worker in workers:
        worker.wait()
    for kind in KINDS:
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns):
            for number in (0, 1) if turn % 2 == 0 else (1, 0):
                times[number].append(workers[number].ask(kind))
        with_them, without = (1e3 * statistics.median(each) for each in times)
        low, middle, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
        yield (f"{backend} {kind}: {with_them:.2f} ms with, {without:.2f} ms without: ratio {with_them / without:.3f}; "
               f"turn by turn {low:.3f}, {middle:.3f}, {high:.3f}")  # fmt: skip
    for worker in workers:
        worker.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="S")
    parser.add_argument("--backends", default="pt,tf,flax")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.shape)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        shutil.copytree(ROOT / "src" / "gptj", source / "gptj")
        for backend in ("pt", "tf", "flax"):
            place = source / "gptj" / backend / "model.py"
            place.write_text(without_taps(place.read_text()))
        for backend in options.backends.split(","):
            for line in compare(source, backend, options.shape, options.turns):
                print(line, flush=True)


if __name__ == "__main__":
    main()
