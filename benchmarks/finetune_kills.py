"""Kill -9 in the middle of fine-tuning, again and again: the last whole checkpoint opens each time.

    python benchmarks/finetune_kills.py DIR DATA OUT [--backend pt] [--kills 20] [-- any option of gptj finetune]

A run that saves after every update is begun in OUT, killed at a random moment, and resumed, as often as is asked.
After each kill every checkpoint with a plain name is verified against its manifest, and the last is opened by the
framework, with its optimizer. In the end the run goes to its end, and its losses are compared, to the bit, with those
of a run that nothing stopped.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gptj
from gptj.checkpoint import verify_checkpoint
from gptj.config.schema import schema
from gptj.finetune.checkpoints import RunFolder
from gptj.finetune.curve import read_curve


def newest(out: Path) -> int:
    """The step of the last checkpoint, 0 before the first."""
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)


def check(out: Path, backend: str) -> str:
    """The last checkpoint's facts, once all are whole and it opens."""
    kept = sorted(out.glob("checkpoints/step-*"))
    hidden = [path.name for path in out.glob("checkpoints/.*")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer's file is none of the manifest's
        for path in kept:
            verify_checkpoint(path)
    with RunFolder(out, resume=True) as run:
        last = run.last()
        assert last is not None and len(last.rows) == last.progress.step == last.step
        model = gptj.backend(backend).GPTJForCausalLM.from_pretrained(last.folder)
        last.moments({row.name: row.shape for row in schema(model.config)})
    return f"update {last.step} opens; unfinished: {', '.join(hidden) or 'nothing'}"


def make_parser(text: str | None, *, kills: int) -> argparse.ArgumentParser:
    """The options of a run that is killed."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="pt")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_options(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own options, and those of `gptj finetune`: the words behind --."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # argparse takes no -- behind an option
    return parser.parse_args(words[:end]), words[end + 1 :]


def losses(out: Path) -> list[float]:
    """The losses of a run's curve."""
    return [row.loss for row in read_curve(out / "loss.csv")]


def main() -> None:
    parser = make_parser(__doc__, kills=20)
    parser.add_argument("directory")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    arguments, options = read_options(parser)
    moments = random.Random(arguments.seed)
    command = [sys.executable, "-m", "gptj", "finetune", arguments.directory, arguments.data]
    options = ["--backend", arguments.backend, *options]
    whole = arguments.out.with_name(arguments.out.name + "-whole")
    for kill in range(arguments.kills):
        before = newest(arguments.out)
        process = subprocess.Popen([*command, str(arguments.out), *options, "--save-every", "1", "--resume"],
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        while newest(arguments.out) <= before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit("it came to its end before it was killed: give it more --steps")
        print(f"kill {kill + 1}: {check(arguments.out, arguments.backend)}", flush=True)
    subprocess.run([*command, str(arguments.out), *options, "--resume"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*command, str(whole), *options], check=True, stderr=subprocess.DEVNULL)
    found, expected = losses(arguments.out), losses(whole)
    print(
        f"losses of {len(found)} updates after {arguments.kills} kills:",
        "the same bits" if found == expected else "NOT THE SAME",
    )
    sys.exit(found != expected)


if __name__ == "__main__":
    main()
