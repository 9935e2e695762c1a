"""`gptj plan` beside the memory that processes really take: a model of shape M in PyTorch on 1, 2 and 4 gloo processes.

    python -m benchmarks.plan --directory weights                          # every case that the machine has room for
    python -m benchmarks.plan --directory weights --only fsdp --dtype bfloat16

A case is generating (dp on one process, tp on several) or training (AdamW, two steps; dp on one, fsdp on several). What
a process takes is the most that it ever held, over what it held when it had imported all and done the same with a tiny
model; of several processes the fullest counts. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_),
so that the most that was held is the most that was needed. A case that the machine has no room for is said and left
out. Each line of the output is a case: planned and measured GiB, and by how much the plan is off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.folders import ROOT, Folders
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.worker import peak_bytes
from gptj.sharding import Mesh, Strategy
from gptj.sharding.plan import MemoryPlan, Work, plan_memory

TOLERANCE = 0.15


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: how the model is cut, and the work that it is given."""

    strategy: Strategy
    mesh: Mesh
    work: Work

    def __str__(self) -> str:
        verb = "training" if self.work.training else "generating"
        kept = ", recompute" if self.work.recompute else ""
        rows = f"{self.work.batch} x {self.work.length}"
        return f"{verb} {self.strategy} dp={self.mesh.dp} tp={self.mesh.tp} {self.work.dtype} {rows}{kept}"


def cases(processes: list[int], dtypes: list[str], *, prompt: int, row: int) -> Iterator[Case]:
    """Generating on each number of processes, then training, each dtype."""
    for dtype in dtypes:
        for count in processes:
            cut: tuple[Strategy, Mesh] = ("tp", Mesh(tp=count)) if count > 1 else ("dp", Mesh())
            yield Case(*cut, Work(length=prompt, dtype=dtype))
        for count in processes:
            for recompute in (False, True):
                work = Work(training=True, batch=count, length=row, dtype=dtype, recompute=recompute)
                yield Case("fsdp" if count > 1 else "dp", Mesh(dp=count), work)
            if count == 4:
                yield Case("tp_fsdp", Mesh(dp=2, tp=2), Work(training=True, batch=2, length=row, dtype=dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the weights are, or will be written")
    parser.add_argument("--shape", choices=SHAPES, default="M")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a generated row")
    parser.add_argument("--row", type=int, default=256, help="tokens of a trained row")
    parser.add_argument("--only", default="", help="cases whose line has these words")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(Path(asked.worker[0]), _case_of(json.loads(asked.worker[1])))
        return
    shape, worst = SHAPES[asked.shape], 0.0
    folders = Folders(asked.directory, shape, peers_python=Path(sys.executable), openvino_python=Path(sys.executable))
    for case in cases(asked.processes, asked.dtype, prompt=asked.prompt, row=asked.row):
        if asked.only not in str(case):
            continue
        plan = plan_memory(shape.config, case.strategy, case.mesh, case.work)
        needed, there = plan.total * case.mesh.size * 1.2 + 3e8 * case.mesh.size, available_bytes()
        if plan.problem or needed > there:
            print(f"{case}: left out: {plan.problem or f'{needed / 2**30:.1f} GiB and {there / 2**30:.1f} are there'}")
            continue
        measured = measure(folders.find(case.work.dtype), case)
        off = plan.total / measured - 1
        worst = max(worst, abs(off))
        print(f"{case}: {_gib(plan.total)} planned, {_gib(measured)} measured, {off:+.1%}  {_parts(plan)}", flush=True)
    print(f"worst {worst:.1%}")
    sys.exit(worst > TOLERANCE)


def _parts(plan: MemoryPlan) -> str:
    names = ("weights", "gradients", "optimizer", "cache", "activations")
    return "(" + ", ".join(f"{name} {_gib(getattr(plan, name))}" for name in names if getattr(plan, name)) + ")"


def _gib(count: float) -> str:
    return f"{count / 2**30:.3f}"


def available_bytes() -> int:
    """What the machine has left."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _case_of(words: dict[str, Any]) -> Case:
    return Case(words["strategy"], Mesh(**words["mesh"]), Work(**words["work"]))


def measure(folder: Path, case: Case) -> int:
    """The most bytes that the fullest process of a run held."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.mesh.size}",
               "-m", "benchmarks.plan", "--directory", ".", "--worker", str(folder.resolve()),
               json.dumps(dataclasses.asdict(case))]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-3000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


# ---- in each process


def work(folder: Path, case: Case) -> None:
    """Do the case's work with a tiny model, then with the folder's; the first process prints the most that one held."""
    import torch.distributed as dist

    from gptj.checkpoint import write_checkpoint
    from gptj.config.initial import initial_tensor
    from gptj.pt import parallel

    parallel.join_processes()
    tiny = dataclasses.replace(SHAPES["tiny"].config)
    place = folder.with_name(f"{folder.name}.tiny-{os.environ.get('TORCHELASTIC_RUN_ID', 'alone')}")
    if dist.get_rank() == 0:
        write_checkpoint(place, tiny, lambda spec: initial_tensor(spec, tiny, 0), dtype=case.work.dtype)
    dist.barrier()
    small = dataclasses.replace(case.work, length=16)
    run(place, case, small)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
    before = held_bytes()
    run(folder, case, case.work)
    taken: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(taken, peak_bytes() - before)
    if dist.get_rank() == 0:
        print(json.dumps({"bytes": max(taken), "each": taken}), flush=True)
    dist.barrier()
    parallel.leave_processes()
    os._exit(0)  # all is said; a thread of gloo's that still wants Python's lock would abort it (`command.together`)


def held_bytes() -> int:
    """What this process holds now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run(folder: Path, case: Case, work: Work) -> None:
    """Generate the last two tokens of rows, or train two steps."""
    import numpy as np
    import torch

    import gptj.pt as gptj

    cut: dict[str, Any] = {"mmap": False} if case.mesh.size == 1 else {"mesh": case.mesh, "strategy": case.strategy}
    model = gptj.GPTJForCausalLM.from_pretrained(folder, **cut)
    rows = work.batch // case.mesh.dp
    ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (rows, work.length))
    if not work.training:
        model.generate(ids[:, :-2], max_new_tokens=2, do_sample=False)
        return
    model.train()
    if work.recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
