"""What we write as a TPU checkpoint is what the original writes: leaf for leaf, and to the byte in its archives."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import write_sample
from gptj_conversion.common.dialects import mesh_leaves
from gptj_conversion.common.transpose import copy_transposed
from gptj_conversion.convert import convert, describe
from gptj_conversion.mesh.reader import open_mesh
from gptj_conversion.mesh.writer import write_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mesh_samples import BFLOAT16, same_bits, write_mesh_sample

from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec, schema
from gptj.errors import ConfigError, InputError, SchemaError, WriteError
from gptj.reading.npz import npy_header, open_npz
from gptj.writing.file_system import FileSystem
from gptj.writing.folder import WritingOptions
from gptj.writing.stored_zip import StoredZipWriter

DATA = Path(__file__).parent.parent / "data"
MP2 = DATA / "mesh_mp2"
TRAINING = MP2 / "config.json"
CONFIG = GPTJConfig(vocab_size=24, n_positions=16, n_embd=16, n_layer=11, n_head=8, rotary_dim=2)


def tensor(row: TensorSpec, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng([*row.name.encode()]).standard_normal(row.shape).astype(np.float32).astype(dtype)


def test_every_archive_of_the_original_is_written_again_to_the_byte():
    for path in sorted(MP2.glob("full*/step_120/shard_*/*.npz")):
        file = open_npz(path)
        written = bytearray()
        archive = StoredZipWriter(written.extend)
        for n, array in enumerate(file.arrays):
            archive.add(f"arr_{n}.npy", npy_header(array.dtype, array.shape), file.read(array).tobytes())
        archive.finish()
        assert bytes(written) == path.read_bytes(), path


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (10**20, 0), (7, 4, 1)])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i4", "<f8"])
def test_an_npy_header_is_numpys(shape, dtype):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    assert npy_header(np.dtype(dtype), shape) == stream.getvalue()


@pytest.mark.parametrize(("layout", "name"), [("full", "full"), ("slim", "full_slim"), ("slim", "full_slim_f16")])
def test_the_leaves_are_the_originals_in_order_file_shape_and_dtype(tmp_path, layout, name):
    convert(MP2 / name, tmp_path / "out", config=TRAINING, to="mesh", shards=2, layout=layout)
    expected = json.loads((MP2 / f"leaves_{layout}.json").read_text())
    for shard in (0, 1):
        for leaf in expected:
            folder = f"step_120/shard_{shard}"
            with (
                np.load(tmp_path / "out" / folder / leaf["file"]) as ours,
                np.load(MP2 / name / folder / leaf["file"]) as theirs,
            ):
                assert ours.files == theirs.files
                one, other = ours[leaf["array"]], theirs[leaf["array"]]
                assert list(one.shape) == leaf["shape_per_shard"] and one.dtype == other.dtype, leaf["path"]
                if "/linear" in leaf["path"] and leaf["path"].endswith("/w") and "/params/" in leaf["path"]:
                    folded = "embedding" in leaf["path"]
                    assert folded or one.tobytes() == other.tobytes(), leaf["path"]


def test_a_full_checkpoint_has_a_fresh_optimizer(tmp_path):
    convert(MP2 / "full", tmp_path / "out", config=TRAINING, to="mesh", shards=2, layout="full")
    leaves = json.loads((MP2 / "leaves_full.json").read_text())
    for leaf in leaves:
        if "opt_state" in leaf["path"]:
            with np.load(tmp_path / "out" / "step_120" / "shard_1" / leaf["file"]) as arrays:
                assert not arrays[leaf["array"]].any(), leaf["path"]
    source = open_mesh(tmp_path / "out")
    assert (source.layout, source.context.step) == ("full", 120)


def test_meta_json_is_what_the_originals_trainer_looks_up(tmp_path):
    write_mesh(tmp_path / "out", CONFIG, tensor, shards=2, step=9)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["step"] == 9 and meta["checkpoints"][-1] == 9 and meta["aux"]["9"].get("train_loader", 1) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_a_round_trip_is_bit_identical(tmp_path, shards, dtype):
    given_dtype = BFLOAT16 if dtype == "bfloat16" else dtype
    write_mesh(tmp_path / "out", CONFIG, lambda row: tensor(row, given_dtype), shards=shards, dtype=dtype)
    source = open_mesh(tmp_path / "out")
    assert (source.shards, source.dtype, source.config.n_head) == (shards, dtype, 8)
    assert source.list_differing_copies() == []
    for row in schema(CONFIG):
        assert same_bits(source.read(row), tensor(row, given_dtype)), row.name


def test_layer_norms_stand_in_shard_0_and_are_neutral_elsewhere(tmp_path):
    write_mesh(tmp_path / "out", CONFIG, tensor, shards=4, dtype="float32")
    source = open_mesh(tmp_path / "out")
    for number, leaf in enumerate(mesh_leaves(CONFIG.n_layer)):
        if "replicated_layer_norm" in leaf.path:
            for shard in (1, 2, 3):
                archive, array = source.parameters[shard][number]
                assert (archive.read(array) == (1 if leaf.path.endswith("scale") else 0)).all()


@settings(deadline=None, max_examples=20)
@given(
    values=st.sampled_from([np.float32, np.float16, BFLOAT16]).flatmap(
        lambda dtype: hnp.arrays(
            np.dtype(f"u{np.dtype(dtype).itemsize}"),
            16,
            elements=st.integers(0, 2 ** (8 * np.dtype(dtype).itemsize) - 1),
        ).map(lambda bits: bits.view(dtype))
    ),
    shards=st.sampled_from([1, 2, 4, 8]),
)
def test_a_summed_bias_comes_back_to_the_bit_whatever_its_values(tmp_path_factory, values, shards):
    values = np.where(np.isfinite(values), values, values.dtype.type(0))

    def read(row: TensorSpec) -> np.ndarray:
        return values if row.name.endswith("fc_out.bias") else np.zeros(row.shape, values.dtype)

    config = CONFIG.replace(n_layer=1)
    path = tmp_path_factory.mktemp("mesh") / "out"
    write_mesh(path, config, read, shards=shards, dtype=values.dtype.name)
    assert same_bits(open_mesh(path).read("transformer.h.0.mlp.fc_out.bias"), values)


def test_a_checkpoint_of_any_shards_is_resharded_through_the_canonical_tensors(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", shards=2, heads=4, vocab_per_shard=6)
    convert(sample.path, tmp_path / "four", config=sample.config_file, to="mesh", shards=4)
    convert(tmp_path / "four", tmp_path / "out")
    convert(sample.path, tmp_path / "direct", config=sample.config_file)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()


def test_describe_finds_the_training_config_that_we_wrote_beside_the_checkpoint(tmp_path):
    write_mesh(tmp_path / "out", CONFIG, tensor, shards=2)
    facts = describe(tmp_path / "out")
    assert (facts.heads, facts.positions, facts.problems) == (8, 16, ())


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "words"),
    [
        ({}, {"shards": 3}, ConfigError, "n_head = 8"),
        ({}, {"shards": 0}, InputError, "shards"),
        ({}, {"shards": 2, "layout": "wide"}, InputError, "slim or full"),
        ({}, {"shards": 2, "layout": "full", "dtype": "bfloat16"}, InputError, "dtype"),
        ({}, {"shards": 2, "dtype": "float64"}, InputError, "dtype"),
        ({}, {"shards": 2, "step": -1}, InputError, "step"),
        ({"vocab_size": 25}, {"shards": 2}, ConfigError, "vocab_size = 25"),
        ({"activation_function": "relu"}, {"shards": 2}, ConfigError, "activation_function"),
        ({"layer_norm_epsilon": 1e-6}, {"shards": 2}, ConfigError, "layer_norm_epsilon"),
        ({"n_inner": 32}, {"shards": 2}, ConfigError, "n_inner"),
        ({"tie_word_embeddings": True}, {"shards": 2}, ConfigError, "tie_word_embeddings"),
    ],
)
def test_what_the_original_cannot_load_is_refused_before_anything_is_written(
    tmp_path, changes, arguments, error, words
):
    with pytest.raises(error, match=words):
        write_mesh(tmp_path / "out", CONFIG.replace(**changes), tensor, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_fails_midway_leaves_nothing(tmp_path):
    def read(row: TensorSpec) -> np.ndarray:
        values = tensor(row)
        if row.name == "lm_head.bias":
            values[0] = np.inf
        return values

    with pytest.raises(SchemaError, match=r"lm_head\.bias: holds values that are not finite"):
        write_mesh(tmp_path / "out", CONFIG, read, shards=2)
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_checkpoint_is_replaced_as_a_whole_and_nothing_else_is(tmp_path):
    write_mesh(tmp_path / "out", CONFIG, tensor, shards=4, step=3)
    with pytest.raises(WriteError, match="not empty"):
        write_mesh(tmp_path / "out", CONFIG, tensor, shards=2)
    write_mesh(tmp_path / "out", CONFIG, tensor, shards=2, step=5, options=WritingOptions(overwrite=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "meta.json", "step_5", "training_config.json"
    ]  # fmt: skip
    assert open_mesh(tmp_path / "out").shards == 2
    (tmp_path / "out" / "step_5" / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"step_5/notes\.txt"):
        write_mesh(tmp_path / "out", CONFIG, tensor, shards=2, options=WritingOptions(overwrite=True))
    assert (tmp_path / "out" / "step_5" / "notes.txt").read_text() == "mine"
    write_sample(tmp_path / "canonical")
    with pytest.raises(WriteError, match="would be lost"):
        write_mesh(tmp_path / "canonical", CONFIG, tensor, shards=2, options=WritingOptions(overwrite=True))


class FailingFileSystem(FileSystem):
    """Fails the n-th call that changes the disk."""

    def __init__(self, n: int) -> None:
        self.left = n

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, "Input/output error")

    def mkdir(self, path):
        self.count()
        super().mkdir(path)

    def create(self, path):
        self.count()
        return super().create(path)

    def write(self, descriptor, data):
        self.count()
        return super().write(descriptor, data)

    def fsync(self, descriptor):
        self.count()
        super().fsync(descriptor)

    def rename(self, old, new):
        self.count()
        super().rename(old, new)

    def exchange(self, one, other):
        self.count()
        super().exchange(one, other)


def test_S3_whichever_call_fails_the_old_checkpoint_still_stands(tmp_path):
    config = CONFIG.replace(n_layer=1)
    write_mesh(tmp_path / "out", config, tensor, shards=1, dtype="float32")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    n, finished = 1, False
    while not finished:
        fs = FailingFileSystem(n)
        try:
            write_mesh(
                tmp_path / "out",
                config,
                tensor,
                shards=2,
                dtype="float32",
                options=WritingOptions(overwrite=True, fs=fs),
            )
            finished = True
        except WriteError as error:
            assert "Input/output error" in str(error)
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        n = n + 1 if n < 12 else n + 11
    assert n > 100 and open_mesh(tmp_path / "out").shards == 2


@pytest.mark.parametrize("dtype", [np.uint16, BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (128, 512), (129, 513), (3, 2000), (700, 5)])
def test_a_transposed_copy_is_exact_for_any_shape_and_stride(shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    out = np.zeros((shape[1], shape[0] + 3), dtype)
    copy_transposed(out[:, 1:-2], values)
    assert (out[:, 1:-2] == values.T).all() and not out[:, 0].any() and not out[:, -2:].any()
    wide = np.zeros((shape[0], 2 * shape[1]), dtype)
    wide[:, ::2] = values
    copy_transposed(out[:, :-3], wide[:, ::2])
    assert (out[:, :-3] == values.T).all()
