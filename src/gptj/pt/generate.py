"""The two steps under generation, prefill and one token, over a preallocated cache; the loop is `gptj.generation`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gptj import generation
from gptj.calls.outputs import KVCache
from gptj.generation import PARTS, Columns, Selected, Step, scoring
from gptj.generation.decoder import Ids, Mask, Run
from gptj.pt.arguments import Call, RowsCache, convert_arguments, host
from gptj.pt.weights import from_numpy, to_numpy
from gptj.sharding import check_decodes


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
        self.joins = model._joins_calls

    @torch.inference_mode()
    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        self.cache.length = offset
        end = offset + token_ids.shape[1]
        seen = mask[:, :end]
        with evaluating(self.model):
            outputs = self.model.transformer(
                token_ids,
                self.cache,
                None if seen.all() else seen,
                position_ids=position_ids,
                use_cache=True,
                output_attentions="attentions" in want,
                output_hidden_states="hidden_states" in want,
                return_dict=True,
            )
            # Of a long prompt the last token's logits are a small part of all: at 6B, 200 kB of 0.4 GB for 2,047.
            hidden = outputs.last_hidden_state
            logits = self.model._logits(hidden[:, -1] if last_only else hidden)
        return Step.of(self.model._held(logits), outputs.hidden_states, outputs.attentions, fetch=to_numpy)

    @torch.inference_mode()
    def _run_together(self, runs: Sequence[Run]) -> list[Step]:
        if self.model.placement is not None:
            return super()._run_together(runs)
        calls: list[Call] = []
        for run in runs:
            cache: KVCache = run.decoder.cache  # type: ignore[attr-defined]
            if run.slots is not None:
                past: Any = RowsCache.of(cache, run.slots)
                ids, positions = torch.from_numpy(run.token_ids), torch.from_numpy(run.position_ids)
                calls.append(Call(ids, past, None, None, positions, None, None))
                continue
            cache.length = run.offset
            seen = run.mask[:, : run.end]
            calls.append(
                convert_arguments(
                    self.config,
                    self.model.device,
                    input_ids=run.token_ids,
                    past_key_values=cache,
                    attention_mask=None if seen.all() else seen,
                    position_ids=run.position_ids,
                )
            )
        with evaluating(self.model):
            states = self.model.transformer._run_together(calls)
            states = [hidden[:, -1] if run.last_only else hidden for run, hidden in zip(runs, states, strict=True)]
            rows = [hidden.shape[:-1] for hidden in states]
            logits = self.model._logits(torch.cat([hidden.flatten(0, -2) for hidden in states]))
        parts = logits.split([shape.numel() for shape in rows])
        return [
            Step.of(self.model._held(part.unflatten(0, shape)), None, None, fetch=to_numpy)
            for part, shape in zip(parts, rows, strict=True)
        ]

    def _gather(self, rows: NDArray[np.int64]) -> None:
        keys, values = (
            tuple(self.model._rows_of(x, rows) for x in side) for side in (self.cache.keys, self.cache.values)
        )
        self.cache = KVCache(keys, values, self.cache.length, fixed=True)

    @torch.inference_mode()
    def _read(self, row: int, start: int, count: int) -> Columns:
        part = slice(start, start + count)
        keys, values = (tuple(x[row, :, part].clone() for x in side) for side in (self.cache.keys, self.cache.values))
        return Columns(keys, values, 0, count)

    @torch.inference_mode()
    def _write(self, row: int, start: int, columns: Columns) -> None:
        place = slice(start, start + columns.count)
        part = slice(columns.first, columns.first + columns.count)
        for side, new in ((self.cache.keys, columns.keys), (self.cache.values, columns.values)):
            for slots, its in zip(side, new, strict=True):
                slots[row, :, place] = its[:, part]

    def _filled(self, length: int) -> KVCache:
        return KVCache(self.cache.keys, self.cache.values, length, fixed=True).filled()


class Logits(generation.HeldLogits):
    """A step's logits on a device."""

    @torch.inference_mode()
    def best(self, count: int, named: NDArray[np.int64], temperature: float | None) -> Selected:
        """The `count` best of each row of (b, v), and the logits of `named` (b, m)."""
        logits: torch.Tensor = self._array
        values, ids = logits.topk(count)
        asked = logits.gather(1, torch.from_numpy(named).to(logits.device))
        found = [to_numpy(x) for x in (values, ids, logits.isfinite().all(1), asked)]
        if temperature is not None:
            weights = ((logits - values[:, :1]) / temperature).exp().masked_fill_(logits > values[:, -1:], 0)
            parts = F.pad(weights, (0, -weights.shape[1] % PARTS))
            found.append(to_numpy(parts.view(len(parts), PARTS, -1).sum(2)))
        return Selected(*found)

    def _fetched(self, array: torch.Tensor) -> NDArray[Any]:
        return to_numpy(array)

    def _rows(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return self._array[torch.from_numpy(rows).to(self._array.device)]

    def _position(self, n: int) -> torch.Tensor:
        return self._array[:, n]


def on_host(logits: torch.Tensor) -> bool:
    """Whether they lie in the host's memory, where NumPy reads them without a copy."""
    return logits.device.type == "cpu"


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """While this is open, the model is in evaluation mode."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


class GenerationMixin(generation.Generates[torch.Tensor], scoring.Scores):
    """`generate`, `stream` and `score` for a PyTorch model."""

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        check_decodes(self.placement)  # type: ignore[attr-defined]
        return Decoder(self, batch, capacity)

    @property
    def _joins_calls(self) -> bool:  # type: ignore[override]
        # Differs: XLA would compile a program for each number of rows. On a GPU it is a kernel for each row that costs.
        return self.placement is None and self.device.type == "cpu"  # type: ignore[attr-defined]

    def _agree_on(self, seed: Any) -> Any:
        placement = self.placement  # type: ignore[attr-defined]
        if placement is None or seed is not None:
            return seed
        drawn = torch.randint(2**63 - 1, (1,), device=self.device)  # type: ignore[attr-defined]
        group = placement.native.get_group("tp")
        torch.distributed.broadcast(drawn, torch.distributed.get_global_rank(group, 0), group=group)
        return int(drawn)

    def _is_traced(self) -> bool:
        return torch.compiler.is_compiling() or torch.compiler.is_exporting()

    def _host(self, array: Any) -> NDArray[Any]:
        values = host(array)
        if values is None:
            raise generation.inside_a_graph()
        return values

    @torch.inference_mode()
    def _evaluate(self, **arguments: Any) -> Any:
        with evaluating(self):
            return self(**arguments)  # type: ignore[operator]

    @torch.inference_mode()
    def _embed(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        model: Any = self
        return to_numpy(model.get_input_embeddings()(torch.from_numpy(token_ids).to(model.device)))

    @torch.inference_mode()
    def _last_states(self, token_ids: NDArray[np.int64]) -> torch.Tensor:
        model: Any = self
        check_decodes(model.placement)
        with evaluating(model):
            return model.transformer(
                token_ids, use_cache=False, output_attentions=False, output_hidden_states=False, return_dict=True
            ).last_hidden_state

    @torch.inference_mode()
    def _logits_at(self, states: torch.Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> torch.Tensor:
        model: Any = self
        places = (torch.from_numpy(place).to(states.device) for place in (rows, columns))
        return model._logits(states[tuple(places)])

    def _rows_of(self, array: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        return array[torch.from_numpy(rows).to(array.device)]

    def _held(self, logits: torch.Tensor, columns: int | None = None) -> NDArray[Any] | Logits:
        held = Logits(logits, columns)
        return held.on_host() if on_host(logits) else held

    def _native(self, array: NDArray[Any]) -> torch.Tensor:
        return from_numpy(array).to(self.device)  # type: ignore[attr-defined]
