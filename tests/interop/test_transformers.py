"""What we write opens unchanged in transformers, with nothing missing or unexpected, and computes the same there.

This runs in an environment of its own: transformers is never a dependency.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gptj_conversion.convert import convert, open_source
from mutants import revealing_batch
from reference import MESH_FIXTURE, mesh_outputs
from wings import FLOAT32_ABSOLUTE

import gptj.pt
from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.config.schema import HEADS
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights

CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG, first_position=0)


def opened(path: Path, name: str = "GPTJForCausalLM"):
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    return model.eval()


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(torch.tensor(ids), **{k: torch.tensor(v) for k, v in options.items()}).logits.float().numpy()


@pytest.mark.parametrize("layout", ["full", "full_slim", "full_slim_f16"])
def test_a_converted_tpu_checkpoint_opens_in_transformers(tmp_path, layout):
    path = convert(
        MESH_FIXTURE / layout / "step_120", tmp_path / "model", config=MESH_FIXTURE / "config.json", dtype="float32"
    )
    tag = {"full": "fp32", "full_slim": "bf16", "full_slim_f16": "f16"}[layout]
    outputs = mesh_outputs()
    got = logits_of(opened(path), outputs["input_ids"].astype(np.int64))
    assert np.abs(got - outputs[f"logits_{tag}"]).max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("dims", [None, 64], ids=["absent", "wider than a head"])
@pytest.mark.parametrize("route", ["convert", "twice", "init", "save_pretrained"])
def test_a_rotary_width_that_is_the_whole_head_opens_in_transformers(tmp_path, dims, route):
    """A head of the fixture is 8 wide and was turned as a whole, so these say the same as its own training config."""
    members = json.loads((MESH_FIXTURE / "config.json").read_text())
    del members["pe_rotary_dims"]
    if dims is not None:
        members["pe_rotary_dims"] = dims
    (tmp_path / "train.json").write_text(json.dumps(members))
    path = convert(MESH_FIXTURE / "full", tmp_path / "model", config=tmp_path / "train.json")
    if route != "convert":  # as earlier releases of ours wrote it
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "rotary_dim": dims}))
        config, source = GPTJConfig.from_file(path), open_source(path)
    if route == "twice":
        (path / "manifest.json").unlink()
        path = convert(path, tmp_path / "again")
    elif route == "init":
        path = write_checkpoint(tmp_path / "again", config, source.read)
    elif route == "save_pretrained":
        gptj.pt.GPTJForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "again")
        path = tmp_path / "again"
    assert json.loads((path / "config.json").read_text())["rotary_dim"] == 8
    outputs = mesh_outputs()
    got = logits_of(opened(path), outputs["input_ids"].astype(np.int64))
    assert np.abs(got - outputs["logits_fp32"]).max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000], ids=["one file", "shards"])
def test_transformers_computes_the_oracles_logits(tmp_path, max_shard_bytes):
    path = write_checkpoint(tmp_path / "model", CONFIG, revealing_fill(0), max_shard_bytes=max_shard_bytes)
    ids, mask, positions = BATCH.input_ids[:2], BATCH.attention_mask[:2], BATCH.position_ids[:2]
    got = logits_of(opened(path), ids, attention_mask=mask, position_ids=positions)
    expected = Oracle(CONFIG, revealing_weights(CONFIG)).forward(ids, mask, positions).logits
    seen = mask.astype(bool)  # a row that sees nothing is not defined there
    assert np.abs(got - expected)[seen].max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize(("head", "name"), HEADS.items())
def test_every_class_opens_in_transformers(tmp_path, head, name):
    # transformers gives qa_outputs num_labels rows, and works only where that is the span's 2.
    config = CONFIG.replace(num_labels=2) if head == "question_answering" else CONFIG
    opened(write_checkpoint(tmp_path / "model", config, revealing_fill(0), head=head), name)


def test_transformers_reads_the_config_as_it_is(tmp_path):
    path = write_checkpoint(tmp_path / "model", CONFIG, revealing_fill(0))
    theirs = transformers.AutoConfig.from_pretrained(path)
    for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner", "num_labels"):
        assert getattr(theirs, field) == getattr(CONFIG, field), field


def test_what_transformers_saves_opens_here(tmp_path):
    from gptj.checkpoint import open_checkpoint, plan_load

    path = write_checkpoint(tmp_path / "model", CONFIG, revealing_fill(0))
    opened(path).save_pretrained(tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    plan = plan_load(checkpoint, checkpoint.config, "causal_lm")
    for name, tensor in plan.tensors.items():
        assert (checkpoint.read(tensor.name) == revealing_weights(CONFIG)[name]).all(), name
