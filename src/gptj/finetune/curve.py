"""The loss curve: a row an update, as CSV, and as a picture where matplotlib is installed."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptj.errors import FormatError, MissingFileError
from gptj.writing.output_file import whole_file

__all__ = ["Row", "can_draw", "curve_text", "draw_curve", "read_curve", "write_curve"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The losses, rate and pace of one update.

    Attributes:
        step: its number, from 1.
        epoch: epochs that are over, this update included.
        loss: mean loss of its tokens, in nats, before it.
        learning_rate: of it.
        gradient_norm: before clipping.
        tokens: that were learnt so far.
        seconds: since the beginning, other runs included.
        eval_loss: after it, None where it was not measured.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    eval_loss: float | None = None

    @property
    def eval_perplexity(self) -> float | None:
        """e to the power of `eval_loss`."""
        return None if self.eval_loss is None else perplexity(self.eval_loss)


def perplexity(loss: float) -> float:
    """e to the power of a loss, infinite where float64 ends."""
    return math.exp(loss) if loss < 709 else math.inf


_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens", "seconds", "eval_loss")
_LAST = "eval_perplexity"


def curve_text(rows: Iterable[Row]) -> bytes:
    """Rows as CSV, every digit of each number, so that reading gives the same rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_COLUMNS, _LAST))
    for row in rows:
        values = [getattr(row, name) for name in (*_COLUMNS, _LAST)]
        writer.writerow(["" if value is None else repr(value) for value in values])
    return text.getvalue().encode()


def write_curve(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, whole or not at all."""
    with whole_file(path) as write:
        write(curve_text(rows))


def read_curve(path: Path) -> list[Row]:
    """The rows of a file that `write_curve` wrote.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            head, *lines = csv.reader(stream, strict=True)
        if head != [*_COLUMNS, _LAST]:
            raise ValueError(f"columns {', '.join(head)}")
        for number, line in enumerate(lines, 1):
            if len(line) != len(head):
                raise ValueError(f"row {number} has {len(line)} of {len(head)} columns (is the file cut short?)")
        records = [dict(zip(head, line, strict=True)) for line in lines]
        return [
            Row(
                step=int(record["step"]), tokens=int(record["tokens"]), epoch=float(record["epoch"]),
                loss=float(record["loss"]), learning_rate=float(record["learning_rate"]),
                gradient_norm=float(record["gradient_norm"]), seconds=float(record["seconds"]),
                eval_loss=float(record["eval_loss"]) if record["eval_loss"] else None,
            )
            for record in records
        ]  # fmt: skip
    except FileNotFoundError:
        raise MissingFileError("no such file", file=path, expected="the curve up to here") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise FormatError(f"no loss curve: {error}", file=path) from None


_FEW, _LONGEST_TITLE = 25, 80


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curve(curves: Sequence[tuple[str, Sequence[Row]]], *, title: str) -> bytes:
    """A PNG of curves by their names: losses above, the learning rate below. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    styles = ("-", "--", ":")
    for number, (name, rows) in enumerate(curves):
        steps = [row.step for row in rows]
        color, label = f"C{number}", f"{name}: training" if name else "training"
        width = max(1.2, 1.2 * (len(curves) - number))  # those below show beside those above, where they are the same
        style = {"color": color, "linestyle": styles[number % 3], "linewidth": width}
        if len(rows) <= _FEW:  # of one, a line shows nothing
            style |= {"marker": ".", "markersize": 4 + 2 * width}
        upper.plot(steps, [row.loss for row in rows], label=label, alpha=0.8, **style)
        measured = [(row.step, row.eval_loss) for row in rows if row.eval_loss is not None]
        if measured:
            label = f"{name}: evaluation" if name else "evaluation"
            marks = {
                "color": "C3" if len(curves) == 1 else color,
                "marker": "o",
                "markersize": 4 + 4 * (len(curves) - 1 - number),
            }
            upper.plot(*zip(*measured, strict=True), label=label, **marks)
        lower.plot(steps, [row.learning_rate for row in rows], **style)
    upper.set_ylabel("loss (nats per token)")
    short = title if len(title) <= _LONGEST_TITLE else f"…{title[1 - _LONGEST_TITLE :]}"
    upper.set_title(short, parse_math=False)  # a folder's name may have $ in it
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.legend()
    upper.grid(alpha=0.3)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("update")
    lower.grid(alpha=0.3)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
