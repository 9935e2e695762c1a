"""Records as a backend would make them, computed by an oracle: a right one, a float32 one, or a mutant."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptj.generation.sampling import draw, uniforms
from gptj.parity.oracle import Oracle, causal_lm_loss, positions_of_mask
from gptj.parity.probe import Probe
from gptj.parity.record import Record


def oracle_record(oracle: Oracle, probe: Probe, *, backend: str = "pt", dtype: str | None = None) -> Record:
    """What `oracle` answers, written down as if it were a backend."""
    batch = oracle.forward(probe.input_ids, probe.attention_mask, probe.position_ids, attentions=True)
    far = oracle.forward(probe.input_ids, probe.attention_mask, probe.far_position_ids)
    answers: dict[str, Any] = {
        "logits": batch.logits,
        "loss": np.asarray(causal_lm_loss(batch.logits, probe.labels)),
        "hidden_states": np.stack(batch.hidden_states),
        "attentions": np.stack(batch.attentions),
        "far_logits": far.logits,
        "plain_logits": oracle.forward(probe.input_ids).logits,
        "cached_logits": batch.logits,
        "greedy": _continued(oracle, probe, sample=False),
        "sampled": _continued(oracle, probe, sample=True),
    }
    return Record(backend, dtype or str(oracle.dtype), probe, answers, {"versions": {"numpy": np.__version__}})


def _continued(oracle: Oracle, probe: Probe, *, sample: bool) -> np.ndarray:
    ids, mask = probe.prompt_ids, probe.prompt_mask
    for step in range(probe.new_tokens):
        logits = oracle.forward(ids, mask, positions_of_mask(mask)).logits[:, -1]
        chosen = [
            draw(row, float(uniforms(probe.seed, step, n)[0])) if sample else int(row.argmax())
            for n, row in enumerate(logits)
        ]
        ids = np.concatenate([ids, np.array(chosen)[:, None]], 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
    return ids
