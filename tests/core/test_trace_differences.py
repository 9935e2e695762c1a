"""The first tap that leaves its bound is where the mistake is, and it is said whether it was born there or came in."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
from mutants import MUTANTS, Mutant, revealing_batch
from recorded import facts_of, inputs_of, recorded_taps, small_batch, write_sample

from gptj.config.dtypes import numpy_dtype
from gptj.errors import InputError
from gptj.parity.differences import compare_traces
from gptj.parity.gather import findings_of_comparison
from gptj.parity.reports.output import render
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.trace import open_trace, write_trace

SHAPE_CHANGING = ("heads of another width", "a layer too few")
"""No trace can hold these beside the right config; writing them is refused."""

BORN = {
    "rotary": "q_rotated", "rotary only queries": "k_rotated", "step": "q_rotated", "no scale": "scores",
    "scale of": "scores", "serial residual": "ln_1", "mlp reads": "fc_in", "no residual": "sum",
    "no final norm": "ln_f", "norm": "ln_1", "mask": "visible", "mask too weak": "weights", "masked row": "weights",
    "softmax": "weights", "heads interleaved": "q", "embedding": "embedding", "quick gelu": "activation",
    "epsilon": "ln_1", "exact": "activation", ".ln_1": "ln_1", ".fc_in": "fc_in", ".fc_out": "fc_out",
    ".ln_f": "ln_f", "lm_head": "logits", ".q_proj": "q", ".k_proj": "k", ".v_proj": "v", ".out_proj": "out_proj",
    "k and v": "k", "q and k": "q", "layers": "h.2.ln_1", "fc_out": "fc_out", "ln_1": "ln_1", "ln_f": "ln_f",
}  # fmt: skip
"""The tap that each mistake must be named at, by the longest beginning of its name; of block 0 where it is in one."""

LOOKS_LIKE = {
    "rotary base": "rotary base 1,000", "rotary only queries": "rotary none",
    "step position off by one": "positions off by +1 from token 16 on",
    "step position restarts": "positions off by -16 from token 16 on",
    "mlp reads the stream": "MLP reads the stream", "no final norm": "no norm", "quick gelu": "activation quick gelu",
    "epsilon 1e-6": "epsilon 1e-06", ".ln_1.bias dropped": "offset dropped", ".ln_f.bias dropped": "offset dropped",
    "lm_head.bias dropped": "bias dropped", ".ln_1.weight left at 1": "scale left at 1",
    ".ln_f.weight left at 1": "scale left at 1",
}  # fmt: skip
"""Signatures of mistakes that are called otherwise than the mutant."""

SHORTER = (".fc_in.", ".fc_out.", ".q_proj.weight ", ".k_proj.weight ", ".v_proj.weight ", ".out_proj.weight ",
           "fc_out ", "ln_1 ", "ln_f ")  # fmt: skip
"""What a signature leaves out, since the tap says it."""

NEED_WEIGHTS = frozenset({"ln_1", "ln_f", "q", "k", "v", "out_proj", "fc_in", "fc_out", "logits", "embedding"})


def named_at(mutant: Mutant) -> str:
    beginning = max((key for key in BORN if mutant.name.startswith(key)), key=len)
    tap = BORN[beginning]
    return tap if "." in tap or tap in ("embedding", "ln_f", "logits") else f"h.0.{tap}"


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name not in SHAPE_CHANGING], ids=lambda mutant: mutant.name)
def test_a_mistake_is_named_at_its_operation(tmp_path, mutant):
    config = revealing_config(n_layer=2 if mutant.n_layer == 3 else mutant.n_layer)
    weights, batch, tap = revealing_weights(config), revealing_batch(config), named_at(mutant)
    base = write_sample(tmp_path / "base", config, batch=batch)
    wrong = write_sample(tmp_path / "wrong", config, "float32", batch=batch, mutant=mutant)
    bare = compare_traces([base, wrong])
    assert bare.pairs[0].first is not None and bare.pairs[0].first.tap == tap, bare.pairs[0].headline
    assert "born there" in bare.pairs[0].headline
    inner = tap.rpartition(".")[2]
    assert {origin.verdict for origin in bare.pairs[0].origins} == (
        {"cannot be told"} if inner in NEED_WEIGHTS else {"born there", "came in"}
    )
    told = compare_traces([base, wrong], lambda name, dtype: weights[name].astype(numpy_dtype(dtype)))
    assert told.born["wrong"][0].tap == tap
    assert told.born["base"] == ()
    shorter = next((mutant.name[len(start) :] for start in SHORTER if mutant.name.startswith(start)), mutant.name)
    assert told.pairs[0].looks_like == LOOKS_LIKE.get(mutant.name, shorter)
    assert told.pairs[0].headline.endswith(f"; looks like: {told.pairs[0].looks_like}")
    assert f"born there, {told.born['wrong'][0].difference:.1e} where" in told.pairs[0].headline


@pytest.fixture(scope="module")
def config():
    return revealing_config(n_layer=2, n_positions=512)


def planted(folder, config, change, name="wrong", *, inputs=None, dtype="float32"):
    """A trace of right taps that were changed."""
    batch = small_batch(config)
    taps = {tap: values.copy() for tap, values in recorded_taps(config, batch, dtype).items()}
    change(taps)
    write_trace(folder / name, taps, facts_of(config, dtype), inputs=inputs_of(batch) if inputs is None else inputs)
    return open_trace(folder / name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tap", ["embedding", "h.1.scores", "h.1.sum", "logits", "loss"])
def test_what_is_not_finite_never_passes(tmp_path, config, tap, value):
    def put(taps):
        taps[tap][(-1,) * taps[tap].ndim] = value

    base, wrong = write_sample(tmp_path / "base", config), planted(tmp_path, config, put)
    first = compare_traces([base, wrong]).pairs[0].first
    assert first is not None and first.tap == tap and first.difference == np.inf
    turned = compare_traces([wrong, planted(tmp_path, config, put, "both")])
    assert not turned.passed  # two NaN are no agreement
    json.dumps(turned.as_dict(), allow_nan=False)


def test_an_error_that_came_in_is_not_called_born(tmp_path, config):
    """Everything behind a wrong k_rotated follows from it: only that tap is not what its inputs give."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "rotary only queries")
    base = write_sample(tmp_path / "base", config)
    wrong = write_sample(tmp_path / "wrong", config, "float32", mutant=mutant)
    found = compare_traces([base, wrong])
    assert [tap.tap for tap in found.born["wrong"]] == ["h.0.k_rotated", "h.1.k_rotated"]
    beyond = [tap.tap for tap in found.pairs[0].taps if not tap.holds]
    assert {"h.0.k_rotated", "h.0.scores", "h.0.weights", "h.0.sum", "h.1.ln_1", "logits"} <= {*beyond}


def test_a_trace_without_the_inputs_says_that_it_cannot_be_told(tmp_path, config):
    def turn(taps):
        taps["h.1.q_rotated"] += 1

    base, wrong = (planted(tmp_path, config, change, name, inputs={}) for change, name in ((len, "a"), (turn, "b")))
    found = compare_traces([base, wrong])
    assert found.pairs[0].headline.endswith("Whether it was born there needs position_ids")
    assert found.pairs[0].first.tap == "h.1.q_rotated"


def test_taps_that_one_trace_lacks_are_named(tmp_path, config):
    base = write_sample(tmp_path / "base", config)
    few = planted(tmp_path, config, lambda taps: [taps.pop(tap) for tap in [*taps] if not tap.endswith("sum")])
    found = compare_traces([base, few])
    assert [tap.tap for tap in found.pairs[0].taps] == ["h.0.sum", "h.1.sum"]
    assert {"embedding", "h.0.ln_1", "logits"} <= {*found.left_out}
    assert found.passed and any(
        "base and wrong: not in both, and not compared: embedding" in line for line in found.lines()
    )


def keeping(*ends):
    return lambda taps: [taps.pop(tap) for tap in [*taps] if not tap.endswith(ends)]


def test_a_further_trace_takes_nothing_from_a_pair(tmp_path, config):
    """Each pair is compared by what its two have, and what the base lacks among the others."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "rotary sign")
    base = write_sample(tmp_path / "base", config)
    full = write_sample(tmp_path / "full", config, "float32")
    wrong = write_sample(tmp_path / "wrong", config, "float32", mutant=mutant)
    few = planted(tmp_path, config, keeping("sum"), "few")
    alone, beside = compare_traces([base, wrong]), compare_traces([base, wrong, few, full])
    assert beside.pairs[0] == alone.pairs[0] and beside.pairs[2].taps == compare_traces([base, full]).pairs[0].taps
    assert [tap.tap for tap in beside.pairs[1].taps] == ["h.0.sum", "h.1.sum"]
    assert beside.pairs[0].left_out == () and "h.0.q" in beside.pairs[1].left_out

    exact = planted(tmp_path, config, keeping("ln_f"), "exact", dtype="float64")
    found = compare_traces([exact, full, wrong])
    assert [(pair.base, pair.other) for pair in found.pairs] == [
        ("exact", "full"),
        ("exact", "wrong"),
        ("full", "wrong"),
    ]
    assert [tap.tap for tap in found.pairs[0].taps] == ["ln_f"] and len(found.pairs[2].taps) == 33
    assert found.pairs[2].first.tap == "h.0.q_rotated" and found.pairs[2].looks_like == "rotary sign"
    # What is born in a value that the other lacks is the headline of this pair too.
    assert found.pairs[0].right and found.pairs[1].alone.own.tap == "h.0.q_rotated"
    assert "wrong is wrong in block 0, rotated q, which exact does not hold: born there, " in found.pairs[1].headline


def test_a_trace_that_shares_nothing_is_refused(tmp_path, config):
    traces = [write_sample(tmp_path / "base", config), planted(tmp_path, config, keeping("ln_f"), "a")]
    assert compare_traces(traces).passed
    with pytest.raises(InputError, match=r"^b: no tap in common"):
        compare_traces([traces[1], planted(tmp_path, config, keeping("ln_f"), "c"),
                        planted(tmp_path, config, keeping("loss"), "b")])  # fmt: skip


def test_what_could_not_be_computed_again_is_named_and_told_from_what_was_right(tmp_path, config):
    traces = [write_sample(tmp_path / "base", config), write_sample(tmp_path / "right", config, "float32")]
    bare = compare_traces(traces)
    assert {inner for tap in bare.untold["right"] for inner in [tap.rpartition(".")[2]]} == NEED_WEIGHTS
    assert {*bare.untold["right"].values()} == {"weights"} and json.loads(json.dumps(bare.as_dict()))["untold"]["right"]
    [line] = [line for line in bare.lines() if line.startswith("right: not computed again, for want of weights: ")]
    assert "embedding, h.0.ln_1 to h.1.ln_1, h.0.q to h.1.q" in line
    weights = revealing_weights(config)
    told = compare_traces(traces, lambda name, dtype: weights[name].astype(numpy_dtype(dtype)))
    assert told.untold == {"base": {}, "right": {}} and told.passed
    found = {name: {tap.tap: (tap.born, tap.needs) for tap in findings_of_comparison(one, traces).pairs[0].taps}
             for name, one in (("bare", bare), ("told", told))}  # fmt: skip
    assert {*found["told"].values()} == {(False, None)}
    assert found["bare"]["h.0.q"] == (None, "weights") and found["bare"]["h.0.q_rotated"] == (False, None)
    page = render("html", findings_of_comparison(bare, traces))
    assert "not told: needs weights" in page and "right: not computed again, for want of weights: embedding" in page


def test_several_traces_are_compared_with_the_most_exact(tmp_path, config):
    traces = [write_sample(tmp_path / dtype, config, dtype) for dtype in ("bfloat16", "float64", "float32")]
    found = compare_traces(traces)
    assert [(pair.base, pair.other) for pair in found.pairs] == [("float64", "bfloat16"), ("float64", "float32")]
    assert found.passed
    assert any("dtype differs" in fact for fact in found.facts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 3}, "n_layer"), ({"n_head": 2}, "n_head"), ({"n_inner": 80}, "n_inner"),
        ({"vocab_size": 216 + 8}, "vocab_size"), ({"rotary_dim": 6}, "rotary_dim"),
    ],
)  # fmt: skip
def test_traces_of_other_models_are_not_compared(tmp_path, config, change, named):
    base = write_sample(tmp_path / "base", config)
    other = write_sample(tmp_path / "other", revealing_config(**{"n_layer": 2, "n_positions": 512, **change}))
    with pytest.raises(InputError, match=named):
        compare_traces([base, other])


def test_traces_of_other_inputs_are_not_compared(tmp_path, config):
    base = write_sample(tmp_path / "base", config)
    for options, named in (({"seed": 8}, "input_ids"), ({"rows": 3}, "rows"), ({"length": 8}, "tokens")):
        other = write_sample(tmp_path / "other", config, batch=small_batch(config, **options))
        with pytest.raises(InputError, match=named):
            compare_traces([base, other])
    with pytest.raises(InputError, match="at least two"):
        compare_traces([base])
    with pytest.raises(InputError, match="the same file twice"):
        compare_traces([base, base])


def test_files_of_one_name_go_by_their_paths(tmp_path, config):
    paths = [tmp_path / folder / "t" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
    found = compare_traces([write_sample(path, config) for path in paths])
    assert found.pairs[0].headline.startswith(f"{paths[1]} agrees with {paths[0]}")


def test_other_weights_and_tables_are_said(tmp_path, config):
    batch = small_batch(config)
    taps = recorded_taps(config, batch)
    for name, letter in (("a", "a"), ("b", "b")):
        facts = dataclasses.replace(facts_of(config), weights_sha256=letter * 64, rotary_sha256=letter * 64)
        write_trace(tmp_path / name, taps, facts, inputs=inputs_of(batch))
    found = compare_traces([open_trace(tmp_path / "a"), open_trace(tmp_path / "b")])
    assert [fact.split()[0] for fact in found.facts] == ["a:", "b:", "weights_sha256"]
    assert "rotary table is neither" in found.facts[0]


def test_a_long_text_is_compared_a_slice_at_a_time(tmp_path):
    """A tap of 600 tokens passes in parts, and the place in the last part is the trace's own."""
    config = revealing_config(n_layer=1, n_positions=2056)
    batch = small_batch(config, rows=1, length=600)
    base = write_sample(tmp_path / "base", config, batch=batch)
    taps = recorded_taps(config, batch, "float32")
    taps["h.0.scores"][0, 2, 590, 3] += 1
    write_trace(tmp_path / "wrong", taps, facts_of(config, "float32"), inputs=inputs_of(batch))
    pair = compare_traces([base, open_trace(tmp_path / "wrong")]).pairs[0]
    assert pair.first.where == "row 0, head 2, token 590, key 3"
    assert [origin.own.where for origin in pair.origins if origin.verdict == "born there"] == [pair.first.where]


BIG = """
import resource, sys
from gptj.parity.differences import compare_traces
from gptj.parity.trace import open_trace
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(compare_traces([open_trace(name) for name in sys.argv[1:]]).passed)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_comparison_needs_no_memory_for_whole_taps(tmp_path):
    config = revealing_config(n_layer=1, n_positions=2056, n_embd=512, n_head=32, rotary_dim=8)
    b, t = 1, 1024
    write_trace(
        tmp_path / "a",
        {"h.0.scores": np.zeros((b, 32, t, t), np.float32), "ln_f": np.zeros((b, t, 512), np.float32)},
        facts_of(config, "float32"),
    )
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", BIG, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True
    )
    passed, grown = done.stdout.split()
    assert passed == "True"
    assert int(grown) < (tmp_path / "a").stat().st_size / 2  # of one trace; both are compared


def test_a_weight_is_let_go_when_its_operation_is_done(tmp_path, config):
    """Two weights of 6B's lm_head in float32 are 1.7 GB; a circle of references would hold them until a collection."""
    given = []

    class Weight(np.ndarray):
        pass

    def read(name, dtype):
        weight = revealing_weights(config)[name].astype(dtype).view(Weight)
        if weight.ndim == 2:
            assert not any(earlier() is not None for earlier in given), "an earlier weight is still held"
            given.append(weakref.ref(weight))
        return weight

    gc.disable()
    try:
        traces = [write_sample(tmp_path / dtype, config, dtype) for dtype in ("float64", "float32")]
        assert compare_traces(traces, read).passed and len(given) > 20
    finally:
        gc.enable()


def test_two_traces_are_compared_in_slices(tmp_path, config, monkeypatch):
    """Of each tap some tokens are held, and of two traces together a fifth at most."""
    batch = small_batch(config, rows=2, length=320)
    traces = [write_sample(tmp_path / dtype, config, dtype, batch=batch) for dtype in ("float64", "float32")]
    recorded = sum(trace.file.path.stat().st_size for trace in traces)
    monkeypatch.setattr("gptj.parity.trace._SLICE", 2**14)
    tracemalloc.start()
    try:
        found = compare_traces(traces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.passed and recorded > 20e6
    assert peak < recorded / 5, f"{peak / 1e6:.1f} MB of {recorded / 1e6:.1f}"
