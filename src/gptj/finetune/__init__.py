"""Fine-tuning: one loop, one data order and one schedule for the three wings, each of which computes a step.

    from gptj.finetune import Settings, finetune

    finetune("gpt-j", "data.jsonl", "tuned", Settings(steps=100), backend="pt")

Everything that could make two frameworks part is NumPy's here: which windows make a batch, the learning rate, the
factor that clips, the scale of a float16 loss. A wing's `TrainingStep` has the rest: loss and gradient, AdamW.
"""

from __future__ import annotations

from gptj.finetune.job import Outcome, finetune
from gptj.finetune.loop import Report, TrainingStep
from gptj.finetune.settings import Settings

__all__ = ["Outcome", "Report", "Settings", "TrainingStep", "finetune"]
