"""gptj convert and verify: the flags of proof, plan and permission."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from forked import gptj

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.reading.manifest import Manifest

CONFIG = revealing_config(n_layer=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", CONFIG, revealing_fill(0))


def test_a_dry_run_prints_the_plan_and_touches_nothing(source, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = gptj("convert", source, tmp_path / "out", "--dry-run", "--dtype", "bfloat16")
    assert done.returncode == 0 and "model.safetensors  15 tensors" in done.stdout and "bfloat16" in done.stdout
    plan = json.loads(gptj("convert", source, tmp_path / "out", "--dry-run", "--json").stdout)
    assert plan["fits"] and plan["to"] == "safetensors" and plan["source"]["format"] == "safetensors"
    assert plan["files"] == [{"name": "model.safetensors", "tensors": 15, "nbytes": plan["nbytes"]}]
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_looks_at_the_hashes_and_when_asked_at_the_fingerprint(source, tmp_path):
    assert gptj("convert", source, tmp_path / "out", "--verify").returncode == 0
    done = gptj("verify", tmp_path / "out", "--fingerprint", "--json")
    facts = json.loads(done.stdout)
    assert facts["fingerprint"] and facts["tensors"] == 15 and len(facts["sha256"]) == 64
    assert "the reference computes the same" in gptj("verify", tmp_path / "out", "--fingerprint").stdout


def test_no_fingerprint_is_taken_where_none_is_wanted(source, tmp_path):
    gptj("convert", source, tmp_path / "out", "--no-fingerprint")
    assert Manifest.from_file(tmp_path / "out" / "manifest.json").fingerprint is None
    done = gptj("verify", tmp_path / "out", "--fingerprint")
    assert done.returncode == 1 and "no fingerprint" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("value", "flag"), [(1e30, "--allow-overflow"), (np.nan, "--allow-nonfinite")])
def test_W11_what_is_not_finite_passes_only_when_it_is_allowed(tmp_path, value, flag):
    fill = revealing_fill(0)

    def read(row):
        values = fill(row).copy()
        if row.name == "lm_head.bias":
            values[0] = value
        return values

    source = write_checkpoint(tmp_path / "source", CONFIG, read, allow_nonfinite=True)
    done = gptj("convert", source, tmp_path / "out", "--dtype", "float16")
    assert done.returncode == 1 and "lm_head.bias" in done.stderr and not (tmp_path / "out").exists()
    assert gptj("convert", source, tmp_path / "out", "--dtype", "float16", flag).returncode == 0


def test_X2_a_link_out_of_the_source_is_followed_only_when_that_is_said(source, tmp_path):
    weights = source / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    done = gptj("convert", source, tmp_path / "out")
    assert done.returncode == 1 and "UnsafeFileError" in done.stderr
    assert gptj("convert", source, tmp_path / "out", "--follow-links").returncode == 0


def test_W13_several_weight_sets_are_told_apart_by_name(source, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"PK\3\4")
    done = gptj("convert", source, tmp_path / "out")
    assert done.returncode == 1 and "pytorch_model.bin" in done.stderr
    chosen = ("--source-format", "safetensors", "--weights", "model.safetensors")
    assert gptj("convert", source, tmp_path / "out", *chosen).returncode == 0
    assert len(open_checkpoint(tmp_path / "out").tensors) == 15


def test_an_unknown_source_format_lists_those_that_there_are(source, tmp_path):
    done = gptj("convert", source, tmp_path / "out", "--source-format", "pickle")
    assert done.returncode == 2 and "safetensors, mesh" in done.stderr
