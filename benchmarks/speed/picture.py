"""The roofline picture: tokens a second of one row against the bytes that a token reads, under the memory's limit.

Matplotlib is imported when something is drawn, since measuring and the tables do not need it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.contenders import Contender
from benchmarks.speed.report import known
from benchmarks.speed.results import Results
from benchmarks.speed.shapes import SHAPES, Shape

COLOURS = {"pt": "#d1495b", "tf": "#c98a12", "flax": "#00798c", "ctranslate2": "#6a4c93", "openvino": "#4f5d75"}
INK, PALE = "#22223b", "#9a9ab0"
LABEL_HEIGHT = 0.042
"""Of a panel's height."""
COLOURS_KEPT = 200
"""In the file, which is a third as large for it."""

Point = tuple[Contender, float, float]
"""A contender, the bytes that it reads for a token, its tokens a second."""


def draw(results: Results, path: Path) -> None:
    """A panel for each shape of which decoding was measured, one above the other."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    shapes = [SHAPES[name] for name in results.shapes if points(results, SHAPES[name])]
    if not shapes:
        raise SystemExit("nothing to draw: no decode1 was measured")
    style = {"font.size": 9, "text.color": INK, "axes.edgecolor": PALE, "axes.labelcolor": INK}
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(
            len(shapes), 1, figsize=(9, 4.9 * len(shapes)), squeeze=False, layout="constrained"
        )
        for shape, panel in zip(shapes, panels[:, 0], strict=True):
            draw_panel(panel, results, shape)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=100)
        pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS_KEPT).save(path, optimize=True)


def points(results: Results, shape: Shape) -> list[Point]:
    found = []
    for contender in known(results, shape):
        seconds = results.median(shape.name, contender.name, "decode1_s")
        if seconds is not None:
            found.append((contender, shape.bytes_a_token(contender.dtype), 1 / seconds))
    return found


def draw_panel(panel: Any, results: Results, shape: Shape) -> None:
    """The limit as a falling line, and who stands how far below it."""
    shown = points(results, shape)
    limit = results.medians_of_limits(shape.name)["read"]
    widths = [nbytes for _, nbytes, _ in shown]
    rates = [rate for _, _, rate in shown]
    left, right = min(widths) / 1.3, max(widths) * 2.2
    low, high = min(rates) / 1.6, 1.5 * limit / min(widths)
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    for share, line in ((1.0, "-"), (0.5, "--"), (0.1, ":")):
        panel.plot([left, right], [share * limit / left, share * limit / right], line, color=PALE, lw=1.2, zorder=1)
        at = left * 1.03
        if low < share * limit / at < high:
            words = "memory's limit" if share == 1 else f"{share:.0%}"
            panel.text(at, share * limit / at, words, color=PALE, va="bottom", ha="left", fontsize=8)
    for nbytes, group in itertools.groupby(sorted(shown, key=lambda point: (point[1], -point[2])), lambda p: p[1]):
        draw_group(panel, [*group], limit / nbytes)
    marks = sorted(set(widths))
    dtypes = {nbytes: contender.dtype for contender, nbytes, _ in shown}
    panel.set_xticks(marks, [f"{dtypes[nbytes]}\n{spelt_bytes(nbytes)}" for nbytes in marks])
    panel.set_xticks([], minor=True)
    panel.set_ylabel("decoded tokens a second, one row")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(axis="y", color=PALE, alpha=0.25, lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    config = shape.config
    panel.set_title(
        f"shape {shape.name}: {shape.weights_read / 1e6:,.0f}M weights read a token (n_embd {config.n_embd}, "
        f"{config.n_layer} layers); limit {limit / 1e9:.1f} GB/s",
        loc="left",
        fontsize=10,
    )
    for marker, face, words in (("o", INK, "gptj"), ("D", "white", "peers")):
        panel.plot([], [], marker, color=INK, mfc=face, mew=1.4, ms=5, label=words)
    panel.legend(loc="lower left", frameon=False)


def draw_group(panel: Any, group: Sequence[Point], limit: float) -> None:
    """The contenders that read as many bytes, the fastest first, each named beside its point."""
    from matplotlib import patheffects

    bottom, top = panel.get_ylim()
    line = (top / bottom) ** LABEL_HEIGHT
    heights = apart([rate for _, _, rate in group], factor=line, lowest=bottom * line)
    for (contender, nbytes, rate), height in zip(group, heights, strict=True):
        colour, marker = COLOURS[contender.family], "o" if contender.ours else "D"
        face = colour if contender.ours else "white"
        panel.plot(nbytes, rate, marker, color=colour, mfc=face, mew=1.4, ms=6 if contender.ours else 5, zorder=3)
        panel.annotate(
            f"{contender.name}  {rate / limit:.0%}",
            (nbytes, rate),
            (nbytes * 1.09, height),
            color=colour,
            fontsize=8,
            fontweight="bold" if contender.ours else "normal",
            va="center",
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def apart(heights: Sequence[float], *, factor: float, lowest: float) -> list[float]:
    """Falling heights moved until each is `factor` above the next, and the last no lower than `lowest`.

    >>> apart([8.0, 7.9, 1.0], factor=2.0, lowest=1.0)
    [8.0, 4.0, 1.0]
    >>> apart([2.0, 1.5], factor=2.0, lowest=1.5)
    [3.0, 1.5]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] / factor) if placed else height)
    floor = lowest
    for n in reversed(range(len(placed))):
        placed[n] = max(placed[n], floor)
        floor = placed[n] * factor
    return placed


def spelt_bytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB a token" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB a token"
