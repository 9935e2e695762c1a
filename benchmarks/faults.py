"""Make malformed model folders, give each to `convert` or `verify`, and say in docs/faults.md who is refused, and how.

    python benchmarks/faults.py                     # prints the figures
    python benchmarks/faults.py --write             # and writes docs/faults.md

Each fault is made from a good folder, in which only it is wrong. It counts as refused where a GPTJError is raised,
and as named where the message contains the word that says what is wrong: a file, a tensor or a field.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "documents"))

import numpy as np
from gptj_conversion.convert import convert
from page_parts import Part

from gptj.checkpoint import open_checkpoint, verify_checkpoint, write_checkpoint
from gptj.errors import GPTJError
from gptj.parity.fingerprint import check_fingerprint
from gptj.parity.revealing import revealing_config, revealing_fill

CONFIG = revealing_config(n_layer=2)
Q_PROJ = "transformer.h.0.attn.q_proj.weight"
FC_IN = "transformer.h.0.mlp.fc_in.weight"
PART = Part("docs/faults.md", "folders", "benchmarks/faults.py")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        row: the row of the list of faults that it belongs to: W weights, X index and links, C config.
        what: in words.
        make: makes it in a good folder.
        names: a word that the message must contain.
        verify: whether only the manifest or the fingerprint can tell (`gptj verify --fingerprint`).
    """

    row: str
    what: str
    make: Callable[[Path], None]
    names: str
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a fault: the error, or None where the folder was accepted; and how long it took."""

    fault: Fault
    error: BaseException | None
    took_s: float

    @property
    def refused(self) -> bool:
        return isinstance(self.error, GPTJError)

    @property
    def named(self) -> bool:
        return self.refused and self.fault.names in str(self.error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PART.page}")
    arguments = parser.parse_args()
    outcomes = run_all()
    text = report(outcomes, peak_over_largest())
    print(text)
    if arguments.write:
        PART.write(text)
    sys.exit(0 if all(outcome.named for outcome in outcomes) else 1)


def run_all() -> list[Outcome]:
    """Every fault in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return [run(fault, Path(folder) / str(number)) for number, fault in enumerate(faults())]


def run(fault: Fault, folder: Path) -> Outcome:
    sharded = fault.row.startswith("X")
    folder.mkdir()
    source = write_checkpoint(
        folder / "source", CONFIG, revealing_fill(0), max_shard_bytes=40_000 if sharded else 10**9
    )
    model = convert(source, folder / "model", max_shard_bytes=40_000 if sharded else 10**9)
    fault.make(model)
    start = time.perf_counter()
    try:
        if fault.verify:
            verify_checkpoint(model)
            check_fingerprint(model)
        else:
            convert(model, folder / "out", fingerprint=False)
    except Exception as error:
        return Outcome(fault, error, time.perf_counter() - start)
    return Outcome(fault, None, time.perf_counter() - start)


def peak_over_largest() -> float:
    """Peak memory of a conversion over that of its imports, in units of the largest tensor (105 MB)."""
    program = """
import sys
import numpy as np
from gptj.config import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj_conversion.convert import convert
import gptj.parity.fingerprint, safetensors
config = GPTJConfig(vocab_size=51200, n_positions=8, n_embd=512, n_layer=1, n_head=4, rotary_dim=8)
def peak():  # not ru_maxrss, which a process takes over from the one that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
if sys.argv[1] == "make":
    block = np.float32(0.01)
    write_checkpoint(sys.argv[2], config, lambda row: np.broadcast_to(block, row.shape))
else:
    convert(sys.argv[2], sys.argv[3])
print((peak() - before) / (51200 * 512 * 4))
"""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/source", f"{folder}/out"]
        for step in ("make", "convert"):
            done = subprocess.run(
                [sys.executable, "-c", program, step, *paths], capture_output=True, text=True, check=True
            )
    return float(done.stdout)


# ---- making them


def rewrite(change: Callable[[dict[str, Any], bytearray], Any]) -> Callable[[Path], None]:
    """Change the header and the data of the one weights file."""

    def make(model: Path) -> None:
        path = model / "model.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        header["__metadata__"] = {"format": "pt"}
        text = change(header, data)
        text = text if isinstance(text, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        (model / "manifest.json").unlink()

    return make


def raw_weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of the one weights file."""

    def make(model: Path) -> None:
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return make


def tensor(name: str, **members: Any) -> Callable[[Path], None]:
    """Change members of one tensor's entry in the header."""
    return rewrite(lambda header, data: header[name].update(members))


def values(name: str, change: Callable[[np.ndarray], np.ndarray], *, honest: bool = True) -> Callable[[Path], None]:
    """Change a tensor's values in place; with `honest` the manifest goes, which would tell."""

    def make(model: Path) -> None:
        stored = open_checkpoint(model).tensors[name]
        array = np.ascontiguousarray(change(open_checkpoint(model).read(name).copy()))
        with stored.file.open("r+b") as stream:
            stream.seek(stored.offset)
            stream.write(array.tobytes())
        if honest:
            (model / "manifest.json").unlink()

    return make


def config(**members: Any) -> Callable[[Path], None]:
    """Change fields of config.json; DROP removes one."""

    def make(model: Path) -> None:
        fields = json.loads((model / "config.json").read_text()) | members
        (model / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not DROP}))

    return make


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the index; what `change` returns, if it is text, takes its place."""

    def make(model: Path) -> None:
        path = model / "model.safetensors.index.json"
        members = json.loads(path.read_text())
        text = change(members)
        path.write_text(text if isinstance(text, str) else json.dumps(members))

    return make


def mapped(name: str, target: Any) -> Callable[[Path], None]:
    """Let the index say that a tensor lies in `target`."""
    return index(lambda members: members["weight_map"].update({name: target}))


def drop(name: str) -> Callable[[dict[str, Any], bytearray], None]:
    """Take a tensor out of the file, data included."""

    def change(header: dict[str, Any], data: bytearray) -> None:
        begin, end = header.pop(name)["data_offsets"]
        del data[begin:end]
        for key, entry in header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [place - (end - begin) for place in entry["data_offsets"]]

    return change


def rename(old: str, new: str) -> Callable[[dict[str, Any], bytearray], None]:
    return lambda header, data: header.update({new: header.pop(old)})


def put(name: str, data: bytes) -> Callable[[Path], None]:
    """Put a file beside the others, or in the place of one."""

    def make(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).write_bytes(data)

    return make


def replace_by(name: str, make_it: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Put something that is no regular file in the place of one."""

    def make(model: Path) -> None:
        (model / name).unlink()
        make_it(model / name)

    return make


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def without_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


DROP = object()
SHARD = "model-00002-of-"


def shard(model: Path) -> Path:
    return next(model.glob(f"{SHARD}*"))


def flip(array: np.ndarray) -> np.ndarray:
    array.reshape(-1).view(np.uint32)[7] ^= 1
    return array


def faults() -> list[Fault]:
    """The list; a row of each kind at least."""
    fc = CONFIG.n_inner
    w = "model.safetensors"
    x = "model.safetensors.index.json"
    found = [
        Fault("W1", "cut in the header", raw_weights(lambda raw: raw[:100]), w),
        Fault("W1", "cut by one byte", raw_weights(lambda raw: raw[:-1]), w),
        Fault("W1", "cut in half", raw_weights(lambda raw: raw[: len(raw) // 2]), w),
        Fault("W2", "header length 0", raw_weights(lambda raw: bytes(8) + raw[8:]), w),
        Fault("W2", "header length 2^63", raw_weights(lambda raw: struct.pack("<Q", 2**63) + raw[8:]), w),
        Fault("W2", "header length 2^40", raw_weights(lambda raw: struct.pack("<Q", 2**40) + raw[8:]), w),
        Fault("W3", "overlap", tensor(Q_PROJ, data_offsets=[0, 48 * 48 * 4]), "lap"),
        Fault("W3", "end before start", tensor(Q_PROJ, data_offsets=[9, 3]), Q_PROJ),
        Fault("W3", "negative offset", tensor(Q_PROJ, data_offsets=[-4, 0]), Q_PROJ),
        Fault("W3", "fractional offset", tensor(Q_PROJ, data_offsets=[0.0, 4.0]), Q_PROJ),
        Fault("W3", "bytes after the last tensor", raw_weights(lambda raw: raw + b"\0"), w),
        Fault("W4", "a name twice", rewrite(lambda h, d: json.dumps(h)[:-1].encode() + b', "a": 1, "a": 1}'), "'a'"),
        Fault("W5", "a name that is a path", rewrite(rename(Q_PROJ, "../x")), "../x"),
        Fault("W5", "an empty name", rewrite(rename(Q_PROJ, "")), w),
        Fault("W6", "a hundred thousand levels", rewrite(lambda h, d: b'{"a":' + b"[" * 100_000), w),
        Fault("W6", "ten thousand axes", tensor(Q_PROJ, shape=[1] * 10_000), Q_PROJ),
        Fault("W6", "a shape of 2^62 and 0", tensor(Q_PROJ, shape=[2**62, 2**62, 0]), Q_PROJ),
        Fault("W7", "an unknown dtype", tensor(Q_PROJ, dtype="F4"), Q_PROJ),
        Fault("W7", "whole numbers", tensor(Q_PROJ, dtype="I32"), Q_PROJ),
        Fault("W8", "a wrong shape", tensor(FC_IN, shape=[fc // 2, 96]), FC_IN),
        Fault("W8", "transposed", tensor(FC_IN, shape=[48, fc]), "looks transposed"),
        Fault("W9", "a transposed square", values(Q_PROJ, lambda a: a.T, honest=False), Q_PROJ, verify=True),
        Fault("W10", "a tensor missing", rewrite(drop(Q_PROJ)), Q_PROJ),
        Fault("W10", "a tensor misspelt", rewrite(rename(Q_PROJ, Q_PROJ.replace("q_proj", "q_prj"))), "did you mean"),
        Fault("W10", "a tensor too many", rewrite(rename(Q_PROJ, "transformer.h.9.x")), "transformer.h.9.x"),
        Fault("W11", "NaN", values(Q_PROJ, lambda a: np.where(a == a.max(), np.nan, a).astype(a.dtype)), Q_PROJ),
        Fault("W11", "infinity", values(Q_PROJ, lambda a: np.where(a == a.max(), np.inf, a).astype(a.dtype)), Q_PROJ),
        Fault("W12", "one flipped bit", values(FC_IN, flip, honest=False), FC_IN, verify=True),
        Fault("W13", "a stale index beside it", put(x, b"{}"), x),
        Fault("W14", "a git-lfs pointer", put(w, b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
        Fault("W14", "an HTML page", put(w, b"<!DOCTYPE html><html>"), "HTML"),
        Fault("W14", "gzip", put(w, b"\x1f\x8b" + bytes(50)), "gzip"),
        Fault("W14", "an empty file", put(w, b""), "empty"),
        Fault("W14", "a folder", replace_by(w, Path.mkdir), w),
        Fault("W14", "a FIFO", replace_by(w, os.mkfifo), w),
        Fault("W14", "/dev/zero", replace_by(w, lambda path: path.symlink_to("/dev/zero")), w),
        Fault("X3", "a link to itself", replace_by("config.json", to_itself), "config.json"),
        Fault("X4", "a shard missing", lambda model: shard(model).unlink(), SHARD),
        Fault("X4", "a shard cut", lambda model: os.truncate(shard(model), 5000), SHARD),
        Fault("X4", "a tensor in the wrong shard", mapped(Q_PROJ, "model-00001-of-00009.safetensors"), "00001"),
        Fault("X4", "a tensor not listed", index(lambda m: m["weight_map"].pop(Q_PROJ) and None), Q_PROJ),
        Fault("X5", "weight_map is a list", index(lambda m: m.update(weight_map=[])), "weight_map"),
        Fault("X5", "not JSON", index(lambda m: "not json"), x),
        Fault("X6", "no config", lambda model: (model / "config.json").unlink(), "config.json"),
        Fault("X6", "no weights", without_weights, "model.safetensors"),
        Fault("C4", "a misspelt key", config(n_layer=DROP, n_lyaer=2), "n_lyaer"),
        Fault("C5", "a trailing comma", put("config.json", b'{"n_layer": 2,}'), "config.json"),
        Fault("C5", "NaN", put("config.json", b'{"n_layer": NaN}'), "config.json"),
        Fault("C5", "a list", put("config.json", b"[]"), "config.json"),
        Fault("C5", "empty", put("config.json", b""), "config.json"),
        Fault("C5", "UTF-16", put("config.json", "{}".encode("utf-16")), "config.json"),
        Fault("C5", "a key twice", put("config.json", b'{"n_layer": 2, "n_layer": 3}'), "n_layer"),
        Fault("C6", "another n_head", config(n_head=2), "n_head"),
        Fault("C6", "another rotary_dim", config(rotary_dim=4), "rotary_dim"),
        Fault("C7", "another model", config(model_type="llama"), "model_type"),
    ]  # fmt: skip
    for target in ("../x.safetensors", "/etc/x.safetensors", "a/../../x", "C:\\x", "", ".", "a\0b", "x" * 300, 3, None):
        found.append(Fault("X1", f"weight_map value {str(target)[:20]!r}", mapped(Q_PROJ, target), "weight_map"))
    for field in ("n_head", "n_embd", "n_layer", "n_positions", "vocab_size"):
        for value in (0, -4, 2.5, "2", True, None, 10**12):
            fault = Fault("C1", f"{field} = {json.dumps(value)}", config(**{field: value}), field)
            found.append(fault)
    for field, value in (
        ("rotary_dim", 3), ("rotary_dim", 0), ("rotary_dim", -2), ("layer_norm_epsilon", -1), ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", "1e-5"), ("attn_pdrop", 2), ("activation_function", "tanhh"), ("initializer_range", "x"),
    ):  # fmt: skip
        row = "C2" if field == "rotary_dim" else "C3"
        found.append(Fault(row, f"{field} = {json.dumps(value)}", config(**{field: value}), field))
    return found


# ---- the page


def report(outcomes: list[Outcome], peak: float) -> str:
    count = len(outcomes)
    refused = sum(outcome.refused for outcome in outcomes)
    named = sum(outcome.named for outcome in outcomes)
    foreign = sum(outcome.error is not None and not outcome.refused for outcome in outcomes)
    slowest = max(outcome.took_s for outcome in outcomes)
    named_share = f"{named} ({named / max(refused, 1):.0%})"
    figures = [
        f"| malformed folders | {count} | 74 | 74 |",
        f"| refused | {refused} ({refused / count:.0%}) | 52 | 49 |",
        f"| of these, naming the file, tensor or field | {named_share} | 10 of 32 | 10 of 35 |",
        f"| errors that are not ours | {foreign} | | |",
        f"| slowest refusal | {slowest:.2f} s | hangs on a FIFO | hangs on a FIFO |",
        f"| peak memory of a conversion over its imports, in largest tensors | {peak:.2f} | | |",
    ]
    lines = [
        "| | gptj | transformers 4.57.6 | 5.23.0 |",
        "|---|---|---|---|",
        *figures,
        "",
        "| row | fault | error | message |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        kind = "accepted" if outcome.error is None else type(outcome.error).__name__
        message = str(outcome.error or "").replace("|", "\\|")
        message = message[message.rfind("/model") + 1 :] if "/model" in message else message
        named_or_not = "" if outcome.named else " (not named)"
        lines.append(
            f"| {outcome.fault.row} | {shown(outcome.fault.what)} | {kind}{named_or_not} | {shown(message, 160)} |"
        )
    return "\n".join(lines)


def shown(text: str, longest: int = 60) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= longest else text[:longest] + "..."


if __name__ == "__main__":
    main()
