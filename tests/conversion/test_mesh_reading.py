"""mesh-transformer-jax checkpoints are read exactly: against the original's own files, and at random sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gptj_conversion.common import dialects
from gptj_conversion.convert import convert, describe
from gptj_conversion.mesh.leaves import pieces
from gptj_conversion.mesh.reader import open_mesh
from gptj_conversion.mesh.training_config import TrainingConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mesh_samples import BFLOAT16, same_bits, write_mesh_sample
from watching import count_reads

from gptj.checkpoint import open_checkpoint
from gptj.config.schema import schema, schema_by_name
from gptj.errors import GPTJError, InputError, SchemaError
from gptj.reading import npz
from gptj.reading.manifest import Manifest
from gptj.sharding import Mesh, partition_of, slices

DATA = Path(__file__).parent.parent / "data"
MP2 = DATA / "mesh_mp2"
TRAINING = MP2 / "config.json"

# Original leaves, decoded and summed in float32, against the fp32 reference: only the rounding to 16 bits remains.
# Half a unit in the last place of a value below 2 is 2**-8 in bfloat16 and 2**-11 in float16; wte and the summed
# biases are two such values.
ROUNDING = {"full_slim": 2 * 2.0**-8, "full_slim_f16": 2 * 2.0**-11}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(MP2 / "hf_state_dict_fp32.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_the_full_checkpoint_is_bit_identical_to_the_originals_own_conversion(reference, tmp_path):
    convert(MP2 / "full", tmp_path / "out", config=TRAINING)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.tensors.keys() == reference.keys()
    assert [name for name in reference if not same_bits(checkpoint.read(name), reference[name])] == []


@pytest.mark.parametrize("name", ["full_slim", "full_slim_f16"])
def test_a_slim_checkpoint_differs_from_the_full_one_by_its_rounding_alone(name, reference, tmp_path):
    convert(MP2 / name, tmp_path / "out", config=TRAINING, dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "out")
    worst = {key: np.abs(checkpoint.read(key) - values).max() for key, values in reference.items()}
    assert 0 < max(worst.values()) <= ROUNDING[name]


def test_biases_are_summed_in_float32_after_decoding(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", shards=8, heads=8, dtype=BFLOAT16)
    copies = []
    for shard in range(8):
        arrays = []
        for n in range(16):
            with np.load(sample.step_directory / f"shard_{shard}" / f"{n}.npz") as file:
                arrays += [file[key].view(BFLOAT16) for key in file.files if file[key].dtype.kind == "V"]
        copies.append(arrays[2 + 10 + 6])  # embedding b and w, layer 0's ten, then layer 1's seventh: linear_5/b
    found = open_mesh(sample.path).read("transformer.h.1.mlp.fc_out.bias", "float32")
    np.testing.assert_allclose(found, np.sum([copy.astype(np.float32) for copy in copies], axis=0), rtol=1e-6)
    in_sixteen_bits = copies[0]
    for copy in copies[1:]:
        in_sixteen_bits = in_sixteen_bits + copy
    assert np.abs(found - in_sixteen_bits.astype(np.float32)).max() > 1e-3


def test_the_config_is_the_one_that_the_original_converter_writes(tmp_path):
    convert(MP2 / "full", tmp_path / "out", config=TRAINING)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((MP2 / "hf_config.json").read_text())
    meaningful = (
        "activation_function architectures attn_pdrop bos_token_id embd_pdrop eos_token_id initializer_range "
        "layer_norm_epsilon model_type n_embd n_head n_layer n_positions rotary_dim tokenizer_class torch_dtype "
        "use_cache vocab_size"
    )
    for key in meaningful.split():
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("layout", ["full", "slim"])
def test_the_table_names_the_leaves_in_the_originals_order(layout):
    leaves = json.loads((MP2 / f"leaves_{layout}.json").read_text())
    parameters = [leaf for leaf in leaves if leaf["path"].startswith("/params/")]
    ours = dialects.mesh_leaves(3)
    assert ["/params/" + leaf.path for leaf in ours] == [leaf["path"] for leaf in parameters]
    sizes = {"vocab": 160, "embed": 32, "heads": 32, "mlp": 128, "norm": 32}
    assert [list(leaf.shape(sizes, 2)) for leaf in ours] == [leaf["shape_per_shard"] for leaf in parameters]
    files = [f"{n}.npz" for n, count in enumerate(pieces(len(leaves))) for _ in range(count)]
    assert files == [leaf["file"] for leaf in leaves]


def test_the_table_and_the_schema_have_the_same_rows_and_axes():
    config = open_mesh(MP2 / "full", config=TRAINING).config.replace(n_layer=1)
    heads = ("causal_lm", "sequence_classification", "question_answering")
    rows = {name: row for head in heads for name, row in schema_by_name(config, head).items()}
    named = {dialects.canonical_name(row.tensor, 0): row for row in dialects.ROWS}
    assert rows.keys() == named.keys()
    assert all(rows[name].axes == row.axes for name, row in named.items())


def test_layers_are_ordered_as_strings_so_that_layer_10_comes_before_layer_2(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", layers=12, heads=2, head_dim=2)
    source = open_mesh(sample.path, config=sample.config_file)
    for layer in (1, 2, 10, 11):
        name = f"transformer.h.{layer}.mlp.fc_in.weight"
        assert same_bits(source.read(name), sample.tensors[name])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    layers=st.integers(1, 13),
    heads_per_shard=st.integers(1, 3),
    head_dim=st.integers(1, 5).map(lambda n: 2 * n),
    vocab_per_shard=st.integers(1, 9),
    shards=st.sampled_from([1, 2, 3, 4, 8]),
    dtype=st.sampled_from([np.float32, BFLOAT16, np.float16, np.float64, ">f4"]),
    layout=st.sampled_from(["slim", "full"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes_shards_dtype_and_layout_are_read_exactly(
    tmp_path_factory, layers, heads_per_shard, head_dim, vocab_per_shard, shards, dtype, layout, seed
):
    sample = write_mesh_sample(
        tmp_path_factory.mktemp("mesh") / "model",
        layers=layers,
        heads=heads_per_shard * shards,
        head_dim=head_dim,
        vocab_per_shard=vocab_per_shard,
        shards=shards,
        dtype=dtype,
        layout=layout,
        seed=seed,
    )
    source = open_mesh(sample.path, config=sample.config_file)
    assert source.shards == shards and source.layers == layers and source.layout == layout
    for row in schema(source.config):
        expected = sample.tensors[row.name]
        assert same_bits(source.read(row), expected.astype(expected.dtype.newbyteorder("=")))


def test_the_newest_step_is_the_one_that_meta_json_names(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", meta=True)
    shutil.copytree(sample.step_directory, sample.path / "step_9")
    assert open_mesh(sample.path).path == sample.step_directory


def test_without_meta_json_the_newest_step_is_the_highest_complete_one(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    shutil.copytree(sample.step_directory, sample.path / "step_10")
    shutil.copytree(sample.step_directory, sample.path / "step_11")
    (sample.path / "step_11" / "shard_1" / "3.npz").unlink()
    assert open_mesh(sample.path).path == sample.path / "step_10"


def test_describe_says_what_the_files_show_without_a_training_config():
    facts = describe(MP2 / "full_slim").as_dict()
    assert facts["format"] == "mesh-transformer-jax v1, slim"
    assert (facts["layers"], facts["width"], facts["vocab"], facts["shards"]) == (3, 32, 160, 2)
    assert (facts["dtype"], facts["tensors"], facts["parameters"], facts["step"]) == ("bfloat16", 35, 48000, 120)
    assert facts["heads"] is None and "training config" in facts["problems"][0]


def test_describe_says_what_a_converted_directory_is(tmp_path):
    convert(MP2 / "full", tmp_path / "out", config=TRAINING)
    facts = describe(tmp_path / "out")
    assert (facts.format, facts.layers, facts.heads, facts.rotary_width, facts.positions) == (
        "safetensors",
        3,
        4,
        8,
        64,
    )
    assert facts.problems == ()


def test_describe_notes_copies_of_a_bias_that_differ_between_shards(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    assert any("linear_5/b differ between shards" in problem for problem in describe(sample.path).problems)
    assert not any("differ" in problem for problem in describe(MP2 / "full").problems)


def test_the_manifest_says_how_each_tensor_was_made(tmp_path):
    convert(MP2 / "full", tmp_path / "out", config=TRAINING)
    manifest = Manifest.from_file(tmp_path / "out" / "manifest.json")
    assert manifest.provenance["format"] == "mesh-transformer-jax v1, full"
    norm = manifest.tensors["transformer.h.0.ln_1.bias"].origin
    assert norm.rule.startswith("the copy of shard 0") and norm.files[0].startswith("shard_0/")
    embedding = manifest.tensors["transformer.wte.weight"].origin
    assert "sum of 2 copies in float32, added to every row" in embedding.rule
    assert {file.split("/")[0] for file in embedding.files} == {"shard_0", "shard_1"}


def test_a_tensor_that_no_model_has_is_refused_by_name():
    with pytest.raises(SchemaError, match=r"transformer\.h\.3\.ln_1\.bias"):
        open_mesh(MP2 / "full").read("transformer.h.3.ln_1.bias")


def test_a_canonical_directory_converts_to_another_dtype(tmp_path, reference):
    convert(MP2 / "full", tmp_path / "one", config=TRAINING)
    convert(tmp_path / "one", tmp_path / "two", dtype="bfloat16")
    checkpoint = open_checkpoint(tmp_path / "two")
    for name, values in reference.items():
        assert same_bits(checkpoint.read(name), values.astype(BFLOAT16))


def test_a_destination_inside_the_source_is_refused_and_nothing_is_written(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    before = sorted(sample.path.rglob("*"))
    with pytest.raises(GPTJError, match="lies in what is being converted"):
        convert(sample.path, sample.path / "out", config=sample.config_file)
    assert sorted(sample.path.rglob("*")) == before


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_reads_its_own_shards_and_what_all_hold(tmp_path, processes, dtype):
    sample = write_mesh_sample(tmp_path / "run", shards=4, heads=4, dtype=dtype)
    source = open_mesh(sample.path, config=sample.config_file)
    mesh, rows = Mesh(tp=processes), schema(source.config)
    width = np.dtype(dtype).itemsize
    cut = [row for row in rows if any(partition_of(row, "tp"))]
    copies = sum(row.size * (4 if row.name.endswith("fc_out.bias") else 1) for row in rows if row not in cut)
    most = width * (sum(row.size for row in cut) // processes + copies + 4 * source.config.n_embd)  # wte's summed bias
    for rank in range(processes):
        with count_reads(npz) as read:
            parts = {row.name: source.read_part(row, slices(row, "tp", mesh, {"tp": rank})) for row in rows}
        for row in rows:
            expected = source.read(row)[slices(row, "tp", mesh, {"tp": rank})]
            assert parts[row.name].dtype == expected.dtype and np.array_equal(parts[row.name], expected), row.name
        assert sum(read) == most


@pytest.mark.parametrize("strategy,mesh", [("tp", Mesh(tp=4)), ("fsdp", Mesh(dp=2)), ("tp_fsdp", Mesh(dp=2, tp=2))])
def test_parts_that_are_no_whole_shards_are_refused_by_name(tmp_path, strategy, mesh):
    sample = write_mesh_sample(tmp_path / "run", shards=2, heads=4, vocab_per_shard=8)
    source = open_mesh(sample.path, config=sample.config_file)
    row = schema_by_name(source.config)["transformer.h.0.attn.q_proj.weight"]
    refused = pytest.raises(InputError, match="no whole number of the checkpoint's shards")
    with count_reads(npz) as read, refused as caught:
        source.read_part(row, slices(row, strategy, mesh, mesh.coordinates(1)))
    assert caught.value.where == row.name and "gptj convert" in str(caught.value) and not read


def test_a_padded_vocabulary_is_read_whole_or_refused(tmp_path):
    sample = write_mesh_sample(tmp_path / "run", shards=2, vocab_per_shard=6)
    padded = {**sample.training_config, "n_vocab": 8, "n_vocab_padding": 4}
    source = open_mesh(sample.path, config=TrainingConfig.from_dict(padded))
    row = schema_by_name(source.config)["transformer.wte.weight"]
    assert np.array_equal(source.read_part(row, (slice(0, 8), slice(0, row.shape[1]))), source.read(row))
    with pytest.raises(InputError, match="shards"):
        source.read_part(row, slices(row, "tp", Mesh(tp=2), {"tp": 1}))
