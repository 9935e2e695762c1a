"""What choosing a token costs on the host, strategy by strategy: the loop of `generate` over logits that are there.

    python -m benchmarks.host                                   # this checkout
    python -m benchmarks.host --against ../before/src           # beside another one, turn by turn

The decoder hands out logits of GPT-J's vocabulary, normal with a deviation of 3, and hidden states of its width, and
computes nothing. So what is left is the host's part of a step: milliseconds of its processor's time, medians of turns,
one thread. Each turn is a process of its own, and turns alternate between the checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "greedy": ({}, (1, 8, 64)),
    "greedy, repetition penalty 1.1": ({"repetition_penalty": 1.1}, (1, 8, 64)),
    "top_k 50": ({"do_sample": True, "top_k": 50}, (1, 8, 64)),
    "top_p 0.9": ({"do_sample": True, "top_k": 0, "top_p": 0.9}, (1, 8, 64)),
    "temperature 0.8, top_k 50, top_p 0.9, repetition penalty 1.1": (
        {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
        (1, 8, 64),
    ),
    "the same, known tokens only": (
        {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "known": 50_257},
        (1, 8),
    ),
    "4 beams": ({"num_beams": 4}, (1, 8)),
    "4 beams, drawn": ({"num_beams": 4, "do_sample": True, "top_k": 50}, (1,)),
    "4 beams in 2 groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, (1,)),
    "contrastive, top_k 4, after 500 tokens": ({"penalty_alpha": 0.6, "top_k": 4, "prompt": 500}, (1,)),
    "prompt lookup, 3 tokens": ({"prompt_lookup_num_tokens": 3}, (1,)),
    "an assistant's guesses": ({"do_sample": True, "top_k": 50, "assisted": True}, (1,)),
}


def measured(steps: int, only: str | None) -> dict[str, float]:
    """Milliseconds a step by case and rows; an assisted step is one kept token."""
    import numpy as np

    from gptj import GPTJConfig
    from gptj.generation import Decoder, GenerationConfig, Step, generate, known_tokens_only

    config = GPTJConfig(n_layer=1, eos_token_id=None)
    random = np.random.default_rng(0)
    listed = random.standard_normal((72, config.vocab_size), np.float32) * 3
    states = random.standard_normal((1, 512, config.n_embd), np.float32)

    class Listed(Decoder):
        def _run(self, token_ids: Any, *others: Any, last_only: bool, want: Any) -> Step:
            columns = 1 if last_only else token_ids.shape[1]
            count = self.batch * columns
            place = self.length % (len(listed) - count + 1) if count < len(listed) else 0
            logits = listed[place : place + count].reshape(self.batch, columns, -1)
            hidden = (np.broadcast_to(states[:, : token_ids.shape[1]], (self.batch, token_ids.shape[1], 4096)),)
            return Step(logits[:, -1] if last_only else logits, hidden if "hidden_states" in want else None)

        def _gather(self, rows: Any) -> None: ...

    def make(batch: int, capacity: int) -> Decoder:
        return Listed(config, batch, capacity)

    def turn(
        count: int, rows: int, *, known: int | None = None, assisted: bool = False, prompt: int = 32, **options: Any
    ) -> float:
        start = time.process_time()
        generate(
            make,
            random.integers(0, 50_257, (rows, prompt)),
            model_config=config,
            generation_config=GenerationConfig(max_new_tokens=count, pad_token_id=0, **options),
            seed=1,
            logits_processor=[] if known is None else [known_tokens_only(known)],
            assistant=make if assisted else None,
        )
        return time.process_time() - start

    found = {}
    for name, (options, batches) in CASES.items():
        for rows in batches if only is None or only in name else ():
            turn(2, rows, **options)
            found[f"{name} | {rows}"] = 1000 * turn(steps, rows, **options) / steps
    return found


def turn_of(source: Path, steps: int, only: str | None) -> dict[str, float]:
    """The figures of a process that imports `gptj` from this folder."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    words = [sys.executable, str(Path(__file__)), "--turn", "--steps", str(steps), *(["--only", only] if only else [])]
    done = subprocess.run(
        words, env={**os.environ, **threads, "PYTHONPATH": str(source)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout's src, measured in turn with this one's")
    parser.add_argument("--only", help="the cases whose name holds this")
    parser.add_argument("--steps", type=int, default=12, help="tokens of a turn [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(measured(arguments.steps, arguments.only)))
        return
    sources = {"here": ROOT / "src"} | ({"before": arguments.against} if arguments.against else {})
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    for _ in range(arguments.turns):
        for name, source in sources.items():
            turns[name].append(turn_of(source, arguments.steps, arguments.only))
    names = [*reversed(sources)]
    print("| strategy | rows | " + " | ".join(f"{name}, ms a step" for name in names) + " |")
    print("|---" * (2 + len(names)) + "|")
    for case in turns["here"][0]:
        medians = [statistics.median(turn[case] for turn in turns[name]) for name in names]
        print(f"| {case} | " + " | ".join(f"{median:.2f}" for median in medians) + " |")


if __name__ == "__main__":
    main()
