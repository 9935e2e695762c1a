"""The speed benchmark's own arithmetic: what is counted, how figures are kept, compared and shown."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from benchmarks.speed import measures, report
from benchmarks.speed.contenders import contenders
from benchmarks.speed.contest import Contest, DroppedOutError, Rules, Worker
from benchmarks.speed.folders import lively_tensor
from benchmarks.speed.machine import Others
from benchmarks.speed.picture import apart, draw
from benchmarks.speed.results import Results
from benchmarks.speed.shapes import SHAPES
from gptj.config.schema import schema
from gptj.parity.oracle import Oracle

ROOT = Path(__file__).parents[2]
LIMITS = {"read": 42e9, "float32": 190e9, "bfloat16": 800e9, "int8": 1600e9}


def recorded():
    """Two contenders at S, measured in one run: ours takes 10 ms a token, the peer 20."""
    results = Results("first")
    for name, took_s in (("gptj-pt", 0.010), ("transformers-pt", 0.020)):
        results.introduce("S", name, {"torch": "2.13.0"}, [3, 1, 4, 1])
        results.record("S", name, "decode1", {"decode1_s": [took_s, 9.0, took_s / 2]}, LIMITS, steps=32)
    return results


def shown(results):
    console = Console(width=240, record=True)
    for table in report.tables(results):
        console.print(table)
    return console.export_text()


def test_a_token_reads_every_weight_but_the_embeddings():
    """M is the model of the published figures; L is GPT-J-6B, of 6,050,882,784 numbers."""
    assert round(SHAPES["M"].weights_read / 1e6, 1) == 530.6
    assert SHAPES["L"].stored_bytes("bfloat16") == 2 * 6_050_882_784
    assert SHAPES["L"].weights_read == 6_050_882_784 - 50_400 * 4_096


def test_operations_are_those_of_a_model_small_enough_to_count():
    """Width 32, 2 layers, inner 128, vocabulary 512: q, k, v, out are 4 x 1,024 weights a layer, the mlp 2 x 4,096."""
    tokens, kernels = 3, 2 * (4 * 1024 + 2 * 4096)
    pairs = 1 + 2 + 3
    blocks = 2 * kernels * tokens + 2 * pairs * (2 * 32 + 2 * 32)  # q.k and weights.v, each 32 multiply-adds
    head = 2 * 512 * 32
    assert SHAPES["tiny"].prefill_operations(tokens) == blocks + head
    assert SHAPES["tiny"].training_operations(2, tokens) == 3 * 2 * (blocks + head * tokens)


@pytest.mark.parametrize(("figure", "dtype"), [("decode1_s", "int8"), ("prefill_s", "bfloat16")])
def test_who_takes_the_least_possible_time_has_the_whole_limit(figure, dtype):
    shape = SHAPES["M"]
    least_s = {
        "decode1_s": shape.weights_read / LIMITS["read"],
        "prefill_s": shape.prefill_operations(512) / LIMITS[dtype],
    }[figure]
    assert measures.share_of_limit(figure, least_s, shape, dtype, LIMITS) == pytest.approx(1.0)
    assert measures.share_of_limit(figure, 4 * least_s, shape, dtype, LIMITS) == pytest.approx(0.25)
    assert measures.share_of_limit("prefill_s", 1.0, shape, "int4", LIMITS) is None


def test_a_decoded_token_is_the_difference_of_two_calls():
    """A prompt that takes 5 s and steps of 0.25 s: the prompt is in both calls and cancels."""

    def ask(what, ids, new):
        return {"seconds": 5.0 + 0.25 * new}

    assert measures.repeat("decode8", ask, SHAPES["tiny"], {"rows": 8, "steps": 16}) == {"decode8_s": 0.25}


def test_drawn_steps_are_measured_beside_the_greedy_one_in_one_turn():
    steps = {"greedy": 0.1, "nucleus": 0.12, "penalised": 0.11}

    def ask(what, ids, new, choice):
        assert len(ids) == 32
        return {"seconds": 5.0 + steps[choice] * new}

    found = measures.repeat("drawn32", ask, SHAPES["tiny"], {"rows": 32, "steps": 16})
    assert found == {f"drawn32_{choice}_s": pytest.approx(step) for choice, step in steps.items()}
    results = recorded()
    results.record("S", "gptj-pt", "drawn32", {figure: [step] for figure, step in found.items()}, LIMITS)
    (row,) = zip(*(column.cells for column in report.drawn_table(results, SHAPES["S"]).columns), strict=True)
    assert row == ("gptj-pt", "", "", "100.0; 1.20 1.10")


def test_a_slow_contender_decodes_fewer_tokens():
    known = [
        measures.prepare(
            "decode1", lambda what, ids, new, s=s: {"seconds": s * new}, SHAPES["tiny"], most_steps=32, target_s=3.0
        )["steps"]
        for s in (0.01, 0.2, 60.0)
    ]
    assert known == [32, 8, 4]


def test_a_figure_is_the_median_of_its_repeats_and_a_ratio_that_of_medians():
    results = recorded()
    assert results.median("S", "gptj-pt", "decode1_s") == 0.010
    assert results.ratio("S", "gptj-pt", "transformers-pt", ("decode1_s",)) == (2.0, True)
    assert results.ratio("S", "gptj-pt", "transformers-pt", ("train_s",)) is None


def test_a_file_is_added_to_and_ratios_across_runs_are_marked(tmp_path):
    path = tmp_path / "speed.json"
    recorded().write(path)
    later = Results.opened(path, "second")
    later.fail("S", "gptj-pt", "train", "out of memory")
    later.record("S", "gptj-pt", "decode1", {"decode1_s": [0.005]}, LIMITS)
    later.write(path)
    again = Results.opened(path, "third")
    assert again.ratio("S", "gptj-pt", "transformers-pt", ("decode1_s",)) == (4.0, False)
    assert "~4.00" in shown(again) and "out of memory" in shown(again)
    again.record("S", "gptj-pt", "train", {"train_s": [1.0]}, LIMITS)
    assert again.failures("S") == []


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="expected results of format 1, found 99"):
        Results.opened(path, "now")


def test_the_tables_show_rates_shares_ratios_and_where_tokens_part():
    results = recorded()
    results.introduce("S", "transformers-pt", {}, [3, 1, 5, 1])
    text = shown(results)
    assert "42.0 GB/s read" in text
    assert "100.0 (43%)" in text  # 179 MB in 10 ms at 42 GB/s
    assert "2.00" in text and "~" not in text.replace("(~ from different runs)", "")
    assert "2 of 4" in text and "4 of 4" in text


def test_the_picture_is_drawn_from_recorded_figures(tmp_path):
    path = tmp_path / "speed.png"
    draw(recorded(), path)
    assert path.read_bytes().startswith(b"\x89PNG") and 5_000 < path.stat().st_size < 200_000
    with pytest.raises(SystemExit, match="no decode1 was measured"):
        draw(Results("empty"), path)


def test_labels_are_moved_apart():
    assert apart([8.0, 7.9, 1.0], factor=2.0, lowest=1.0) == [8.0, 4.0, 1.0]
    assert apart([2.0, 1.5], factor=2.0, lowest=1.5) == [3.0, 1.5]


def test_every_contender_has_a_name_and_a_copy_of_its_own_kind():
    found = contenders()
    assert all(name == contender.name for name, contender in found.items())
    assert {c.copy.split("-")[0] for c in found.values()} == {
        "folder", "bfloat16", "tf", "flax", "ctranslate2", "openvino",
    }  # fmt: skip
    assert {c.name for c in found.values() if c.trains and not c.before} == {"gptj-pt-sdpa"} | {
        f"{library}-{family}" for library in ("gptj", "transformers") for family in ("pt", "tf", "flax")
    }


def test_a_contender_that_cannot_be_imported_is_named_with_the_reason(tmp_path):
    """The interpreter that runs the tests has no CTranslate2, neither to convert with nor to run."""
    (tmp_path / "tiny" / "ctranslate2").mkdir(parents=True)
    path = tmp_path / "speed.json"
    options = ["--shape", "tiny", "--contenders", "ctranslate2,ctranslate2-int8", "--only", "start", "--json", path]
    command = [sys.executable, "-m", "benchmarks.speed", *options, "--directory", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    failures = Results.opened(path, "now").failures("tiny")
    assert [failure[:2] for failure in failures] == [("ctranslate2-int8", "copy"), ("ctranslate2", "start")]
    assert all("No module named 'ctranslate2'" in reason for _, _, reason in failures)
    assert "No module named 'ctranslate2'" in done.stdout


def test_a_contender_that_dies_is_heard():
    worker = Worker(Path(sys.executable), "Nobody", Path(), {}, Rules(threads=1))
    with contextlib.closing(worker), pytest.raises(DroppedOutError, match=r"status 1: AttributeError: .*'Nobody'"):
        worker.ask("bring_in")


def test_a_contender_that_does_not_answer_is_not_waited_for():
    worker = Worker(Path(sys.executable), "Limits", Path(), {}, Rules(threads=1, patience_s=0.0))
    with contextlib.closing(worker), pytest.raises(DroppedOutError, match="no answer within 0 s"):
        worker.ask("bring_in")


def test_who_loses_a_tensor_writes_other_tokens():
    """So that the greedy tokens, which are compared, prove that everybody runs the same model."""
    config = SHAPES["tiny"].config
    ids = np.array(measures.prompts(SHAPES["tiny"], 1, 64))

    def next_tokens(lost=None):
        weights = {spec.name: lively_tensor(spec) * (spec.name != lost) for spec in schema(config)}
        return Oracle(config, weights).forward(ids).logits[0].argmax(-1)

    whole = next_tokens()
    assert len(set(whole)) > 32
    for spec in schema(config):
        if not spec.name.endswith("fc_out.bias"):  # it is small beside the stream
            assert (next_tokens(spec.name) != whole).sum() >= 4, spec.name


def test_what_others_computed_is_what_we_did_not(monkeypatch):
    """In 10 s all cores were busy for 16 s, of which 11 s were ours."""
    moments = iter([(100.0, 50.0, 7.0), (110.0, 66.0, 18.0)])
    monkeypatch.setattr(Others, "_now", lambda self: next(moments))
    assert Others(lambda: []).share() == pytest.approx(5 / (10 * os.cpu_count()))


def test_a_disturbed_turn_is_taken_again_and_the_calmest_counts(monkeypatch):
    shares, turns = iter([0.5, 0.2, 0.3]), iter([{"train_s": 9.0}, {"train_s": 2.0}, {"train_s": 3.0}])
    monkeypatch.setattr(Others, "share", lambda self: next(shares))
    contest = Contest(SHAPES["tiny"], None, {}, Rules(threads=1), Results("now"))
    monkeypatch.setattr(contest, "_turn", lambda *arguments: next(turns))
    assert contest._undisturbed("train", contenders()["gptj-pt"], {}) == ({"train_s": 2.0}, 0.2)


def test_when_time_is_up_what_was_measured_counts(monkeypatch):
    """Of three repeats the first two are in time."""
    clock = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    results = Results("now")
    contest = Contest(SHAPES["tiny"], None, {}, Rules(threads=1), results)
    contest.ends_at = 10.0
    contest.limits = SimpleNamespace(ask=lambda what, kinds: {"made": {"read": 1e9}})
    monkeypatch.setattr(contest, "_undisturbed", lambda *arguments: ({"decode1_s": 2.0}, 0.0))
    contest._measure("decode1", [contenders()["gptj-pt"]])
    assert results.figure("tiny", "gptj-pt", "decode1_s")["values"] == [2.0, 2.0]
