"""The table of docs/scale.md is made by the formulas, which test_pt_traffic.py holds to counted bytes."""

from __future__ import annotations

from scale_table import TABLE, table

from gptj import GPTJConfig
from gptj.config.schema import schema
from gptj.sharding import Mesh
from gptj.sharding.plan import Work
from gptj.sharding.traffic import list_collectives, sent_bytes


def test_the_pages_table_is_the_formulas() -> None:
    page = TABLE.read_page()
    assert TABLE.place(table()) == page, "run: python tests/documents/scale_table.py --write"
    assert TABLE.place(table(), page.replace("| 64 | training |", "| 65 | training |")) == page


def test_the_formulas_are_those_of_the_books() -> None:
    """FSDP gathers twice and scatters once what dp sums once, but for what is no block's; tp moves no weights."""
    config = GPTJConfig()
    numbers, blocks = (sum(row.size for row in schema(config) if kind in row.name) for kind in ("", ".h."))
    for devices in (2, 8, 64):
        mesh, work = Mesh(dp=devices), Work(training=True, batch=devices)
        ring = (devices - 1) / devices * 4
        assert sent_bytes(config, "dp", mesh, work) == 2 * ring * numbers
        assert sent_bytes(config, "fsdp", mesh, work) == ring * (2 * numbers + blocks)
        assert not [*list_collectives(config, "dp", mesh, Work(batch=devices))]
    one, two = (sent_bytes(config, "tp", Mesh(tp=8), Work(length=n)) for n in (512, 1024))
    assert two == 2 * one and sent_bytes(config, "tp", Mesh(), Work()) == 0
