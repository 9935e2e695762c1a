"""The bytes of every file that is written, format by format: a change of the writers must not change one of them.

HDF5 files are libhdf5's own work, which another release may lay out otherwise; of them the arrays' hashes are held. The
table is made anew by `python tests/conversion/test_bytes.py --write`, which a change of what is written must say why.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptj.config import GPTJConfig

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "data" / "written_bytes.json"
CONFIG = GPTJConfig(vocab_size=12, n_positions=16, n_embd=16, n_layer=2, n_head=4, rotary_dim=2)
TIED = CONFIG.replace(tie_word_embeddings=True)

NAMED = ("safetensors", "bin", "flax", "tf")
MESH = {"to": "mesh", "shards": 2}

WRITTEN: dict[str, tuple[GPTJConfig, str, dict[str, Any]]] = {
    **{to: (CONFIG, "causal_lm", {"to": to}) for to in NAMED},
    **{f"{to} sharded": (CONFIG, "causal_lm", {"to": to, "max_shard_bytes": 4000}) for to in NAMED},
    **{f"{to} float16": (CONFIG, "causal_lm", {"to": to, "dtype": "float16"}) for to in NAMED},
    **{f"{to} base": (CONFIG, "base", {"to": to}) for to in NAMED},
    **{f"{to} classifier": (CONFIG, "sequence_classification", {"to": to}) for to in NAMED},
    **{f"{to} tied": (TIED, "causal_lm", {"to": to}) for to in NAMED},
    "mesh": (CONFIG, "causal_lm", MESH),
    "mesh full": (CONFIG, "causal_lm", {**MESH, "layout": "full", "shards": 4}),
    "mesh float16": (CONFIG, "causal_lm", {**MESH, "dtype": "float16", "shards": 1}),
    "mesh bfloat16": (CONFIG, "causal_lm", {**MESH, "dtype": "bfloat16"}),
}


def files_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Each file's name and hash; of a manifest what follows from the bytes alone, of HDF5 the arrays."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            members = json.loads(data)
            kept = {
                key: members[key] for key in ("format", "tensors", "config_sha256", "weights_format") if key in members
            }
            data = json.dumps(kept, sort_keys=True).encode()
        elif path.suffix == ".h5":
            data = b"".join(arrays_of(path))
        yield path.relative_to(folder).as_posix(), hashlib.sha256(data).hexdigest()


def arrays_of(path: Path) -> Iterator[bytes]:
    """The names and bytes of an HDF5 file's arrays."""
    import h5py

    found: list[tuple[str, bytes]] = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, one: found.append((name, one[()].tobytes())) if isinstance(one, h5py.Dataset) else None
        )
    for name, data in sorted(found):
        yield name.encode() + data


def written(case: str, folder: Path) -> dict[str, str]:
    """The hashes of what a case of `WRITTEN` writes."""
    from checkpoint_samples import write_sample
    from gptj_conversion.convert import convert

    config, head, options = WRITTEN[case]
    source = write_sample(folder / "source", config, head=head)
    return dict(files_of(convert(source, folder / "out", tokenizer="none", **options)))


@pytest.mark.parametrize("case", WRITTEN)
def test_not_a_byte_of_what_is_written_changes(tmp_path, case):
    assert written(case, tmp_path) == json.loads(TABLE.read_text())[case]


def test_a_changed_byte_would_be_noticed(tmp_path):
    found = written("bin", tmp_path)
    path = tmp_path / "out" / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert dict(files_of(tmp_path / "out")) != found


if __name__ == "__main__" and "--write" in sys.argv:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    table = {}
    for case in WRITTEN:
        with tempfile.TemporaryDirectory() as folder:
            table[case] = written(case, Path(folder))
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
