"""The loop of every framework: batches in their order, the rate, the factor, evaluations, checkpoints; once.

A wing computes: loss and gradient of a batch, the gradient's norm, AdamW's update. All that is decided between them
is decided here, in Python's float64.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from gptj.errors import InputError
from gptj.finetune.curve import Row
from gptj.finetune.data import Batches
from gptj.finetune.schedule import LossScale, clip_factor, learning_rate
from gptj.finetune.settings import Settings

__all__ = ["Progress", "Report", "Training", "TrainingStep"]


class TrainingStep(Protocol):
    """A model and its optimizer in one framework: each wing's `finetune.TrainingStep`.

    AdamW's meaning (Loshchilov and Hutter, arXiv:1711.05101), in float32, for update n = 1, 2 ... with rate r:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        p = p - r (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + epsilon) + decay p)

    where decay is that of the settings for matrices, and 0 for biases and layer norms.

    Attributes:
        parameters: the framework's own that are trained, by their names in files.
    """

    parameters: Mapping[str, Any]

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""

    def gradient_norm(self) -> float:
        """The norm of the whole gradient."""

    def update(self, rate: float, *, factor: float) -> None:
        """One update of AdamW by `factor` times the gradient, which is then none again."""

    def discard(self) -> None:
        """Let the gradient be none again, without an update."""

    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""

    def trained_model(self) -> Any:
        """The model with its trained parameters put in."""

    def read(self, name: str) -> NDArray[Any]:
        """A trained parameter by its name, in float32."""

    def moments(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """AdamW's moments: "first.NAME" and "second.NAME" for each trained parameter."""

    def restore(self, moments: Mapping[str, NDArray[Any]], *, updates: int) -> None:
        """Go on from these moments, after so many updates."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        step: updates that are over, those left out for an overflow included.
        updates: those that were made.
        tokens: that were learnt from.
        seconds: of training.
        best_step, best_loss: the evaluation with the lowest loss.
        scale: of a float16 loss.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    scale: LossScale = dataclasses.field(default_factory=LossScale)

    def check(self, step: int) -> None:
        """Refuse what no run of so many updates can have.

        Raises:
            ValueError: naming the field.
        """
        whole = {"step": self.step, "updates": self.updates, "tokens": self.tokens, "good": self.scale.good}
        numbers = {"seconds": self.seconds, "scale": self.scale.scale}
        if self.best_step is not None or self.best_loss is not None:
            whole["best_step"], numbers["best_loss"] = self.best_step, self.best_loss  # type: ignore[assignment]
        for name, value in whole.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}")
        for name, number in numbers.items():
            if type(number) not in (int, float) or not math.isfinite(number):
                raise ValueError(f"{name} is {number!r}")
        if self.step != step or self.updates > step or (self.best_step or 0) > step or self.scale.scale <= 0:
            raise ValueError(f"step {self.step}, updates {self.updates}, best_step {self.best_step} after {step}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The facts of an update, for a line of progress.

    Attributes:
        row: the update.
        steps: of the whole run.
        tokens, took_s: learnt in this update, and its seconds without evaluation and saving.
        overflow: whether the update was left out, since a float16 gradient overflowed.
        saved: whether a checkpoint was written after it.
    """

    row: Row
    steps: int
    tokens: int
    took_s: float
    overflow: bool
    saved: bool


class Training:
    """A run of training.

    Args:
        step: the wing's.
        settings: of the run; `steps` is their number in `steps`.
        batches, evaluation: what is learnt, and what is measured; None for nothing.
        steps: updates of the whole run.
        progress, rows: where it begins, and the curve up to there.
    """

    def __init__(
        self,
        step: TrainingStep,
        settings: Settings,
        batches: Batches,
        evaluation: Batches | None,
        *,
        steps: int,
        progress: Progress,
        rows: list[Row],
    ) -> None:
        self.step = step
        self.settings = settings
        self.batches, self.evaluation = batches, evaluation
        self.steps = steps
        self.progress = progress
        self.rows = rows
        self._began_s = time.monotonic() - progress.seconds

    def run(
        self,
        *,
        save: Callable[[Training], None],
        report: Callable[[Report], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Train to the end, or until `stop` says so between two updates; whether it came to the end.

        Args:
            save: writes a checkpoint; called every so often, after the best evaluation, and before it returns.
            report: told of every update.
            stop: asked after every update.

        Raises:
            InputError: the gradient is no number, or the run ends without one update; what was saved before stands.
        """
        settings, tenth = self.settings, max(1, self.steps // 10)
        eval_every = settings.eval_every or tenth
        save_every = settings.save_every or tenth
        while self.progress.step < self.steps:
            began_s, tokens = time.monotonic(), self.progress.tokens
            row, overflow = self.update()
            took_s = time.monotonic() - began_s
            last = row.step == self.steps
            if last:
                self._require_learnt()
            best = False
            if self.evaluation is not None and (last or row.step % eval_every == 0):
                row = dataclasses.replace(row, eval_loss=self.evaluate(self.evaluation))
                best = self._note_best(row)
            self.rows.append(row)
            stopped = not last and stop()
            saved = last or best or stopped or row.step % save_every == 0
            if saved:
                save(self)
            report(
                Report(
                    row=row, steps=self.steps, tokens=row.tokens - tokens, took_s=took_s, overflow=overflow, saved=saved
                )
            )  # fmt: skip
            if stopped:
                return False
        self._require_learnt()
        return True

    def _require_learnt(self) -> None:
        """Refuse the end of a run whose every update was left out for an overflow."""
        if self.progress.updates == 0:
            raise InputError(
                "every gradient overflowed float16, so nothing was learnt",
                where="--dtype",
                expected="one update that is made",
                found=f"{self.progress.step} left out, the loss scale by now {self.progress.scale.scale:g}",
                hint="Take --dtype bfloat16, or more --steps: each overflow halves the scale",
            )

    def update(self) -> tuple[Row, bool]:
        """One update; its row, and whether it was left out for an overflow."""
        settings, progress = self.settings, self.progress
        half = settings.dtype == "float16"
        scale = progress.scale.scale if half else 1.0
        batches = self.batches.of_update(progress.step)
        learnt = sum(batch.learnt for batch in batches)
        loss = 0.0
        for batch in batches:
            share = batch.learnt / learnt
            loss += share * self.step.accumulate(batch.ids, batch.labels, factor=scale * share)
        norm = self.step.gradient_norm() / scale
        finite = math.isfinite(norm)
        if not finite and not half:
            self.step.discard()
            raise InputError(
                f"the gradient of update {progress.step + 1} is no number",
                where="--lr",
                found=f"loss {loss}, norm {norm}",
                hint="Begin again, in another OUT, with a lower --lr or --clip, or a longer --warmup",
            )
        if not finite and scale <= 1:
            self.step.discard()
            raise InputError(
                f"the gradient of update {progress.step + 1} overflows float16, however small the loss is made",
                where="--dtype",
                found=f"loss {loss}, norm {norm}, scale {scale}",
                hint="Begin again, in another OUT, with --dtype bfloat16 or a lower --lr",
            )
        rate = learning_rate(settings, progress.step, self.steps)
        if finite:
            self.step.update(rate, factor=clip_factor(norm, settings.clip) / scale)
        else:
            self.step.discard()
        self.progress = progress = dataclasses.replace(
            progress,
            step=progress.step + 1,
            updates=progress.updates + finite,
            tokens=progress.tokens + learnt,
            seconds=time.monotonic() - self._began_s,
            scale=progress.scale.after(finite=finite) if half else progress.scale,
        )
        row = Row(
            step=progress.step, epoch=progress.step / self.batches.per_epoch, loss=loss, learning_rate=rate,
            gradient_norm=norm, tokens=progress.tokens, seconds=progress.seconds,
        )  # fmt: skip
        return row, not finite

    def evaluate(self, batches: Batches) -> float:
        """The mean loss of every token of the windows, in nats."""
        total, learnt = 0.0, 0
        for batch in batches:
            total += batch.learnt * self.step.evaluate(batch.ids, batch.labels)
            learnt += batch.learnt
        return total / learnt

    def _note_best(self, row: Row) -> bool:
        """Whether this evaluation is the best so far, which the progress then keeps."""
        loss, best = row.eval_loss, self.progress.best_loss
        if loss is None or not math.isfinite(loss) or (best is not None and loss >= best):
            return False
        self.progress = dataclasses.replace(self.progress, best_step=row.step, best_loss=loss)
        return True
