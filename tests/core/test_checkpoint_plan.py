"""A load plan says which stored tensor fills which row, or lists everything that is wrong at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import CONFIG, arrays, write_raw

from gptj.checkpoint import Checkpoint, LoadPlan, Mismatch, open_checkpoint, plan_load
from gptj.config import GPTJConfig
from gptj.config.schema import HEADS, schema
from gptj.errors import CheckpointWarning, ConfigError, SchemaError

Q = "transformer.h.0.attn.q_proj.weight"


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    def make(tensors: dict[str, np.ndarray], config: GPTJConfig = CONFIG) -> Checkpoint:
        return open_checkpoint(write_raw(tmp_path / "x", tensors, config))

    return make


def plan(checkpoint: Checkpoint, head: Any = "causal_lm", config: GPTJConfig = CONFIG, **options: Any) -> LoadPlan:
    return plan_load(checkpoint, config, head, **options)


def refusal(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        plan(checkpoint, *arguments, **options)
    assert caught.value.file == str(checkpoint.directory)
    return str(caught.value)


@pytest.mark.parametrize("head", HEADS)
def test_a_fitting_checkpoint_fills_every_row_in_schema_order(stored: Any, head: Any) -> None:
    found = plan(stored(arrays(head=head)), head)
    assert list(found.tensors) == [row.name for row in schema(CONFIG, head)]
    assert (found.missing, found.unexpected, found.mismatched, found.dropped) == ((), (), (), ())


def test_a_base_directory_fills_a_class_with_a_head(stored: Any) -> None:
    found = plan(stored(arrays(head="base")))
    assert found.tensors[Q].name == Q.removeprefix("transformer.")
    assert found.missing == ("lm_head.weight", "lm_head.bias")


def test_a_directory_with_a_head_fills_the_base_class(stored: Any) -> None:
    found = plan(stored(arrays()), "base")
    assert found.tensors[Q.removeprefix("transformer.")].name == Q
    assert found.unexpected == ("lm_head.weight", "lm_head.bias")


def test_another_head_is_left_alone_and_ones_own_is_missing(stored: Any) -> None:
    found = plan(stored(arrays()), "sequence_classification")
    assert (found.missing, found.unexpected) == (("score.weight",), ("lm_head.weight", "lm_head.bias"))


def test_half_a_head_is_refused(stored: Any) -> None:
    tensors = arrays()
    del tensors["lm_head.weight"]
    assert "1 missing: lm_head.weight" in refusal(stored(tensors))


def test_a_missing_lm_head_bias_is_zeros_and_is_said(stored: Any) -> None:
    tensors = arrays()
    del tensors["lm_head.bias"]
    checkpoint = stored(tensors)
    with pytest.warns(CheckpointWarning, match=r"lm_head\.bias: is missing; zeros"):
        plan = plan_load(checkpoint, checkpoint.config, "causal_lm")
    assert (plan.zeros, plan.missing) == (("lm_head.bias",), ())


def test_W10_old_buffers_are_dropped(stored: Any) -> None:
    buffers = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool),
        "transformer.h.1.attn.masked_bias": np.float32(-1e9).reshape(()),
    }
    assert plan(stored(arrays() | buffers)).dropped == tuple(buffers)


def test_W10_one_missing_tensor_is_named(stored: Any) -> None:
    tensors = arrays()
    del tensors[Q]
    assert f"1 missing: {Q}" in refusal(stored(tensors))


def test_a_missing_row_is_refused_although_the_head_is_missing_too(stored: Any) -> None:
    tensors = arrays(head="base")
    del tensors["wte.weight"]
    text = refusal(stored(tensors))
    assert "3 missing: transformer.wte.weight, lm_head.weight, lm_head.bias" in text


def test_W10_a_missing_layer_is_listed_and_the_config_field_is_named(stored: Any) -> None:
    tensors = {name: array for name, array in arrays().items() if ".h.1." not in name}
    text = refusal(stored(tensors))
    assert "10 missing" in text
    assert "The config says n_layer = 2, the file 1" in text


def test_W10_a_layer_too_many_is_unexpected(stored: Any) -> None:
    text = refusal(stored(arrays(CONFIG.replace(n_layer=3))))
    assert "10 unexpected" in text
    assert "n_layer = 2, the file 3" in text


def test_W10_a_misspelt_name_is_listed_with_the_one_that_was_meant(stored: Any) -> None:
    tensors = arrays()
    tensors["transformer.h.0.attn.q_prj.weight"] = tensors.pop(Q)
    text = refusal(stored(tensors))
    assert f"'transformer.h.0.attn.q_prj.weight' (did you mean {Q}?)" in text


def test_W10_a_long_list_shows_ten_and_the_count(stored: Any) -> None:
    text = refusal(stored({f"x{name}": array for name, array in arrays().items()}))
    assert "25 missing" in text
    assert "25 unexpected" in text
    assert text.count("and 15 more") == 2


def test_W8_shapes_are_named_and_a_transposed_matrix_is_recognised(stored: Any) -> None:
    tensors = arrays()
    name = "transformer.h.0.mlp.fc_in.weight"
    tensors[name] = tensors[name].T.copy()
    tensors["lm_head.bias"] = np.zeros(12, np.float32)
    text = refusal(stored(tensors))
    assert f"{name} expected (20, 12), found (12, 20) (looks transposed: from a Flax/TF layout?)" in text
    assert "lm_head.bias expected (11,), found (12,)" in text


def test_C6_the_config_fields_that_the_shapes_contradict_are_named(stored: Any) -> None:
    text = refusal(stored(arrays(CONFIG.replace(vocab_size=13, n_inner=16))))
    assert "vocab_size = 11, the file 13" in text
    assert "n_inner = 20, the file 16" in text


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_W7_a_dtype_that_no_weight_has_is_refused(stored: Any, dtype: str) -> None:
    tensors = arrays()
    tensors[Q] = tensors[Q].astype(dtype)
    assert f"{Q} is {dtype}" in refusal(stored(tensors))


def test_W10_everything_wrong_is_in_one_message(stored: Any) -> None:
    tensors = arrays()
    del tensors["transformer.ln_f.bias"]
    tensors["ghost"] = np.zeros(1, np.float32)
    tensors["lm_head.bias"] = np.zeros(3, np.int64)
    text = refusal(stored(tensors))
    for word in ("1 missing", "1 unexpected", "1 misshapen", "1 of a dtype other than"):
        assert word in text


def test_a_row_under_both_spellings_is_refused(stored: Any) -> None:
    tensors = arrays()
    tensors["wte.weight"] = tensors["transformer.wte.weight"]
    assert "there twice: transformer.wte.weight and wte.weight" in refusal(stored(tensors))


def test_misshapen_rows_are_set_aside_when_that_is_asked_for(stored: Any) -> None:
    found = plan(stored(arrays()), config=CONFIG.replace(vocab_size=13), ignore_mismatched_sizes=True)
    assert Mismatch("lm_head.bias", (11,), (13,)) in found.mismatched
    assert {m.name for m in found.mismatched} == {"transformer.wte.weight", "lm_head.weight", "lm_head.bias"}
    assert not {m.name for m in found.mismatched} & set(found.tensors)


def test_ignoring_sizes_ignores_nothing_else(stored: Any) -> None:
    tensors = arrays()
    del tensors[Q]
    assert "1 missing" in refusal(stored(tensors), config=CONFIG.replace(vocab_size=13), ignore_mismatched_sizes=True)


# ---- tied embeddings

TIED = CONFIG.replace(tie_word_embeddings=True)


def test_a_tied_model_needs_no_lm_head_weight(stored: Any) -> None:
    found = plan(stored(arrays(TIED), TIED), config=TIED)
    assert "lm_head.weight" not in found.tensors
    assert "lm_head.bias" in found.tensors


def test_a_tied_models_equal_lm_head_weight_is_dropped(stored: Any) -> None:
    tensors = arrays(TIED)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    assert plan(stored(tensors, TIED), config=TIED).dropped == ("lm_head.weight",)


@pytest.mark.parametrize("change", ["value", "dtype", "shape"])
def test_C3_a_tied_models_other_lm_head_weight_is_refused(stored: Any, change: str) -> None:
    tensors = arrays(TIED)
    other = tensors["transformer.wte.weight"].copy()
    other[-1, -1] += 1e-6
    changed = {"value": other, "dtype": other.astype(np.float64), "shape": other[:-1]}
    tensors["lm_head.weight"] = changed[change]
    with pytest.raises(SchemaError, match=r"lm_head\.weight: differs from the token embedding"):
        plan(stored(tensors, TIED), config=TIED)


def test_a_file_without_lm_head_weight_does_not_fit_an_untied_config(stored: Any) -> None:
    assert "1 missing: lm_head.weight" in refusal(stored(arrays(TIED)))


# ---- absurd configs


def test_C1_an_absurd_number_of_layers_is_refused_before_the_schema_is_built(stored: Any) -> None:
    with pytest.raises(ConfigError, match="n_layer"):
        plan(stored(arrays()), config=CONFIG.replace(n_layer=10**9))


def test_C1_absurd_sizes_are_refused_by_the_shapes_without_being_allocated(stored: Any) -> None:
    absurd = CONFIG.replace(vocab_size=2**31 - 1, n_embd=3 * 2**29, n_inner=2**31 - 1)
    assert "misshapen" in refusal(stored(arrays()), config=absurd)
