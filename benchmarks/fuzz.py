"""Feed the readers of JSON lies: safetensors headers, indexes, configs, training configs, manifests.

    python benchmarks/fuzz.py --cases 100000                 # every reader; some minutes
    python benchmarks/fuzz.py --cases 5000 --reader index

Half of the cases change bytes of a good document; half change its structure (a member dropped, doubled, renamed, or
replaced by a value that somebody may have thought impossible) and are then well-formed JSON. A case may be accepted,
or refused by a GPTJError; anything else is a crash, and is printed with what made it. The binary formats (npz, bin,
msgpack, h5, tar) have a fuzzer of their own, `python tests/conversion/fuzz.py`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptj_conversion.mesh.training_config import TrainingConfig

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import CheckpointWarning, GPTJError
from gptj.parity.revealing import revealing_fill
from gptj.reading.manifest import verify_manifest
from gptj.reading.safetensors_file import parse_header
from gptj.reading.weight_files import open_weights

CONFIG = GPTJConfig(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=2, rotary_dim=2)
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**30, "", "0", "a/../b", "../x", "/x",
    "C:\\x", "\x00", "\ud800", "x" * 600, "model.safetensors", "F32", "BF16", "F4", [], [[]], [0], [0, 0], [-1, 4],
    [4, 2], [2**62, 2**62, 0], [1.0], ["1"], [True], [None] * 9, {}, {"": 0}, {"dtype": "F32"},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """A document that is read without complaint, and what reads it."""

    good: bytes
    read: Callable[[bytes], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", help="one of those above; may be said again [default: all]")
    arguments = parser.parse_args()
    crashes = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        readers = make_readers(Path(folder))
        print("| reader | cases | refused | read | crashes | slowest ms | s |\n|---|---|---|---|---|---|---|")
        for name in arguments.reader or readers:
            row, found = fuzz(readers[name], arguments.cases, f"{name} {arguments.seed}")
            print(f"| {name} | {arguments.cases:,} | {row} |", flush=True)
            for error, data in found[:5]:
                print(f"    {error}: {data!r}", file=sys.stderr)
            crashes += len(found)
    sys.exit(1 if crashes else 0)


def fuzz(reader: Reader, cases: int, seed: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The counts, as a row of the table, and every crash with what made it."""
    chance = random.Random(seed)
    refused, read, slowest_s, crashes = 0, 0, 0.0, []
    reader.read(reader.good)
    begun = time.perf_counter()
    for _ in range(cases):
        data = changed_bytes(reader.good, chance) if chance.random() < 0.5 else changed_tree(reader.good, chance)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():  # what is odd and lawful is said and read
                warnings.simplefilter("ignore", CheckpointWarning)
                reader.read(data)
            read += 1
        except GPTJError:
            refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            crashes.append((f"{type(error).__name__}: {error}", data))
        slowest_s = max(slowest_s, time.perf_counter() - start)
    took_s = time.perf_counter() - begun
    reader.read(reader.good)  # and the next one, which may read the same folder, finds it as it was
    return f"{refused:,} | {read:,} | {len(crashes)} | {slowest_s * 1e3:.0f} | {took_s:.0f}", crashes


# ---- the readers


def make_readers(folder: Path) -> dict[str, Reader]:
    """Every reader, with a good document that has all that it looks at."""
    checkpoint = write_checkpoint(folder / "x", CONFIG, revealing_fill(0), max_shard_bytes=400)
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]

    def read_header(text: bytes) -> object:
        # As long a file as the header was made for: half of the lies would be found by its size alone otherwise.
        size = len(data) + len(text) - length
        return parse_header(struct.pack("<Q", len(text)) + text, file="x.safetensors", file_bytes=size)

    def in_file(path: Path, read: Callable[[Path], object]) -> Reader:
        good = path.read_bytes()

        def write_and_read(text: bytes) -> object:
            path.write_bytes(text)
            return read(path)

        return Reader(good, write_and_read)

    training = {
        "layers": 1, "d_model": 4, "n_heads": 2, "n_vocab": 8, "norm": "layernorm", "pe": "rotary",
        "pe_rotary_dims": 2, "seq": 4, "cores_per_replica": 1,
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(training))
    index = checkpoint / "model.safetensors.index.json"
    return {
        "header": Reader(data[8 : 8 + length].rstrip(), read_header),
        "index": in_file(index, lambda _: open_weights(checkpoint, None, follow_links=False)),
        "config": in_file(checkpoint / "config.json", GPTJConfig.from_file),
        "training config": in_file(folder / "training.json", TrainingConfig.from_file),
        "manifest": in_file(checkpoint / "manifest.json", lambda path: verify_manifest(path.parent)),
    }


# ---- the lies


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four of them flipped, dropped, doubled, moved, or cut off."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(out) + 1), chance.randint(1, 8)
        kind = chance.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = out[at : at + length]
        elif kind == 3:
            out[at:at] = chance.choice(
                [b"\x00", b"\xff", b'"', b"{", b"[", b"]", b"}", b",", b"9" * 30, b"1e999", b"NaN"]
            )
        elif kind == 4:
            other = chance.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
        elif chance.random() < 0.2:
            del out[at:]
    return bytes(out)


def changed_tree(data: bytes, chance: random.Random) -> bytes:
    """The document with one to three changes of its structure."""
    tree = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        places = list(containers(tree))
        place = chance.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            continue
        key = chance.choice(keys)
        kind = chance.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1:
            place[key] = copy.deepcopy(chance.choice(STRANGE))  # which later changes may change
        elif kind == 2:
            other = chance.choice(places)
            place[key] = json.loads(
                json.dumps(chance.choice(list(other.values() if isinstance(other, dict) else other) or [0]))
            )
        elif isinstance(place, dict):
            place[chance.choice([*map(str, STRANGE[:24]), f"{key} ", key.upper(), key[:-1]])] = place.pop(key)
    text = json.dumps(tree, ensure_ascii=chance.random() < 0.9)
    return text.encode("utf-8", "surrogatepass")


def containers(tree: Any) -> Any:
    """Every object and list of the document."""
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(value)


if __name__ == "__main__":
    main()
