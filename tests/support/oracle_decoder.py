"""The NumPy oracle as a decoder: no cache, every call from the start. The third wing's answer before any wing."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptj.generation import Decoder, Step
from gptj.parity.oracle import Oracle


class OracleDecoder(Decoder):
    def __init__(self, oracle: Oracle, batch: int, capacity: int) -> None:
        super().__init__(oracle.config, batch, capacity)
        self.oracle = oracle
        self.tokens = np.zeros((batch, capacity), np.int64)
        self.positions = np.zeros((batch, capacity), np.int64)

    def _run(self, token_ids: Any, position_ids: Any, mask: Any, offset: int, *, last_only: bool, want: Any) -> Step:
        count = token_ids.shape[1]
        end = offset + count
        self.tokens[:, offset:end] = token_ids
        self.positions[:, offset:end] = position_ids
        output = self.oracle.forward(
            self.tokens[:, :end], mask[:, :end], self.positions[:, :end], attentions="attentions" in want
        )
        assert output.logits is not None
        logits = output.logits[:, -count:]
        return Step(
            logits[:, -1] if last_only else logits,
            tuple(h[:, -count:] for h in output.hidden_states) if "hidden_states" in want else None,
            tuple(a[:, :, -count:] for a in output.attentions) if "attentions" in want else None,
        )

    def _gather(self, rows: Any) -> None:
        self.tokens = self.tokens[rows]
        self.positions = self.positions[rows]
