"""The two steps under generation, prefill and one token, over a preallocated cache; the loop is `gptj.generation`'s."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gptj import generation
from gptj.generation import GenerationConfig, Step
from gptj.outputs import KVCache
from gptj.pt.weights import host, to_numpy


class Decoder(generation.Decoder):
    """A GPTJForCausalLM with a cache of its own, fed by the loop of `gptj.generation`.

    Args:
        model: the model; it is run in evaluation mode, whatever mode it is in.
        batch: rows.
        capacity: the most tokens a row will have.
    """

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        super().__init__(model.config, batch, capacity)
        self.model = model
        self.cache: KVCache = model.init_cache(batch, capacity)

    @torch.inference_mode()
    def _run(
        self,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        offset: int,
        *,
        last_only: bool,
        want: frozenset[str],
    ) -> Step:
        self.cache.length = offset
        outputs = self.model(
            token_ids,
            self.cache,
            mask,
            position_ids=position_ids,
            use_cache=True,
            output_attentions="attentions" in want,
            output_hidden_states="hidden_states" in want,
            return_dict=True,
        )
        logits = outputs.logits[:, -1] if last_only else outputs.logits
        return Step(
            logits=to_numpy(logits),
            hidden_states=None if outputs.hidden_states is None else tuple(map(to_numpy, outputs.hidden_states)),
            attentions=None if outputs.attentions is None else tuple(map(to_numpy, outputs.attentions)),
        )

    def _gather(self, rows: NDArray[np.int64]) -> None:
        index = torch.from_numpy(rows).to(self.model.device)
        keys, values = (tuple(x[index] for x in side) for side in (self.cache.keys, self.cache.values))
        self.cache = KVCache(keys, values, self.cache.length, fixed=True)


class GenerationMixin:
    """`generate` for a model class."""

    def generate(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """The prompts and what follows them, (b, t + new); see `gptj.generation.generate` for every option."""
        raise NotImplementedError(host(input_ids))
