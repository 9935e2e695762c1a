"""Measure what a fault costs here, figure by figure against what others were measured at, into docs/faults.md.

    python benchmarks/fault_figures.py                      # prints the table, in some minutes
    python benchmarks/fault_figures.py --kills 200 --write  # 200 kills a format, and writes it into docs/faults.md

The others' figures are of transformers 4.57.6 and 5.23.0, safetensors 0.8.0, torch 2.13.0, NumPy 2.4.6, h5py 3.14,
flax 0.12.8 (November 2026). Ours are made by the code below, each by a function of its own.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import faults
import kill
import numpy as np
from gptj_conversion.convert import convert
from gptj_conversion.verify import verify
from page_parts import Part, markdown_table

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config.schema import schema
from gptj.errors import FormatError, GPTJError
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.writing.file_system import FileSystem

ROOT = Path(__file__).parents[1]
TABLE = Part("docs/faults.md", "figures", "benchmarks/fault_figures.py")
CONFIG = kill.CONFIG
FORMATS = ("safetensors", "bin", "flax", "tf", "mesh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many conversions are killed in each format")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for row in figures(arguments.kills):
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    if arguments.write:
        TABLE.write(markdown_table(["figure", "gptj", "others"], rows))


def figures(kills: int) -> Iterator[tuple[str, str, str]]:
    """Each figure: what it is, ours, and the others'."""
    outcomes = faults.run_all()
    accepted = sum(outcome.error is None for outcome in outcomes)
    slowest = max(outcome.took_s for outcome in outcomes)
    refused = sum(outcome.refused for outcome in outcomes)
    named = sum(outcome.named for outcome in outcomes)
    escapes = [outcome for outcome in outcomes if outcome.fault.row == "X1"]
    yield "malformed folders accepted", f"{accepted} of {len(outcomes)}", "22 and 25 of 74"
    yield "... with a warning, or refused only when they compute", f"{accepted}", "10 and 8; 9 and 5"
    slow = sum(outcome.took_s > 5 for outcome in outcomes)
    yield "... that hang", f"{slow}, the slowest is refused in {slowest:.2f} s", "1 and 1"
    yield "errors that name file, tensor or field", f"{named} of {refused}", "10 of 32, 10 of 35"
    yield (
        "paths out of the folder, by the index",
        f"{sum(o.refused for o in escapes)} of {len(escapes)} refused",
        "loaded",
    )
    yield from _with_folder(hostile_containers)
    yield killed(kills)
    for measure in (forced, modes, arrays, shrinking, flipped, failing_calls, bad_weights, memory):
        yield from _with_folder(measure)


def _with_folder(measure: Callable[[Path], list[tuple[str, str, str]]]) -> list[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def tests_of(name: str) -> ModuleType:
    """A test module, for the faults that it lists."""
    sys.path[:0] = [str(ROOT / "tests" / "support")]
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "conversion" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hostile_containers(folder: Path) -> list[tuple[str, str, str]]:
    """The faults that the tests plant in .h5 and .msgpack files, and how many are read without a word."""
    import h5py
    from gptj_conversion.hf.flax_msgpack import read_msgpack

    h5, msgpack = tests_of("test_tf_refusals"), tests_of("test_flax_refusals")
    read = {"h5": 0, "msgpack": 0}
    for number, (change, *_) in enumerate(h5.FAULTS.values()):
        model = shutil.copytree(ROOT / "tests" / "data" / "foreign" / "tf", folder / str(number))
        with h5py.File(model / "tf_model.h5", "r+") as file:
            change(file)
        read["h5"] += _is_read(functools.partial(convert, model, folder / f"{number}-out", fingerprint=False))
    for value, *_ in msgpack.FAULTS.values():
        read["msgpack"] += _is_read(functools.partial(read_msgpack, msgpack.written(folder / "x.msgpack", value)))
    ours = f"h5 {read['h5']} of {len(h5.FAULTS)}, msgpack {read['msgpack']} of {len(msgpack.FAULTS)}"
    return [("faults in .h5 and .msgpack read without a word", ours, "h5 5 of 9, msgpack 2 of 8")]


def _is_read(function: Callable[[], Any]) -> bool:
    try:
        function()
    except GPTJError:
        return False
    return True


def killed(rounds: int) -> tuple[str, str, str]:
    """SIGKILL at random moments, in every format."""
    wrong: dict[str, int] = {}
    for to in FORMATS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            counts = kill.run(Path(folder), to, rounds, random.Random(0))
        bad = ("mixed or lost", "sources changed", "wrong after the next run", "leftovers after the next run")
        wrong[to] = sum(counts.get(key, 0) for key in bad)
    ours = ", ".join(f"{to} {count}" for to, count in wrong.items()) + f" of {rounds} kills each"
    others = (
        "sharded overwrite: 22 of 40 mixed; change of layout: 20 of 40 lost; single files: np.savez 14, torch.save 16, "
        "h5py 15, msgpack 9, safetensors 0 of 24, keras 12, orbax 9 of 12; leftovers 13 of 40"
    )
    return ("`kill -9` over an old model, cut otherwise: mixed, lost, or left behind after the next run", ours, others)


def forced(folder: Path) -> list[tuple[str, str, str]]:
    """The fsync calls of one save."""

    class Counting(FileSystem):
        files = folders = 0

        def fsync(self, descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            self.folders += is_folder
            self.files += not is_folder
            super().fsync(descriptor)

    fs = Counting()
    written = write_checkpoint(folder / "x", CONFIG, revealing_fill(0), max_shard_bytes=100_000, fs=fs)
    ours = f"{fs.files} for {len([*written.iterdir()])} files, {fs.folders} for the folder and the one above"
    return [("fsync calls of a save", ours, "0")]


def modes(folder: Path) -> list[tuple[str, str, str]]:
    """The mode of what is written under a umask."""
    old = os.umask(0o027)
    try:
        found = set()
        for to in FORMATS:
            shards = {"shards": 1} if to == "mesh" else {}
            source = folder / "source"
            source = source if source.exists() else write_checkpoint(source, CONFIG, revealing_fill(0))
            out = convert(source, folder / to, to=to, fingerprint=False, **shards)
            found |= {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    finally:
        os.umask(old)
    return [("mode of a saved file under umask 027", ", ".join(f"{mode:04o}" for mode in found), "0600")]


def arrays(folder: Path) -> list[tuple[str, str, str]]:
    """Arrays that are not one plain run of numbers in memory."""
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "transposed": lambda a: np.ascontiguousarray(a.T).T,
        "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
        "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
        "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    }
    right = 0
    fill = revealing_fill(0)
    for name, make in kinds.items():
        out = write_checkpoint(folder / name, CONFIG, lambda row, make=make: make(fill(row)))
        opened = open_checkpoint(out)
        right += all(np.array_equal(opened.read(row.name), make(fill(row))) for row in schema(CONFIG))
    return [("arrays that are not contiguous, written right", f"{right} of {len(kinds)} kinds", "0 of 5")]


SHRINK = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from gptj_conversion.convert import convert, open_source
    from gptj.checkpoint import open_checkpoint
    kind, folder = sys.argv[1], Path(sys.argv[2])
    weights = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    cut = lambda: os.truncate(weights, 9000)
    name = "transformer.wte.weight"
    if kind in ("read", "read_slice", "map", "mapped"):
        opened = open_checkpoint(folder)
        if kind == "mapped":
            view = opened.map(name)
            cut()
            print(float(np.asarray(view, np.float32).sum()))
        cut()
        opened.read_slice(name, 0, 1, 9) if kind == "read_slice" else getattr(opened, kind)(name)
    elif kind == "convert":
        convert(folder, folder.parent / "out", progress=lambda *event: cut())
    else:
        source = open_source(folder)
        cut()
        from gptj.config.schema import schema
        for row in schema(source.config):
            source.read(row)
"""


def shrinking(folder: Path) -> list[tuple[str, str, str]]:
    """A file that is cut under the reader: deaths by a signal, by the way it is read."""
    ways = [("safetensors", kind) for kind in ("read", "read_slice", "map", "convert")]
    ways += [(to, "source") for to in FORMATS[1:]]
    deaths, unnoticed = [], []
    source = write_checkpoint(folder / "source", CONFIG, revealing_fill(0))
    for to, kind in [*ways, ("safetensors", "mapped")]:
        place = folder / f"{to}-{kind}"
        place.mkdir()
        out = convert(source, place / "model", to=to, **({"shards": 1} if to == "mesh" else {}))
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SHRINK), kind, str(out)], capture_output=True, text=True
        )
        deaths += [kind] if done.returncode < 0 else []
        unnoticed += [kind] if done.returncode == 0 else []
    counted = [kind for kind in deaths if kind != "mapped"]
    ours = f"{len(counted)} of {len(ways)}, {len(unnoticed)} unnoticed"
    if "mapped" in deaths:
        ours += "; a map that is in use dies (`mmap=False` reads instead)"
    return [("deaths by a signal when a file shrinks under its reader", ours, "5 of 8 ways to read")]


def flipped(folder: Path) -> list[tuple[str, str, str]]:
    """One bit of the weights, in each format."""
    source = write_checkpoint(folder / "source", CONFIG, revealing_fill(0))
    wanted = open_checkpoint(source).read("lm_head.bias").tobytes()[:64]
    noticed = []
    for to in FORMATS:
        out = convert(source, folder / to, to=to, fingerprint=False, **({"shards": 2} if to == "mesh" else {}))
        [weights] = [path for path in out.rglob("*") if path.is_file() and wanted in path.read_bytes()]
        data = bytearray(weights.read_bytes())
        data[data.index(wanted) + 9] ^= 1
        weights.write_bytes(data)
        try:
            verify(out)
        except FormatError as error:
            noticed += [to] if f"tensor lm_head.bias in {weights.relative_to(out)}" in str(error) else []
    ours = f"{len(noticed)} of {len(FORMATS)} formats, its tensor named"
    return [("a flipped bit is noticed", ours, "npz yes; safetensors, torch.load, h5 no")]


def failing_calls(folder: Path) -> list[tuple[str, str, str]]:
    """Calls of the command line that cannot succeed."""
    model = write_checkpoint(folder / "model", CONFIG, revealing_fill(0))
    cut = write_checkpoint(folder / "cut", CONFIG, revealing_fill(0)) / "model.safetensors"
    os.truncate(cut, 5000)
    (folder / "empty").mkdir()
    calls = [
        ["convert", "nowhere", "out"], ["convert", "empty", "out"], ["convert", "cut", "out"],
        ["convert", "model", "model"], ["convert", "model", "out", "--to", "mesh", "--shards", "7"],
        ["verify", "cut"], ["inspect", "empty"],
    ]  # fmt: skip
    tracebacks, longest = 0, 0
    for call in calls:
        done = subprocess.run([sys.executable, "-m", "gptj", *call], capture_output=True, text=True, cwd=folder)
        tracebacks += "Traceback" in done.stderr or done.returncode != 1
        longest = max(longest, len(done.stderr.strip().splitlines()))
    assert model.exists()
    ours = f"{tracebacks} of {len(calls)}, at most {longest} line{'s' * (longest > 1)}"
    return [("failing calls of the command line that end in a traceback", ours, "7 of 7, 14 to 96 lines")]


def bad_weights(folder: Path) -> list[tuple[str, str, str]]:
    """A tensor missing, and NaN: converted all the same, with exit status 0?"""
    converted = 0
    chosen = [fault for fault in faults.faults() if fault.what in ("a tensor missing", "NaN") and fault.row[0] == "W"]
    for number, fault in enumerate(chosen):
        out = folder / str(number)
        out.mkdir()
        source = write_checkpoint(out / "source", CONFIG, revealing_fill(0))
        fault.make(convert(source, out / "model"))
        call = [sys.executable, "-m", "gptj", "convert", str(out / "model"), str(out / "out")]
        converted += subprocess.run(call, capture_output=True).returncode == 0
    return [("bad weights converted with exit status 0", f"{converted} of {len(chosen)}", "2 of 2")]


CONVERT = """
    import json, sys, time
    def peak():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    from gptj_conversion.convert import convert
    import gptj_conversion.hf.keras_h5, gptj.parity.fingerprint, h5py
    before = peak()
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
    print(json.dumps([peak() - before, time.process_time()]))
"""


def memory(folder: Path) -> list[tuple[str, str, str]]:
    """Peak memory over the imports and CPU time of a 715 MB model, in processes of their own."""
    config = revealing_config(vocab_size=50_400, n_positions=16, n_embd=1024, n_layer=6, n_head=16, n_inner=4096)
    rows = schema(config)
    model_bytes = sum(4 * row.size for row in rows)
    largest = max(4 * row.size for row in rows)
    block = np.random.default_rng(0).standard_normal(2**20, np.float32) * 0.02
    source = write_checkpoint(folder / "start", config, lambda row: np.resize(block, row.shape))
    told = []
    cpus = []
    for name, src, to in (("to .bin", source, "bin"), (".bin to safetensors", folder / "bin", "safetensors"),
                          ("to .h5", source, "tf"), ("to .msgpack", source, "flax")):  # fmt: skip
        call = [sys.executable, "-c", textwrap.dedent(CONVERT), str(src), str(folder / to), to]
        peak, cpu = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
        told.append(f"{name} {peak / model_bytes:.2f} ({peak / largest:.2f} of the largest tensor)")
        cpus.append(f"{name} {cpu:.1f}")
    size = f"{model_bytes / 1e6:.0f} MB"
    others = ".bin to safetensors 1.97, to .h5 3.1, to .msgpack 4.6"
    return [
        (f"peak memory of a conversion over its imports / {size} model", "; ".join(told), others),
        (
            "CPU time of the same with imports, hashes and fingerprint, s (others: wall)",
            "; ".join(cpus),
            ".bin to safetensors 12.3, to .h5 24.1, to .msgpack 24.8",
        ),
    ]


if __name__ == "__main__":
    main()
