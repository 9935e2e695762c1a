"""What the fine-tuning tests learn from: a small model with a tokenizer, texts, and a step in NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizer_samples import small

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.config.initial import initial_tensor
from gptj.config.labels import IGNORED_LABEL

CONFIG = GPTJConfig(
    vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, resid_pdrop=0.1, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip

TEXT = "\n".join(f"line {n} of {n * n}: the quick brown fox jumps over the lazy dog." for n in range(30))

LINES = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(1, 5) for b in range(1, 6)]


def tuned_model(path: Path, *, seed: int = 0, biases: Mapping[str, float] | None = None, **changes: Any) -> Path:
    """A folder of start values, with `biases` in place of some, and a tokenizer."""
    tokenizer = small()
    config = CONFIG.replace(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **changes)
    fixed = biases or {}
    write_checkpoint(path, config, lambda row: initial_tensor(row, config, seed) + np.float32(fixed.get(row.name, 0)))
    tokenizer.save_pretrained(path)
    return path


def text_file(folder: Path, text: str = TEXT, name: str = "data.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def lines_file(folder: Path, lines: list[Any] = LINES, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TableStep:
    """A `TrainingStep` in NumPy: a table of logits by the last token alone, under AdamW; float64 inside."""

    def __init__(self, vocabulary: int, decay: float = 0.0) -> None:
        self.table = np.zeros((vocabulary, vocabulary), np.float32)
        self.first, self.second = np.zeros((2, vocabulary, vocabulary), np.float32)
        self.updates, self.decay = 0, decay
        self.overflows: list[bool] = []
        self.parameters = {"table": self.table}
        self.discard()

    def _losses(self, ids: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
        counted = labels[:, 1:] != IGNORED_LABEL
        before, after = ids[:, :-1][counted], labels[:, 1:][counted]
        logits = self.table[before].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(chances[np.arange(len(after)), after]).mean()
        chances[np.arange(len(after)), after] -= 1
        slope = np.zeros_like(self.table, np.float64)
        np.add.at(slope, before, chances / len(after))
        return float(loss), slope

    def accumulate(self, ids: np.ndarray, labels: np.ndarray, *, factor: float) -> float:
        loss, slope = self._losses(ids, labels)
        self.gradient = self.gradient + factor * slope
        return loss

    def gradient_norm(self) -> float:
        if self.overflows and self.overflows.pop(0):
            return float("inf")
        return float(np.sqrt((self.gradient**2).sum()))

    def update(self, rate: float, *, factor: float) -> None:
        gradient = self.gradient * factor
        self.updates += 1
        self.first = np.float32(0.9 * self.first + 0.1 * gradient)
        self.second = np.float32(0.999 * self.second + 0.001 * gradient**2)
        root = np.sqrt(self.second / (1 - 0.999**self.updates)) + 1e-8
        step = self.first / (1 - 0.9**self.updates) / root + self.decay * self.table
        self.table = np.float32(self.table - rate * step)
        self.discard()

    def discard(self) -> None:
        self.gradient = np.zeros_like(self.table, np.float64)

    def evaluate(self, ids: np.ndarray, labels: np.ndarray) -> float:
        return self._losses(ids, labels)[0]

    def read(self, name: str) -> np.ndarray:
        return self.table

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "first.table", self.first
        yield "second.table", self.second

    def restore(self, moments: Mapping[str, np.ndarray], *, updates: int) -> None:
        self.first, self.second, self.updates = moments["first.table"], moments["second.table"], updates
