"""One command for whoever has a GPU: decoding, prompts, a training step, beside transformers and vLLM where installed.

    python -m benchmarks.gpu                       # GPT-J-6B's sizes in bfloat16, random weights, everybody installed
    python -m benchmarks.gpu --shape M --only gptj-pt,vllm --turns 5 --json figures.json

Each contender is a process of its own that loads the folder, does everything once untimed, and is then timed:
`generate` as a user calls it (see `benchmarks.speed.measures`). Beside each figure is its share of what the card can
do, which PyTorch is asked for first: bytes copied a second for decoding, operations a second for prompts and training.

Where there is no GPU it says so, and the exit status is 2. What fails is said and left out, and the status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import engines, measures
from benchmarks.speed.folders import Folders
from benchmarks.speed.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[1]
NO_GPU = 2
MEASURES = ("decode1", "decode8", "prefill", "train")
DTYPES = ("bfloat16", "float32")

Figures = dict[str, float]
"""Seconds by the names that `measures.FIGURES` has."""


# ---- contenders


class OnDevice(engines.Ours):
    """A wing of gptj on the device."""

    def load(self) -> None:
        device, options = self.options["device"], {"param_dtype": self.options["dtype"]}
        if self.family == "pt":
            options["attn_implementation"] = "sdpa"
        self._until_the_end = contextlib.ExitStack()
        with self._until_the_end.enter_context(self.wing.on_device(device)):
            self.model = self.wing.GPTJForCausalLM.from_pretrained(self.folder, **options)

    def train(self, ids: list[list[int]]) -> float:
        loss = super().train(ids)
        if self.family == "pt" and self.options["device"] == "cuda":
            import torch

            torch.cuda.synchronize()  # the step goes on after the loss is known
        return loss


class TransformersOnDevice(engines.TransformersPyTorch):
    """transformers' model on the device."""

    def load(self) -> None:
        super().load()
        self.model.to(self.options["device"])

    def generate(self, ids: list[list[int]], new: int) -> list[list[int]]:
        prompt = self.torch.tensor(ids, device=self.options["device"])
        made = self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return engines.tail(made, new)

    def make_step(self) -> Any:
        step = engines.torch_step(_Placed(self.model, self.options["device"]))

        def run(ids: list[list[int]]) -> Any:
            loss = step(ids)
            if self.options["device"] == "cuda":
                self.torch.cuda.synchronize()
            return loss

        return run


class _Placed:
    """A model whose arguments are moved to its device."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        self.parameters, self.train = model.parameters, model.train

    def __call__(self, **arguments: Any) -> Any:
        return self.model(**{name: value.to(self.device) for name, value in arguments.items()})


class VLLM(engines.Engine):
    """vLLM, whose cache of prompts is off, since the same prompt is asked again."""

    packages = ("vllm", "torch")

    def load_library(self) -> None:
        import vllm

        self.vllm = vllm

    def load(self) -> None:
        self.model = self.vllm.LLM(
            model=self.folder, skip_tokenizer_init=True, dtype=self.options["dtype"], enable_prefix_caching=False
        )

    def generate(self, ids: list[list[int]], new: int) -> list[list[int]]:
        how = self.vllm.SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        made = self.model.generate([{"prompt_token_ids": row} for row in ids], how, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in made]


CONTENDERS: dict[str, tuple[type[engines.Engine], dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "gptj-pt": (OnDevice, {"family": "pt"}, ("torch",), MEASURES),
    "gptj-flax": (OnDevice, {"family": "flax"}, ("jax", "flax"), MEASURES),
    "gptj-tf": (OnDevice, {"family": "tf"}, ("tensorflow", "keras"), MEASURES),
    "transformers": (TransformersOnDevice, {}, ("transformers", "torch"), MEASURES),
    "vllm": (VLLM, {}, ("vllm",), MEASURES[:3]),
}
"""Each contender's class, options, modules, and what it can do."""


# ---- the card


def cards() -> list[str]:
    """The GPUs as nvidia-smi names them, with memory and driver; none where it is not there or sees none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    line = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [one.strip() for one in done.stdout.splitlines() if one.strip()] if done.returncode == 0 else []


def limits_of_card(dtype: str, megabytes: int = 2048, matrix: int = 8192, device: str = "cuda") -> dict[str, float]:
    """Bytes that the device copies a second, read and written, and operations a second in the dtype: best of five."""
    import torch

    array = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(array)
    a, b = torch.randn(2, matrix, matrix, device=device, dtype=getattr(torch, dtype))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best_s(run: Callable[[], Any]) -> float:
        took = []
        for _ in range(6):
            wait()
            start = time.perf_counter()
            run()
            wait()
            took.append(time.perf_counter() - start)
        return min(took[1:])

    return {
        "read": copied_per_s(array.nbytes, best_s(lambda: target.copy_(array))),
        dtype: multiplied_per_s(matrix, best_s(lambda: a @ b)),
    }


def copied_per_s(nbytes: int, seconds: float) -> float:
    """Bytes that go through the memory a second where so many are copied: each is read, and written."""
    return 2 * nbytes / seconds


def multiplied_per_s(size: int, seconds: float) -> float:
    """Operations a second of a product of two square matrices."""
    return 2.0 * size**3 / seconds


# ---- measuring


def work(
    name: str, folder: str, shape: Shape, dtype: str, wanted: Sequence[str], *, turns: int, device: str = "cuda"
) -> dict[str, Any]:
    """A contender's versions and figures, in this process."""
    kind, options, _, can = CONTENDERS[name]
    engine = kind(folder, {**options, "dtype": dtype, "device": device}, 0 if device == "cuda" else 1)
    found: dict[str, Any] = {"versions": engine.bring_in(), "figures": {}}
    engine.load()

    def ask(what: str, **arguments: Any) -> dict[str, Any]:
        start = time.perf_counter()
        getattr(engine, what)(**arguments)
        return {"seconds": time.perf_counter() - start}

    for measure in (one for one in wanted if one in can):
        known = measures.prepare(measure, ask, shape, most_steps=128, target_s=5.0)
        taken = [measures.repeat(measure, ask, shape, known) for _ in range(turns)]
        found["figures"] |= {figure: statistics.median(turn[figure] for turn in taken) for figure in taken[0]}
    return found


def rows_of(
    results: Mapping[str, Mapping[str, Any]], shape: Shape, dtype: str, limits: Mapping[str, float]
) -> list[list[str]]:
    """The table: a row a contender, in each cell tokens a second and the share of the card's limit."""
    rows = [["", *MEASURES]]
    for name, result in results.items():
        row = [name]
        for measure in MEASURES:
            seconds = result["figures"].get(f"{measure}_s")
            if seconds is None:
                row.append("-")
                continue
            rate = measures.tokens_per_s(f"{measure}_s", seconds)
            share = measures.share_of_limit(f"{measure}_s", seconds, shape, dtype, dict(limits))
            row.append(f"{rate:,.0f}" if share is None else f"{rate:,.0f} ({share:.0%})")
        rows.append(row)
    return rows


def _in_process_of_its_own(arguments: Sequence[str]) -> Any:
    """The JSON on the last line that `python -m benchmarks.gpu` prints with these arguments.

    Raises:
        RuntimeError: it failed; with the last line of what it said.
    """
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(said[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of some of the known names with commas between."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{unknown[0] if unknown else 'none'}: not one of {', '.join(known)}")
        return chosen

    return parse


def _turns(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: not a number of turns, 1 to 1000")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--shape", choices=SHAPES, default="L", help="the model's sizes; L are GPT-J-6B's [L]")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and products [bfloat16]")
    made.add_argument("--only", type=names([*CONTENDERS]), help="these contenders, with commas between")
    made.add_argument("--measures", type=names(MEASURES), default=[*MEASURES], help="these, with commas between")
    made.add_argument("--turns", type=_turns, default=5, help="of which the median is taken [5]")
    made.add_argument("--folders", type=Path, default=ROOT / "build" / "speed", help="where the weights are kept")
    made.add_argument("--json", type=Path, help="write the figures here too")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    made.add_argument("--folder", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; the exit status."""
    said = parser().parse_args(arguments)
    shape: Shape = SHAPES[said.shape]
    if said.worker == "limits":
        print(json.dumps(limits_of_card(said.dtype)))
        return 0
    if said.worker:
        print(json.dumps(work(said.worker, said.folder, shape, said.dtype, said.measures, turns=said.turns)))
        return 0
    found = cards()
    if not found:
        print("no GPU: nvidia-smi is not there, or shows none; nothing was run", file=sys.stderr)
        return NO_GPU
    print(*found, sep="\n")
    chosen = said.only or [
        name for name, (_, _, needs, _) in CONTENDERS.items() if all(map(importlib.util.find_spec, needs))
    ]
    here = Path(sys.executable)
    folders = Folders(said.folders, shape, peers_python=here, openvino_python=here)
    folder = str(folders.find(said.dtype))
    common = ["--shape", said.shape, "--dtype", said.dtype]
    failed, limits, results = False, {}, {}
    try:
        limits = _in_process_of_its_own([*common, "--worker", "limits"])
    except RuntimeError as error:
        print(f"the card's limits: {error}", file=sys.stderr)
        failed = True
    options = ["--folder", folder, "--measures", ",".join(said.measures), "--turns", str(said.turns)]
    for name in chosen:
        try:
            results[name] = _in_process_of_its_own([*common, *options, "--worker", name])
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    _show(results, shape, said.dtype, limits)
    if said.json is not None:
        record = {"cards": found, "shape": said.shape, "dtype": said.dtype, "limits": limits, "results": results}
        said.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(failed)


def _show(results: Mapping[str, Any], shape: Shape, dtype: str, limits: Mapping[str, float]) -> None:
    if limits:
        print(f"copies {limits['read'] / 1e9:,.0f} GB/s, multiplies {limits[dtype] / 1e12:,.1f} T/s in {dtype}")
    print(f"{shape.name}, {dtype}: tokens a second (share of the limit)")
    rows = rows_of(results, shape, dtype, limits)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    for name, result in results.items():
        print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in result["versions"].items()))


if __name__ == "__main__":
    sys.exit(main())
