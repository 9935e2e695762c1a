"""The table of docs/scale.md: GPT-J-6B at 8, 64 and 256 devices, by the formulas of `gptj.sharding`.

python tests/documents/scale_table.py          print the table
python tests/documents/scale_table.py --write  put it into docs/scale.md
"""

from __future__ import annotations

from collections.abc import Iterator

from page_parts import Part, markdown_table

from gptj import GPTJConfig
from gptj.sharding import Mesh, Strategy
from gptj.sharding.plan import Work, plan_memory
from gptj.sharding.traffic import list_collectives, sent_bytes

TABLE = Part("docs/scale.md", "scale", "tests/documents/scale_table.py")
DEVICES = (8, 64, 256)
ON_A_HOST = 8


def meshes(devices: int) -> Iterator[tuple[Strategy, Mesh, Work]]:
    """Each strategy with the mesh that one would take, and the work: a row of 2,048 tokens for each model's copy."""
    hosts = devices // ON_A_HOST
    for strategy, mesh in (("dp", Mesh(dp=devices)), ("tp", Mesh(dp=hosts, tp=ON_A_HOST))):
        yield strategy, mesh, Work(batch=mesh.dp, dtype="bfloat16")
    yield "dp", Mesh(dp=devices), Work(True, devices, dtype="bfloat16", recompute=True)
    yield "fsdp", Mesh(dp=devices), Work(True, devices, dtype="bfloat16", recompute=True)
    tp = ON_A_HOST if hosts > 1 else 4
    yield "tp_fsdp", Mesh(dp=devices // tp, tp=tp), Work(True, devices // tp, dtype="bfloat16", recompute=True)


def table() -> str:
    """The table in Markdown."""
    columns = ("devices", "for", "strategy", "dp x tp", "memory, GiB", "all-reduced", "gathered", "scattered",
               "sent, GiB", "to a token, MiB")  # fmt: skip
    rows = []
    config = GPTJConfig()
    for devices in DEVICES:
        for strategy, mesh, work in meshes(devices):
            plan = plan_memory(config, strategy, mesh, work)
            assert plan.problem is None, plan.problem
            crossing = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter"), 0)
            for one in list_collectives(config, strategy, mesh, work):
                crossing[one.kind] += one.nbytes
            sent = sent_bytes(config, strategy, mesh, work)
            numbers = [f"{n / 2**30:.2f}" if n else "-" for n in (*crossing.values(), sent)]
            verb = "training" if work.training else "a prompt"
            tokens = work.batch // mesh.dp * work.length  # of the model's copy that a device has a part in
            rows.append([str(devices), verb, f"`{strategy}`", f"{mesh.dp} x {mesh.tp}", f"{plan.total / 2**30:.1f}",
                         *numbers, f"{sent / tokens / 2**20:.2f}"])  # fmt: skip
    return markdown_table(columns, rows)


if __name__ == "__main__":
    TABLE.print_or_write(table)
