"""Compare `gptj convert` of a mesh-transformer-jax checkpoint with copying the same bytes, by CPU time and memory.

    python benchmarks/convert.py --layers 3                  # 2.0 GB: true widths, three of the 28 layers
    python benchmarks/convert.py --layers 28 --rounds 1      # the true 6B shape: 12.1 GB in, 12.1 GB out
    python benchmarks/convert.py --against ../before         # another checkout's conversion, too, turn by turn

The checkpoint is GPT-J-6B's in everything but its values and its number of layers: 8 shards, bfloat16, slim.
Rounds are interleaved (copy, convert, copy, convert, ...), each in a process of its own, so that whatever else the
machine does meets both. CPU time is user plus system time of the process and its threads, as wait4 gives it; the
work of the kernel's own write-back threads counts for neither. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gptj_conversion.mesh.writer import write_mesh

from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec, schema

SHARDS = 8


class Run(NamedTuple):
    """What one process took."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=50400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--directory", type=Path, help="where there is room for twice the size [default: temporary]")
    parser.add_argument("--keep", action="store_true", help="leave the source and the last output there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only-make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("convert_options", nargs="*", help="further options of gptj convert, after --")
    arguments = parser.parse_args()
    config = GPTJConfig(
        vocab_size=arguments.vocab, n_positions=2048, n_embd=arguments.width, n_layer=arguments.layers,
        n_head=arguments.width // 256, rotary_dim=64,
    )  # fmt: skip
    if arguments.only_make is not None:
        make_checkpoint(arguments.only_make, config)
        return
    folder = Path(tempfile.mkdtemp(prefix="gptj-benchmark-", dir=arguments.directory))
    try:
        figures = measure(folder, config, arguments.rounds, arguments.convert_options, arguments.against)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print(json.dumps(figures, indent=2) if arguments.json else table(figures))


def measure(folder: Path, config: GPTJConfig, rounds: int, options: list[str], against: Path | None) -> dict[str, Any]:
    source, copied, converted = folder / "source", folder / "copied", folder / "converted"
    # In a process of its own: a child's peak memory is counted from the fork on, and would begin at ours.
    sizes = ["--layers", str(config.n_layer), "--width", str(config.n_embd), "--vocab", str(config.vocab_size)]
    run([sys.executable, __file__, *sizes, "--only-make", str(source)])
    nbytes = sum(path.stat().st_size for path in source.rglob("*.npz"))
    before = (
        {"PYTHONPATH": os.pathsep.join(f"{against.resolve()}/{part}" for part in ("src", "conversion"))}
        if against
        else {}
    )
    copies, conversions, earlier = [], [], []
    for _ in range(rounds):
        copies.append(run(["cp", "-r", "--reflink=never", str(source), str(copied)]))
        shutil.rmtree(copied)
        for runs, environment in ([(earlier, before)] if against else []) + [(conversions, {})]:
            shutil.rmtree(converted, ignore_errors=True)
            command = [sys.executable, "-m", "gptj", "convert", str(source), str(converted), *options]
            runs.append(run(command, environment))
    imports = run([sys.executable, "-c", "import gptj.command.main, gptj_conversion.convert"])
    copy, conversion = median(copies), median(conversions)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"NumPy {np.__version__}",
        "layers": config.n_layer,
        "gigabytes": nbytes / 1e9,
        "rounds": rounds,
        "options": options,
        "copy": copy._asdict(),
        "convert": conversion._asdict(),
        "before": median(earlier)._asdict() if against else None,
        "interpreter_and_imports": imports._asdict(),
        "cpu_ratio": (conversion.cpu_s - imports.cpu_s) / copy.cpu_s,
        "cpu_ratio_with_start": conversion.cpu_s / copy.cpu_s,
        "wall_ratio": conversion.wall_s / copy.wall_s,
        "peak_bytes_over_imports": conversion.peak_bytes - imports.peak_bytes,
        "largest_tensor_bytes": 2 * max(row.size for row in schema(config)),
    }


def make_checkpoint(directory: Path, config: GPTJConfig) -> None:
    """A slim bfloat16 checkpoint whose values repeat a block of random numbers, so that it is quickly made."""
    noise = np.random.default_rng(0).normal(0, 0.02, 2**24 + 1).astype(ml_dtypes.bfloat16)

    def read(row: TensorSpec) -> Any:
        return np.resize(noise, row.size).reshape(row.shape)

    write_mesh(directory, config, read, shards=SHARDS, dtype="bfloat16")


def run(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return Run(usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * 1024)


def median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(values) for values in zip(*runs, strict=True)))


def table(figures: dict[str, Any]) -> str:
    copy, conversion, before = figures["copy"], figures["convert"], figures["before"]
    earlier = [row_of("the other checkout's", before)] if before else []
    rows = [
        f"{figures['gigabytes']:.2f} GB, {figures['layers']} layers, {SHARDS} shards, bfloat16; "
        f"median of {figures['rounds']}; {figures['machine']}; options: {' '.join(figures['options']) or 'none'}",
        "",
        "| | CPU s | wall s | peak RSS MB |",
        "|---|---|---|---|",
        row_of("cp", copy),
        row_of("gptj convert", conversion),
        *earlier,
        "",
        f"CPU ratio {figures['cpu_ratio']:.1f} (start of Python apart), wall ratio {figures['wall_ratio']:.1f}, "
        f"peak RSS over imports {figures['peak_bytes_over_imports'] / 1e6:.0f} MB "
        f"(largest tensor {figures['largest_tensor_bytes'] / 1e6:.0f} MB)",
    ]
    return "\n".join(rows)


def row_of(name: str, taken: dict[str, float]) -> str:
    return f"| {name} | {taken['cpu_s']:.2f} | {taken['wall_s']:.2f} | {taken['peak_bytes'] / 1e6:.0f} |"


if __name__ == "__main__":
    main()
