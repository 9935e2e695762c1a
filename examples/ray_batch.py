"""Continue many files of prompts on a Ray cluster, by actors that each load the model once.

    pip install "gptj-multibackend[pt,ray]"
    python examples/ray_batch.py MODEL OUT part-*.jsonl --actors 2 --max-new-tokens 64 --seed 0

A line of a file is {"token_ids": [...]} or {"prompt": "..."}. Each file's texts go into OUT as JSON lines, whole or not
at all, with the tokens that `gptj batch` writes for it: each file draws with the seed, the seed + 1, and so on. Ray
Data hands the files out, starts an actor that died again, and hands its file to another; a file whose output is there
is passed over.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import ray


class Continue:
    """An actor: the model, loaded once, and a method that continues the prompts of a file.

    Args:
        directory, out: the model's folder, and that of the texts.
        settings: of `generate`.
        seed: of each file's first prompt.
    """

    def __init__(self, directory: str, out: str, settings: dict[str, Any], seed: int) -> None:
        import gptj.pt as gptj
        from gptj import GPTJTokenizer

        self.model = gptj.GPTJForCausalLM.from_pretrained(directory, inference=True)
        there = (Path(directory) / "tokenizer.json").exists()
        self.tokenizer = GPTJTokenizer.from_pretrained(directory) if there else None
        self.out, self.settings, self.seed = Path(out), settings, seed

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """What became of the file."""
        from gptj.writing.output_file import whole_file

        source = Path(row["file"])
        target = self.out / f"{source.stem}.jsonl"
        if not target.exists():
            prompts = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
            with whole_file(target) as write:
                for number, prompt in enumerate(prompts):
                    write(f"{json.dumps(self.continue_one(prompt, number))}\n".encode())
        return {"file": str(target), "prompts": len(target.read_text().splitlines())}

    def continue_one(self, prompt: dict[str, Any], number: int) -> dict[str, Any]:
        """The record of a prompt."""
        ids = prompt["token_ids"] if "token_ids" in prompt else self.tokenizer.encode(prompt["prompt"])
        made = self.model.generate(np.array([ids]), seed=[self.seed + number], **self.settings)
        tokens = [int(i) for i in made[0]]
        text = None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)
        return {"line": number + 1, "token_ids": tokens, "text": text}


def main() -> None:
    """Continue the files that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "do_sample": asked.temperature > 0}
    if asked.temperature > 0:
        settings["temperature"] = asked.temperature
    items = [{"file": str(path.resolve())} for path in asked.files]
    files = ray.data.from_items(items, override_num_blocks=len(items))  # one file at a time to whom is free
    arguments = (str(asked.model.resolve()), str(asked.out.resolve()), settings, asked.seed)
    done = files.map(Continue, fn_constructor_args=arguments, num_cpus=1, num_gpus=asked.gpus,
                     compute=ray.data.ActorPoolStrategy(size=asked.actors))  # fmt: skip
    for row in done.take_all():
        print(f"{row['file']}: {row['prompts']} prompts")


if __name__ == "__main__":
    main()
