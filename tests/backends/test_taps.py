"""Every wing's intermediate values by name: each is the oracle's, in whole, cached and compiled calls alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from mutants import revealing_batch
from pages import block
from wings import FLOAT32_ABSOLUTE, FLOAT64_RELATIVE, Wing

from gptj.calls.taps import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK, TapCollector, list_taps, split_tap
from gptj.errors import InputError
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
BATCH = dataclasses.asdict(revealing_batch(CONFIG))
LABELS = np.where(BATCH["attention_mask"] == 1, BATCH["input_ids"], -100)
AXES = {tap.name: tap.axes for tap in (*BEFORE_BLOCKS, *IN_BLOCK, *AFTER_BLOCKS)}
LARGEST_LOGIT = 5
"""The size of value that FLOAT32_ABSOLUTE is said for."""


def far_off(wing: Wing, taps: dict[str, Any], expected: dict[str, np.ndarray], dtype: str) -> list[str]:
    """The taps that are not what is expected, within what `dtype` allows for values of this size."""
    found = []
    for name, value in taps.items():
        got, wanted = wing.numpy(value), expected[name]
        assert got.shape == wanted.shape, name
        if wanted.dtype == bool:
            if not np.array_equal(got, wanted):
                found.append(name)
            continue
        largest = np.abs(wanted).max()
        bound = FLOAT64_RELATIVE * largest
        if dtype == "float32":
            bound = FLOAT32_ABSOLUTE * max(1, largest / LARGEST_LOGIT)
        if not np.abs(got - wanted).max() <= bound:
            found.append(f"{name}: {np.abs(got - wanted).max():.1e} of {largest:.1e}")
    return found


@pytest.fixture(scope="module")
def expected(oracle) -> dict[str, np.ndarray]:
    return oracle().taps(**BATCH, labels=LABELS)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_tap_of_a_padded_batch_is_the_oracles(wing, revealing, expected, dtype):
    with wing.no_gradient():
        taps = revealing(dtype=dtype).taps(**BATCH, labels=LABELS)
    assert list(taps) == list(list_taps(CONFIG.n_layer))
    assert far_off(wing, taps, expected, dtype) == []


def test_a_tap_that_is_off_would_be_noticed(wing, revealing, expected):
    with wing.no_gradient():
        taps = revealing(dtype="float64").taps(**BATCH, names="h.1.q_rotated")
    assert far_off(wing, taps, {"h.1.q_rotated": expected["h.1.q_rotated"] * (1 + 1e-8)}, "float64")


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_the_taps_of_a_cached_step_are_those_of_the_whole(wing, revealing, expected, kind):
    model, first, length = revealing(dtype="float64"), 20, BATCH["input_ids"].shape[1]
    past = None if kind == "growing" else model.init_cache(len(LABELS), length + 3)
    before = {name: value[:, :first] for name, value in BATCH.items()}
    past = wing.call(model, **before, past_key_values=past, use_cache=True).past_key_values
    step = {name: value[:, first:] for name, value in BATCH.items()} | {"attention_mask": BATCH["attention_mask"]}
    with wing.no_gradient():
        taps = model.taps(**step, past_key_values=past)
    assert list(taps) == list(list_taps(CONFIG.n_layer))[:-1]
    whole = {}
    for name in taps:
        place = AXES[split_tap(name)[1]].index("t")
        whole[name] = np.take(expected[name], range(first, length), axis=place)
    assert far_off(wing, taps, whole, "float64") == []


def compiled(wing: Wing, model: Any, names: Any) -> dict[str, Any]:
    """The taps of BATCH in one program of the framework's."""
    ids, mask, positions = BATCH.values()
    if wing.name == "pt":
        import torch

        run = torch.compile(model.taps, fullgraph=True, backend="eager")
        tensors = [torch.tensor(x) for x in (ids, mask, positions, LABELS)]
        return run(*tensors[:3], labels=tensors[3], names=names)
    if wing.name == "tf":
        import tensorflow as tf

        run = tf.function(lambda i, m, p, y: model.taps(i, m, p, labels=y, names=names), jit_compile=True)
        return run(*(tf.constant(x) for x in (ids, mask, positions, LABELS)))
    import jax

    run = jax.jit(lambda params, i, m, p, y: model.taps(i, m, p, labels=y, names=names, params=params))
    return run(model.params, ids, mask, positions, LABELS)


@pytest.mark.parametrize("names", [None, ("h.*.q_rotated", "loss")], ids=["all", "some"])
def test_the_taps_of_a_compiled_call_are_the_oracles(wing, revealing, expected, names):
    taps = compiled(wing, revealing(dtype="float64"), names)
    assert set(taps) == (set(expected) if names is None else {f"h.{n}.q_rotated" for n in range(3)} | {"loss"})
    assert far_off(wing, taps, expected, "float64") == []


def test_a_call_beside_them_is_the_same_to_the_bit_and_hands_nothing_over(wing, revealing, monkeypatch):
    model = revealing(dtype="float32")
    before = wing.numpy(wing.call(model, **BATCH).logits)
    with wing.no_gradient():
        alone = wing.numpy(model.taps(**BATCH, names="logits")["logits"])
    assert np.array_equal(alone, before)

    def refuse(self: TapCollector, **values: Any) -> None:
        raise AssertionError("a value was handed over in a plain call")

    monkeypatch.setattr(TapCollector, "__call__", refuse)
    assert np.array_equal(wing.numpy(wing.call(model, **BATCH).logits), before)
    with pytest.raises(AssertionError), wing.no_gradient():
        model.taps(**BATCH, names="h.2.mixed")  # not asked for before, so that nothing of it is compiled yet


def test_names_are_kept_in_order_and_an_unknown_one_is_refused_with_a_guess(wing, revealing):
    model = revealing()
    ids = BATCH["input_ids"]
    with wing.no_gradient():
        assert list(model.taps(ids, names={"ln_f", "h.1.*"})) == [f"h.1.{tap.name}" for tap in IN_BLOCK] + ["ln_f"]
        assert list(model.taps(ids, names="h.*.sum")) == ["h.0.sum", "h.1.sum", "h.2.sum"]
    with pytest.raises(InputError, match=r"Did you mean h\.1\.k_rotated\?"):
        model.taps(ids, names=["ln_f", "h.1.k_rotatd"])
    with pytest.raises(InputError, match="loss needs labels"):
        model.taps(ids, names="loss")
    with pytest.raises(InputError, match=r"h\.7"):
        model.taps(ids, names="h.7.*")


@pytest.mark.parametrize("head", ["base", "sequence_classification", "question_answering"])
def test_a_class_without_next_tokens_gives_the_blocks_taps(wing, revealing, oracle, head):
    model = revealing(head, dtype="float64")
    with wing.no_gradient():
        taps = model.taps(**BATCH)
    assert list(taps) == list(list_taps(CONFIG.n_layer))[:-2]
    bare = oracle(head).taps(**BATCH, names=taps)
    assert far_off(wing, taps, bare, "float64") == []
    with pytest.raises(InputError, match="only GPTJForCausalLM"):
        model.taps(**BATCH, labels=LABELS)
    with pytest.raises(InputError, match="logits"):
        model.taps(**BATCH, names="logits")


def test_arguments_are_checked_as_a_calls_are(wing, revealing):
    model, ids = revealing(), BATCH["input_ids"]
    with pytest.raises(InputError, match="input_ids"):
        model.taps(ids + CONFIG.vocab_size)
    with pytest.raises(InputError, match="attention_mask"):
        model.taps(ids, BATCH["attention_mask"][:, 1:])
    with pytest.raises(InputError, match="labels"):
        model.taps(ids, labels=ids[:, 1:])


def test_16_bit_values_keep_the_dtype_that_they_are_computed_in(wing, revealing):
    with wing.no_gradient():
        taps = revealing(dtype="bfloat16").taps(BATCH["input_ids"], names="h.0.*")
    dtypes = {name: str(wing.module.to_numpy(value).dtype) for name, value in taps.items()}
    assert {name for name, dtype in dtypes.items() if dtype != "bfloat16"} == {"h.0.scores", "h.0.visible"}
    assert dtypes["h.0.scores"] == "float32"


def test_a_prepared_model_refuses_by_name(wing, folder):
    model = wing.model("causal_lm").from_pretrained(folder(), inference=True)
    with pytest.raises(InputError, match=r"taps: the model is prepared for inference"):
        model.taps(BATCH["input_ids"])


def test_a_model_without_parameters_refuses_by_name(wing):
    with pytest.raises(InputError, match=r"taps: the model was made without parameters"):
        wing.model("causal_lm")(CONFIG, _do_init=False).taps(BATCH["input_ids"])


def test_the_example_of_the_page_runs(wing, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "gpt-j-6b").symlink_to(folder(n_layer=4), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(block("parity.md", "Looking inside").replace("gptj.pt", f"gptj.{wing.name}"), {})
    apart = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(apart) == [f"h.{n}.sum" for n in range(4)] and max(map(float, apart.values())) < FLOAT32_ABSOLUTE
