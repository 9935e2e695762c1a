"""An adapter's config, rows, start values, files and merging, without a framework; and the oracle's scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
from adapter_samples import KINDS, sample_pairs, write_sample_adapter, write_tensors
from click.testing import CliRunner
from mutants import VISIBLE, logits_of, revealing_batch
from oracle_record import oracle_record

from gptj import GPTJConfig
from gptj.adapters import (
    TARGETS,
    AdapterConfig,
    adapter_rows,
    initial_arrays,
    merge_folder,
    merge_kernel,
    read_adapter,
    write_adapter,
)
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import CheckpointWarning, ConfigError, MissingFileError, SchemaError, WriteError
from gptj.parity.compare import compare_records
from gptj.parity.oracle import Oracle
from gptj.parity.probe import make_probe
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.run import open_oracle

CONFIG = revealing_config()
WEIGHTS = revealing_weights(CONFIG)


def modules(**fields):
    return [row.module for row in adapter_rows(AdapterConfig(**fields), CONFIG)]


# ---- which matrices, and how

NOT_EXCLUDED = ("attn.v_proj", "attn.q_proj", "attn.out_proj", "mlp.fc_out")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [f"h.{n}.attn.{name}" for n in range(3) for name in ("v_proj", "q_proj")]),
        ({"target_modules": "h.1.mlp.fc_in"}, ["h.1.mlp.fc_in"]),
        ({"target_modules": ["transformer.h.2.attn.q_proj"]}, ["h.2.attn.q_proj"]),
        ({"target_modules": ["attn.q_proj"], "layers_to_transform": 1}, ["h.1.attn.q_proj"]),
        # As in PEFT, a whole name counts whatever layers_to_transform says, and the end of one does not.
        (
            {"target_modules": ["transformer.h.0.mlp.fc_out", "k_proj"], "layers_to_transform": [2]},
            ["h.0.mlp.fc_out", "h.2.attn.k_proj"],
        ),
        ({"target_modules": ["h.0.mlp.fc_out", "k_proj"], "layers_to_transform": [2]}, ["h.2.attn.k_proj"]),
        *(
            (
                {"target_modules": ["k_proj"], "layers_to_transform": [0, 2], "layers_pattern": lists},
                ["h.0.attn.k_proj", "h.2.attn.k_proj"],
            )
            for lists in ("h", ["h"], ("layers", "h"), "transformer.h", [r"(h|blocks)"], [], "")
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": r"h\..*"},
            [f"h.{n}.{name}" for n in range(3) for name in TARGETS],
        ),
        (
            {"target_modules": r".*\.0\..*proj", "exclude_modules": r".*[kv]_proj"},
            ["h.0.attn.q_proj", "h.0.attn.out_proj"],
        ),
        (
            {"target_modules": "ALL-LINEAR", "exclude_modules": ["attn.k_proj", "fc_in", "h.1.mlp.fc_out"]},
            [f"h.{n}.{name}" for n in range(3) for name in NOT_EXCLUDED if (n, name) != (1, "mlp.fc_out")],
        ),
    ],
)
def test_targets_are_meant_as_peft_means_them(fields, expected):
    assert modules(**fields) == expected


def test_rank_and_scale_follow_the_patterns():
    adapter = AdapterConfig(
        r=8, lora_alpha=16, target_modules="all-linear", rank_pattern={"fc_in": 2}, alpha_pattern={r"h\.1\.attn\..*": 4}
    )
    rows = {row.module: (row.rank, row.scale) for row in adapter_rows(adapter, CONFIG)}
    assert rows["h.0.attn.q_proj"] == (8, 2) and rows["h.1.attn.q_proj"] == (8, 0.5) and rows["h.1.mlp.fc_in"] == (2, 8)
    assert AdapterConfig(r=16, lora_alpha=8, use_rslora=True).scale(0, "attn.q_proj") == 2


def test_6b_has_the_adapter_that_is_known_of_it():
    rows = adapter_rows(AdapterConfig(r=8), GPTJConfig())
    assert len(rows) == 56 and sum(row.size for row in rows) == 3_670_016  # PEFT: "trainable params: 3,670,016"


def test_start_values_are_the_same_bits_everywhere():
    row = adapter_rows(AdapterConfig(r=4), CONFIG)[0]
    a, b = initial_arrays(row, 0)
    assert a[0, :3].view(np.uint32).tolist() == PINNED
    assert not b.any() and 0.9 / np.sqrt(48) < np.abs(a).max() <= 1 / np.sqrt(48)
    assert not np.array_equal(a, initial_arrays(row, 1)[0])


PINNED = [0x3DE404DB, 0x3DFB73A6, 0x3D9D033C]
"""The bits of the first three values of h.0.attn.v_proj.lora_A.weight under seed 0."""


# ---- files


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind):
    found = read_adapter(write_sample_adapter(tmp_path / "a", kind))
    expected = sample_pairs(AdapterConfig(**KINDS[kind]))
    assert found.config == AdapterConfig(**KINDS[kind])
    assert {row.module for row in found.rows(CONFIG)} == expected.keys()
    for row, a, b in found.arrays(CONFIG):
        scale, *pair = expected[row.module]
        assert row.scale == scale and np.array_equal(a, pair[0]) and np.array_equal(b, pair[1])


def test_patterns_keep_their_order_in_the_file_since_the_first_that_fits_counts(tmp_path):
    patterns = {
        "rank_pattern": {"q_proj": 3, "h.1.attn.q_proj": 1},
        "alpha_pattern": {"v_proj": 5, "h.1.attn.v_proj": 1},
    }
    adapter = AdapterConfig(**patterns)
    rows = adapter_rows(adapter, CONFIG)
    values = {row: (np.ones(row.a.shape, np.float32), np.ones(row.b.shape, np.float32)) for row in rows}
    assert read_adapter(write_adapter(tmp_path / "a", adapter, rows, values.__getitem__)).rows(CONFIG) == rows
    assert rows[2].scale == 5 / 8 and rows[3].rank == 3


def test_adapters_in_folders_of_their_own_are_named(tmp_path):
    write_sample_adapter(tmp_path / "mine")
    with pytest.raises(MissingFileError, match="folders of their own: here 'mine'"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern: 'q_prj'.*Did you mean q_proj"),
        ({"alpha_pattern": {"fc_in": 4}}, "alpha_pattern: 'fc_in'"),
        ({"exclude_modules": ["lm_head", "v_prj"]}, "exclude_modules: 'v_prj'"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "target_modules: 'up_proj'"),
    ],
)
def test_a_name_that_means_nothing_is_said_whichever_field_it_stands_in(tmp_path, fields, words):
    found = read_adapter(write_sample_adapter(tmp_path / "a", "default", change=lambda members: members.update(fields)))
    with pytest.warns(CheckpointWarning, match=f"{words}.*") as caught:
        assert len(found.rows(CONFIG)) == 6
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": r".*q_proj", "layers_to_transform": []}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "layers_pattern"),
        ({"layers_pattern": ["h"], "layers_to_transform": []}, "layers_pattern"),
        ({"layers_pattern": ["h", "("], "layers_to_transform": 1}, "layers_pattern"),
        ({"layers_pattern": ["h", ""], "layers_to_transform": 1}, "layers_pattern"),
    ],
)
def test_fields_that_peft_refuses_together_are_refused(fields, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        AdapterConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"loftq_config": {}, "eva_config": None, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"rank_pattern": None, "alpha_pattern": None},
        {"peft_type": "lora", "auto_mapping": {"base_model_class": "GPTJForCausalLM"}},
        {"modules_to_save": [], "use_dora": False, "layer_replication": None},
    ],
)
def test_fields_that_change_nothing_are_let_be(tmp_path, fields):
    found = read_adapter(write_sample_adapter(tmp_path / "a", "default", change=lambda members: members.update(fields)))
    assert len(found.rows(CONFIG)) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": "q_proj"}, r"Text is a regular expression of whole names: say \['q_proj'\]"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "exclude_modules leaves none of them"),
        ({"layers_to_transform": 1, "layers_pattern": ["layers"]}, "layers_pattern leaves none of them"),
        ({"target_modules": ["gate_proj", "up_proj"]}, "Did you mean out_proj"),
    ],
)
def test_an_adapter_of_nothing_says_why(tmp_path, fields, words):
    found = read_adapter(write_sample_adapter(tmp_path / "a", "default", change=lambda members: members.update(fields)))
    with pytest.raises(ConfigError, match=f"means no matrix of this model.*{words}"):
        found.rows(CONFIG)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.lm_head.base_layer.bias", "lm_head"),
        ("base_model.model.lm_head.lora_A.weight", "lm_head"),
        ("base_model.model.transformer.wte.lora_embedding_A", "wte"),
    ],
)
def test_an_adapter_beside_another_module_is_named_as_that(tmp_path, name, module):
    folder = write_sample_adapter(tmp_path / "a")
    write_tensors(folder / "adapter_model.safetensors", {name: np.zeros((3, 48), np.float32)})
    with pytest.raises(SchemaError, match=f"{name}': an adapter of {module}, which is no matrix of a block. Merge"):
        read_adapter(folder)


def test_names_without_prefixes_are_understood(tmp_path):
    """transformers writes them so where PEFT is not around the model."""
    folder = write_sample_adapter(tmp_path / "a")
    stored = read_adapter(folder)
    pairs = [*stored.arrays(CONFIG)]
    arrays = {spec.name: values for row, *both in pairs for spec, values in zip((row.a, row.b), both, strict=True)}
    write_tensors(folder / "adapter_model.safetensors", arrays)
    assert stored.stored.keys() == read_adapter(folder).stored.keys()
    assert len(read_adapter(folder).rows(CONFIG)) == 18


def test_an_adapter_is_written_whole_or_not_at_all(tmp_path):
    folder = write_sample_adapter(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "README.md").write_text("mine")
    adapter = AdapterConfig(r=2)
    rows = adapter_rows(adapter, CONFIG)

    def broken(row):
        if row is rows[-1]:
            return np.full(row.a.shape, np.nan, np.float32), np.zeros(row.b.shape, np.float32)
        return initial_arrays(row)

    with pytest.raises(WriteError, match="adapter_"):
        write_adapter(folder, adapter, rows, initial_arrays)
    with pytest.raises(SchemaError, match="not finite"):
        write_adapter(folder, adapter, rows, broken, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"} == before
    write_adapter(folder, adapter, rows, initial_arrays, overwrite=True)
    assert (folder / "README.md").read_text() == "mine" and read_adapter(folder).config.r == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_config_is_what_peft_reads(tmp_path):
    members = json.loads((write_sample_adapter(tmp_path / "a", "default") / "adapter_config.json").read_text())
    assert (
        members["peft_type"] == "LORA"
        and members["bias"] == "none"
        and members["target_modules"] == ["q_proj", "v_proj"]
    )
    assert members["r"] == 4 and members["lora_alpha"] == 6 and members["fan_in_fan_out"] is False


def test_a_call_refuses_what_a_file_may_hold():
    for fields, names in (
        ({"target_modles": []}, "Did you mean target_modules"),
        ({"use_dora": True}, "use_dora"),
        ({"rank": 2}, "The fields are .*r, "),
    ):
        with pytest.raises(ConfigError, match=names):
            AdapterConfig.from_fields(fields)


# ---- merging


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", CONFIG, revealing_fill(0))


def test_a_merged_folder_computes_what_base_and_adapter_do(base, tmp_path):
    folder = write_sample_adapter(tmp_path / "a", "patterns")
    (base / "tokenizer_config.json").write_text("{}")
    merged = open_checkpoint(merge_folder(base, folder, tmp_path / "out", max_shard_bytes=50_000))
    batch = revealing_batch(CONFIG)
    together = logits_of(open_oracle(base, adapter=folder), batch)
    assert np.abs(logits_of(Oracle(CONFIG, merged.read), batch) - together).max() < 1e-5
    assert np.abs(logits_of(open_oracle(base), batch) - together).max() > 0.1
    assert len(merged.weight_files) > 1 and (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_each_sum_is_rounded_once(base, tmp_path, dtype):
    folder = write_sample_adapter(tmp_path / "a")
    merged = open_checkpoint(merge_folder(base, folder, tmp_path / "out", dtype=dtype))
    kernel = open_checkpoint(base).read("transformer.h.1.mlp.fc_in.weight").astype(np.float64)
    scale, a, b = sample_pairs(AdapterConfig(**KINDS["all"]))["h.1.mlp.fc_in"]
    expected = kernel + scale * (b.astype(np.float64) @ a.astype(np.float64))
    found = merged.read("transformer.h.1.mlp.fc_in.weight")
    assert np.array_equal(found, expected.astype(found.dtype)) and found.dtype.name == dtype


def test_a_sum_that_does_not_fit_is_refused():
    row = adapter_rows(AdapterConfig(r=1, lora_alpha=1), CONFIG)[0]
    a, b = np.full(row.a.shape, 300, np.float32), np.full(row.b.shape, 300, np.float32)
    with pytest.raises(SchemaError, match="does not fit float16"):
        merge_kernel(np.zeros((48, 48), np.float16), row, a, b)


# ---- the oracle, and mistakes that it finds


class NoScale(Oracle):
    def scaled(self, scale, added):
        return added


class ScaleOfAlpha(Oracle):
    def scaled(self, scale, added):
        return added * 5  # lora_alpha, not lora_alpha / r


class ScaleInverted(Oracle):
    def scaled(self, scale, added):
        return added / scale


PAIRS = sample_pairs(AdapterConfig(**KINDS["all"]))
WRONG_PAIRS = {
    "A and B of another block": {name: PAIRS[name.replace("h.0.", "h.1.")] for name in PAIRS},
    "a matrix forgotten": {name: pair for name, pair in PAIRS.items() if name != "h.2.mlp.fc_out"},
    "q and v swapped": {
        name: PAIRS[name.replace("q_proj", "?").replace("v_proj", "q_proj").replace("?", "v_proj")] for name in PAIRS
    },
    "no adapter": {},
}


@pytest.mark.parametrize(
    "wrong",
    [
        *(mutant(CONFIG, WEIGHTS, adapter=PAIRS) for mutant in (NoScale, ScaleOfAlpha, ScaleInverted)),
        *(Oracle(CONFIG, WEIGHTS, adapter=pairs) for pairs in WRONG_PAIRS.values()),
    ],
    ids=["the scale forgotten", "scaled by alpha", "scaled by r / alpha", *WRONG_PAIRS],
)
def test_parity_finds_each_mistake_with_an_adapter(wrong):
    right, probe = Oracle(CONFIG, WEIGHTS, adapter=PAIRS), make_probe(CONFIG)
    batch = revealing_batch(CONFIG)
    assert np.abs(logits_of(wrong, batch) - logits_of(right, batch)).max() > VISIBLE
    report = compare_records([oracle_record(wrong, probe, dtype="float32")], right)
    assert any("logits" in measure.what for measure in report.failures)


def test_parity_passes_what_is_right_with_an_adapter():
    right, probe = Oracle(CONFIG, WEIGHTS, adapter=PAIRS), make_probe(CONFIG)
    record = oracle_record(Oracle(CONFIG, WEIGHTS, adapter=PAIRS, dtype="float32"), probe)
    assert compare_records([record], right).passed


# ---- from the command line


def run(*words):
    """A command's exit status, what it printed, and its error."""
    done = CliRunner().invoke(gptj_command, [*map(str, words)])
    return done.exit_code, done.stdout, str(done.exception)


def test_inspect_says_what_an_adapter_is(tmp_path):
    folder = write_sample_adapter(tmp_path / "a", "some blocks")
    status, said, _ = run("inspect", folder, "--json")
    facts = json.loads(said)
    assert status == 0 and facts["format"].startswith("LoRA adapter") and facts["r"] == 2 and facts["scale"] == 8
    assert facts["matrices"] == ["fc_out", "q_proj"] and facts["parameters"] == 2 * 2 * (48 + 48 + 136 + 48)
    assert "fc_out, q_proj" in run("inspect", folder)[1]


def test_merge_writes_a_folder_and_refuses_another_bases(base, tmp_path):
    folder = write_sample_adapter(tmp_path / "a")
    status, said, _ = run("adapter", "merge", base, folder, tmp_path / "out", "--dtype", "bfloat16", "--json")
    assert status == 0 and json.loads(said)["adapter"]["r"] == 3
    assert open_checkpoint(tmp_path / "out").read("lm_head.weight").dtype.name == "bfloat16"
    assert run("adapter", "merge", base, folder, tmp_path / "out")[0] == 1  # it holds a model already
    other = write_sample_adapter(tmp_path / "b", config=revealing_config(n_layer=4))
    status, _, error = run("adapter", "merge", base, other, tmp_path / "new")
    assert status == 1 and "unexpected" in error and not (tmp_path / "new").exists()


def test_merge_refuses_a_folder_that_is_no_adapters(base, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, error = run("adapter", "merge", base, tmp_path / "empty", tmp_path / "out")
    assert status == 1 and "adapter_config.json" in error


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(transformer\.)?h\.(\d+)\.attn\.(q|v)_proj",
        r"^(?!.*lm_head).*$",
        r"h\.([0-9]|1[0-9]|2[0-7])\..*_proj",
        r"^(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|k_proj).*?)$|^(?:model\.layers\.[\d]{1,}\.(?:attn|mlp))$",
    ],
)
def test_patterns_that_others_write_are_taken(pattern):
    AdapterConfig(r=4, target_modules=pattern, rank_pattern={pattern: 2})
