"""Numbers of each update, by NumPy: the learning rate, the factor that clips, and the scale of a float16 loss."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from gptj.finetune.settings import Settings

__all__ = ["LossScale", "clip_factor", "learning_rate", "warmup_steps"]


def warmup_steps(settings: Settings, steps: int) -> int:
    """The updates in which the learning rate climbs, at most all."""
    warmup = settings.warmup
    return min(steps, round(warmup * steps) if warmup < 1 else int(warmup))


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of update 0 to steps - 1, rounded to float32, as two of the frameworks hold it.

    It climbs in a straight line and reaches the peak with the last update of the warm-up. Then it falls from the peak
    towards the zero that update `steps` would have, so the last update still moves something.

    >>> [learning_rate(Settings(lr=1.0, warmup=2, schedule="linear"), step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warm = warmup_steps(settings, steps)
    if step < warm:
        share = (step + 1) / warm
    elif settings.schedule == "constant":
        share = 1.0
    else:
        done = (step - warm) / (steps - warm)
        share = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return float(np.float32(settings.peak * share))


def clip_factor(norm: float, clip: float) -> float:
    """The factor that brings a gradient of this norm down to `clip`, 1 where it is not above it or `clip` is 0.

    >>> clip_factor(4.0, 1.0), clip_factor(0.5, 1.0), clip_factor(4.0, 0)
    (0.25, 1.0, 1.0)
    """
    return clip / norm if 0 < clip < norm else 1.0


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The factor of a float16 loss, without which small gradients would be zero; the rule of torch's GradScaler.

    It starts at 65,536, is halved when a gradient overflows, whose update is then left out, and doubles after 2,000
    updates without one.

    Attributes:
        scale: the factor, a power of two, so that it rounds nothing.
        good: updates since the last change.
    """

    scale: float = 65536.0
    good: int = 0

    def after(self, *, finite: bool) -> LossScale:
        """The scale after a gradient that was finite, or was not."""
        if not finite:
            return LossScale(self.scale / 2, 0)
        return LossScale(self.scale * 2, 0) if self.good + 1 == 2000 else LossScale(self.scale, self.good + 1)
