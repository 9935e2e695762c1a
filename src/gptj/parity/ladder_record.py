"""One backend's rungs of the ladder, computed in a process of its own: `python -m gptj.parity.ladder_record`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gptj
from gptj.parity.findings import LadderRung
from gptj.parity.ladder import NEW_TOKENS, RUNGS, TRANSFORMERS, LadderQuestion, measure_rung
from gptj.parity.oracle import positions_of_mask
from gptj.parity.processes import record_rows

__all__ = ["record_rung"]

Array = NDArray[Any]


def record_rung(directory: str | os.PathLike[str], backend: str, rung: str, question: LadderQuestion) -> LadderRung:
    """A rung, computed in this process.

    Args:
        directory: a checkpoint of a causal language model.
        backend, rung: of `RUNGS`.
        question: what to answer.

    Raises:
        GPTJError: see `gptj.parity.record.record_backend`.
    """
    answer = _answer_of_transformers if backend == TRANSFORMERS else _answer
    return measure_rung(backend, rung, question, *answer(directory, backend, rung, question))


def _answer(directory: Any, backend: str, rung: str, question: LadderQuestion) -> tuple[Array, Array]:
    """Logits and greedy tokens of one of the wings."""
    wing = gptj.backend(backend)
    options = {"param_dtype": "float32", "inference": True, "quantize": "int8"}
    model = wing.GPTJForCausalLM.from_pretrained(directory, **options if rung == "int8" else {"param_dtype": rung})
    model.generation_config = None
    positions = positions_of_mask(question.mask)
    output = model(question.ids, attention_mask=question.mask, position_ids=positions, use_cache=False)
    made = model.generate(question.ids, attention_mask=question.mask, max_new_tokens=NEW_TOKENS, do_sample=False,
                          eos_token_id=None, pad_token_id=0)  # fmt: skip
    return np.asarray(wing.to_numpy(output.logits)), np.asarray(wing.to_numpy(made))[:, question.ids.shape[1] :]


def _answer_of_transformers(directory: Any, _: str, rung: str, question: LadderQuestion) -> tuple[Array, Array]:
    """Logits and greedy tokens of transformers' own GPT-J."""
    import transformers

    model = transformers.GPTJForCausalLM.from_pretrained(directory, torch_dtype=rung).eval().requires_grad_(False)
    model.generation_config = transformers.GenerationConfig()
    whole = model.lm_head.bias.new_tensor([]).long()  # its framework's tensors are made without importing it here
    ids, mask, positions = (
        whole.new_tensor(values.tolist()) for values in (question.ids, question.mask, positions_of_mask(question.mask))
    )
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return logits.float().numpy(), made.numpy()[:, question.ids.shape[1] :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what `record_rung` gives; see `gptj.parity.processes.end_of` for what is returned."""
    parser = argparse.ArgumentParser(prog="python -m gptj.parity.ladder_record")
    parser.add_argument("directory", help="a checkpoint")
    parser.add_argument("--backend", required=True, choices=tuple(RUNGS))
    parser.add_argument("--rungs", required=True, nargs="+", help="the precisions")
    parser.add_argument("--question", required=True, help="the .npz of prompts and the oracle's answers")
    parser.add_argument("--out", required=True, help="the JSON file for the rungs")
    options = parser.parse_args(arguments)

    def record() -> list[LadderRung]:
        question = LadderQuestion.load(options.question)
        rungs = []
        for rung in options.rungs:
            print(rung, flush=True)  # who started this process shows it
            rungs.append(record_rung(options.directory, options.backend, rung, question))
        return rungs

    return record_rows(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
