"""The oracle's taps: each is what its equation makes of the taps before it, and every one is there."""

from __future__ import annotations

import numpy as np
import pytest
from mutants import MUTANTS, revealing_batch

from gptj.calls.taps import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK, choose_taps, list_taps, split_tap
from gptj.errors import InputError
from gptj.parity.oracle import Oracle, activation, causal_lm_loss
from gptj.parity.revealing import revealing_config, revealing_weights

SAME_EQUATIONS = 1e-12
"""Of the largest value: two float64 derivations in another order of sums."""

CONFIG = revealing_config()
WEIGHTS = {name: np.asarray(w, np.float64) for name, w in revealing_weights(CONFIG).items()}
BATCH = revealing_batch(CONFIG)
LABELS = np.where(BATCH.attention_mask == 1, BATCH.input_ids, -100)
TAPS = Oracle(CONFIG, WEIGHTS).taps(BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids, labels=LABELS)
CALL = (BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids)
B, T = BATCH.input_ids.shape


def same(name: str, expected: np.ndarray) -> bool:
    got = TAPS[name]
    assert got.shape == expected.shape
    return bool(np.abs(got.astype(float) - expected).max() <= SAME_EQUATIONS * max(1.0, np.abs(expected).max()))


def norm(name: str, x: np.ndarray) -> np.ndarray:
    spread = np.sqrt(x.var(-1, keepdims=True) + CONFIG.layer_norm_epsilon)
    return (x - x.mean(-1, keepdims=True)) / spread * WEIGHTS[f"{name}.weight"] + WEIGHTS[f"{name}.bias"]


def heads(name: str, x: np.ndarray) -> np.ndarray:
    whole = np.einsum("btm,nm->btn", x, WEIGHTS[f"{name}.weight"])
    return whole.reshape(B, T, CONFIG.n_head, CONFIG.head_dim).transpose(0, 2, 1, 3)


def rotated(x: np.ndarray) -> np.ndarray:
    """By complex numbers."""
    width = CONFIG.rotary_width
    angles = BATCH.position_ids[:, None, :, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    turned = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * np.exp(1j * angles)
    pairs = np.stack((turned.real, turned.imag), -1).reshape(*x.shape[:3], width)
    return np.concatenate((pairs, x[..., width:]), -1)


def test_every_name_is_there_in_order_with_the_axes_it_says():
    assert list(TAPS) == list(list_taps(CONFIG.n_layer))
    sizes = {"b": B, "t": T, "s": T, "h": CONFIG.n_head, "d": CONFIG.head_dim, "m": CONFIG.n_embd}
    sizes |= {"f": CONFIG.inner_width, "v": CONFIG.vocab_size, "1": 1}
    axes = {tap.name: tap.axes for tap in (*BEFORE_BLOCKS, *IN_BLOCK, *AFTER_BLOCKS)}
    for name, value in TAPS.items():
        assert value.shape == tuple(sizes[axis] for axis in axes[split_tap(name)[1]]), name
        assert value.dtype == (bool if name.endswith("visible") else np.float64), name


@pytest.mark.parametrize("block", range(CONFIG.n_layer))
def test_each_tap_of_a_block_follows_from_those_before(block):
    tap = {name: TAPS[f"h.{block}.{name}"] for name in (tap.name for tap in IN_BLOCK)}
    weight = f"transformer.h.{block}."
    x = TAPS["embedding"] if block == 0 else TAPS[f"h.{block - 1}.sum"]
    causal = np.arange(T)[:, None] >= np.arange(T)
    shown = np.where(tap["visible"], tap["scores"], -np.inf)
    with np.errstate(invalid="ignore"):  # a row of nothing but -inf, which then is 0
        powers = np.exp(shown - shown.max(-1, keepdims=True))
        softmax = np.nan_to_num(powers / powers.sum(-1, keepdims=True))
    mixed = np.einsum("bhts,bhsd->bthd", tap["weights"], tap["v"]).reshape(B, T, -1)
    fc_in = np.einsum("btm,fm->btf", tap["ln_1"], WEIGHTS[f"{weight}mlp.fc_in.weight"])
    fc_out = np.einsum("btf,mf->btm", tap["activation"], WEIGHTS[f"{weight}mlp.fc_out.weight"])
    expected = {
        "ln_1": norm(f"{weight}ln_1", x),
        "q": heads(f"{weight}attn.q_proj", tap["ln_1"]),
        "k": heads(f"{weight}attn.k_proj", tap["ln_1"]),
        "v": heads(f"{weight}attn.v_proj", tap["ln_1"]),
        "q_rotated": rotated(tap["q"]),
        "k_rotated": rotated(tap["k"]),
        "scores": np.einsum("bhtd,bhsd->bhts", tap["q_rotated"], tap["k_rotated"]) / CONFIG.head_dim**0.5,
        "visible": causal & (BATCH.attention_mask == 1)[:, None, None, :],
        "weights": softmax,
        "mixed": mixed,
        "out_proj": np.einsum("btm,nm->btn", tap["mixed"], WEIGHTS[f"{weight}attn.out_proj.weight"]),
        "fc_in": fc_in + WEIGHTS[f"{weight}mlp.fc_in.bias"],
        "activation": activation(CONFIG.activation_function, tap["fc_in"]),
        "fc_out": fc_out + WEIGHTS[f"{weight}mlp.fc_out.bias"],
        "sum": tap["out_proj"] + tap["fc_out"] + x,
    }
    assert [name for name, value in expected.items() if not same(f"h.{block}.{name}", value)] == []
    assert expected.keys() == tap.keys()


def test_the_taps_outside_of_the_blocks_follow_too():
    assert same("embedding", WEIGHTS["transformer.wte.weight"][BATCH.input_ids])
    assert same("ln_f", norm("transformer.ln_f", TAPS[f"h.{CONFIG.n_layer - 1}.sum"]))
    logits = np.einsum("btm,vm->btv", TAPS["ln_f"], WEIGHTS["lm_head.weight"]) + WEIGHTS["lm_head.bias"]
    assert same("logits", logits)
    assert same("loss", np.asarray(causal_lm_loss(TAPS["logits"], LABELS)))


def test_a_call_that_asks_for_none_is_the_same_to_the_bit_and_keeps_nothing():
    oracle = Oracle(CONFIG, WEIGHTS)
    before = oracle.forward(*CALL).logits
    assert np.array_equal(oracle.taps(*CALL, names="logits")["logits"], before)
    assert oracle._collector is None
    assert np.array_equal(oracle.forward(*CALL).logits, before)


@pytest.mark.parametrize("mutant", ["rotary sign", "no scale"])
def test_a_planted_mistake_is_seen_at_its_own_tap_first(mutant):
    """The taps are what a changed step computes, not what it should."""
    planted = next(m for m in MUTANTS if m.name.replace("_", " ").lower() == mutant)
    taps = planted.plant(CONFIG, WEIGHTS).taps(*CALL, labels=LABELS)
    first = next(name for name in taps if not np.array_equal(taps[name], TAPS[name]))
    assert first == {"rotary sign": "h.0.q_rotated", "no scale": "h.0.scores"}[mutant]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("ln_f", ["ln_f"]),
        (["ln_f", "embedding", "ln_f"], ["embedding", "ln_f"]),
        ("h.1.q*", ["h.1.q", "h.1.q_rotated"]),
        ({"h.*.sum", "logits"}, ["h.0.sum", "h.1.sum", "logits"]),
        ("*rot*d", ["h.0.q_rotated", "h.0.k_rotated", "h.1.q_rotated", "h.1.k_rotated"]),
        ("lo*", ["logits"]),
        ((), []),
    ],
)
def test_names_and_patterns_choose_in_the_order_of_the_computation(names, chosen):
    assert list(choose_taps(names, 2, absent=("loss",))) == chosen


def test_a_pattern_does_not_use_a_letter_twice():
    with pytest.raises(InputError, match="no such tap"):
        choose_taps("ln_f*f", 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h.0.q_rotatd", "Did you mean h.0.q_rotated?"),
        ("h.2.q", "no such tap"),
        ("h.2.*", "no such tap"),
        ("q", "patterns such as"),
        ("", "no such tap"),
        (3, "no such tap"),
        ("loss", "needs labels"),
    ],
)
def test_a_name_that_there_is_none_of_is_refused_with_a_guess(name, said):
    with pytest.raises(InputError, match=r"^names: ") as error:
        choose_taps([name], 2, absent=("loss",))
    assert said in str(error.value)
