"""The tables, for a terminal."""

from __future__ import annotations

from rich.table import Table

from benchmarks.speed.contenders import Contender, contenders
from benchmarks.speed.engines import DRAWN
from benchmarks.speed.measures import DRAWN_ROWS, share_of_limit, tokens_per_s
from benchmarks.speed.results import Results
from benchmarks.speed.shapes import SHAPES, Shape

RATED = {"prefill_s": "prefill 512", "decode1_s": "decode 1", "decode8_s": "decode 8", "train_s": "train 4 x 128"}
RATIOS: dict[str, tuple[str, ...]] = {
    "load + first token": ("load_s", "first_token_s"),
    **{title: (figure,) for figure, title in RATED.items()},
}


def tables(results: Results) -> list[Table]:
    """For each shape the figures, what they are against the peers', and who failed at what."""
    found = []
    for name in results.shapes:
        shape = SHAPES[name]
        found.append(figures_table(results, shape))
        for table in (ratios_table(results, shape), drawn_table(results, shape), failures_table(results, shape)):
            if table.row_count:
                found.append(table)
    return found


def figures_table(results: Results, shape: Shape) -> Table:
    limits = results.medians_of_limits(shape.name)
    told = ", ".join(
        f"{rate / 1e9:,.1f} GB/s read" if name == "read" else f"{rate / 1e9:,.0f} {name} Gop/s"
        for name, rate in limits.items()
    )
    others = results.others(shape.name)
    told += f"; others took up to {others:.0%} of the machine" if others > 0.05 else ""
    table = Table(title=f"shape {shape.name}: tokens/s (share of the limit); limits {told}")
    table.add_column("contender")
    for title in ("import s", "load s", "first token s", "peak / weights", *RATED.values(), "greedy tokens"):
        table.add_column(title, justify="right")
    for contender in known(results, shape):
        table.add_row(*figures_row(results, shape, contender))
    return table


def figures_row(results: Results, shape: Shape, contender: Contender) -> list[str]:
    """The cells: seconds of a start, peak memory, rates with their shares, and how far the greedy tokens agree."""
    row = [contender.name]
    for figure in ("import_s", "load_s", "first_token_s"):
        seconds = results.median(shape.name, contender.name, figure)
        row.append("" if seconds is None else f"{seconds:.2f}")
    peak = results.median(shape.name, contender.name, "peak_bytes")
    row.append("" if peak is None else f"{peak / shape.stored_bytes(contender.dtype):.2f}")
    for figure in RATED:
        seconds = results.median(shape.name, contender.name, figure)
        if seconds is None:
            row.append("")
            continue
        limits = results.limits(shape.name, contender.name, figure)
        share = share_of_limit(figure, seconds, shape, contender.dtype, limits)
        row.append(f"{tokens_per_s(figure, seconds):,.1f}" + ("" if share is None else f" ({share:.0%})"))
    agreement = results.agreement(shape.name, contender.name, reference(results, shape))
    row.append("" if agreement is None else "{} of {}".format(*agreement))
    return row


def reference(results: Results, shape: Shape) -> str:
    """Whose greedy tokens the others' are compared with: the first of ours in float32, else the first of all."""
    everybody = [contender for contender in known(results, shape) if results.made(shape.name, contender.name)]
    everybody.sort(key=lambda contender: (not contender.ours, contender.dtype != "float32"))
    return everybody[0].name if everybody else ""


def ratios_table(results: Results, shape: Shape) -> Table:
    """How many times as fast as its peers each of ours is; `~` where the two were not measured in one run."""
    table = Table(title=f"shape {shape.name}: times as fast as the peer (~ from different runs)")
    table.add_column("ours")
    table.add_column("peer")
    for title in RATIOS:
        table.add_column(title, justify="right")
    everybody = known(results, shape)
    for ours in (contender for contender in everybody if contender.ours):
        for peer in (contender for contender in everybody if comparable(ours, contender)):
            cells = [results.ratio(shape.name, ours.name, peer.name, figures) for figures in RATIOS.values()]
            if any(cells):
                shown = ["" if cell is None else f"{'' if cell[1] else '~'}{cell[0]:.2f}" for cell in cells]
                table.add_row(ours.name, peer.name, *shown)
    return table


def drawn_table(results: Results, shape: Shape) -> Table:
    """A greedy step in ms, and a drawn one beside it, by rows."""
    table = Table(title=f"shape {shape.name}: ms a greedy step; a drawn one in times of it ({', '.join([*DRAWN][1:])})")
    table.add_column("contender")
    for rows in DRAWN_ROWS:
        table.add_column(f"{rows} row{'s' * (rows > 1)}", justify="right")
    for contender in known(results, shape):
        cells = []
        for rows in DRAWN_ROWS:
            steps = [results.median(shape.name, contender.name, f"drawn{rows}_{choice}_s") for choice in DRAWN]
            if None in steps:
                cells.append("")
                continue
            greedy, *drawn = (1e3 * step for step in steps if step is not None)
            cells.append(f"{greedy:,.1f}; " + " ".join(f"{step / greedy:.2f}" for step in drawn))
        if any(cells):
            table.add_row(contender.name, *cells)
    return table


def failures_table(results: Results, shape: Shape) -> Table:
    table = Table("contender", "measure", "why there is no figure", title=f"shape {shape.name}: not measured")
    for failure in results.failures(shape.name):
        table.add_row(*failure)
    return table


def comparable(ours: Contender, peer: Contender) -> bool:
    """Whether a ratio of the two says something: a peer, of the same dtype, in the same framework or its own."""
    if peer.before:
        return peer.name == f"{ours.name}-before"
    same_dtype = peer.dtype == ours.dtype or (ours.dtype == "int4" and peer.dtype == "int8")
    return not peer.ours and same_dtype and peer.family in (ours.family, "ctranslate2", "openvino")


def known(results: Results, shape: Shape) -> list[Contender]:
    """The contenders of which something was measured, in the order of contenders.py."""
    measured = {name for name in results.contenders(shape.name) if results.data["shapes"][shape.name][name]["figures"]}
    return [contender for name, contender in contenders().items() if name in measured]
