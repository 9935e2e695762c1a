"""The judgement: right answers pass, each kind of wrong one fails and is named, and where it began is found."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from mutants import (
    MUTANTS,
    RotarySign,
    StepPositionOffByOne,
)
from oracle_record import oracle_record
from rich.console import Console

from gptj.errors import FormatError, InputError, MissingFileError, ParityError
from gptj.generation.sampling import draw, uniforms
from gptj.parity import compare
from gptj.parity.bounds import Rounding
from gptj.parity.compare import compare_records, expect
from gptj.parity.comparison import Comparison
from gptj.parity.oracle import Oracle, positions_of_mask
from gptj.parity.probe import Probe, make_probe
from gptj.parity.record import ANSWERS, Record
from gptj.parity.report import ParityReport
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.text_differences import TextDifference
from gptj.parity.tolerance import FLOAT32_ABSOLUTE, tolerance_of

CONFIG = revealing_config()
WEIGHTS = revealing_weights(CONFIG)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return make_probe(CONFIG)


@pytest.fixture(scope="module")
def right(probe: Probe) -> Record:
    """What float32 answers without a mistake."""
    return oracle_record(Oracle(CONFIG, WEIGHTS, dtype="float32"), probe)


def with_answer(record: Record, name: str, value: np.ndarray, *, backend: str | None = None) -> Record:
    return dataclasses.replace(
        record, backend=backend or record.backend, answers={**record.answers, name: np.asarray(value)}
    )


def printed(what: object, width: int) -> list[str]:
    """The lines that a terminal of this width shows."""
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(what)
    return [line.rstrip() for line in console.export_text().rstrip().splitlines()]


def failed(report: ParityReport) -> set[str]:
    return {measure.what for measure in report.failures}


class TestWhatPasses:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_an_oracle_that_is_right_in_its_dtype(self, oracle, probe, dtype):
        record = oracle_record(Oracle(CONFIG, WEIGHTS, dtype=dtype), probe)
        report = compare_records([record], oracle)
        assert report.passed and not report.divergences
        report.raise_if_failed()

    def test_float32_does_not_pass_for_float64(self, oracle, probe):
        record = oracle_record(Oracle(CONFIG, WEIGHTS, dtype="float32"), probe, dtype="float64")
        assert "logits" in failed(compare_records([record], oracle))

    def test_everything_is_measured_against_the_oracle_and_each_other(self, oracle, right):
        other = dataclasses.replace(right, backend="flax")
        report = compare_records([right, other], oracle)
        pairs = {(m.backend, m.against) for m in report.measures}
        assert pairs == {("pt", "oracle"), ("flax", "oracle"), ("pt", "flax")}
        assert {m.what for m in report.measures if m.backend == "flax"} == {
            "logits",
            "logits at far positions",
            "logits without a mask",
            "logits over the cache",
            "loss",
            "loss of each token",
            "hidden states",
            "attentions",
            "greedy tokens",
            "sampled tokens",
        }

    def test_a_row_that_ended_with_eos_is_not_judged_further(self, probe, right):
        start = probe.prompt_ids.shape[1]
        greedy, sampled = right.answers["greedy"].copy(), right.answers["sampled"].copy()
        ended = CONFIG.replace(eos_token_id=[int(greedy[0, start]), int(greedy[1, start])])
        greedy = greedy[:, : start + 1]  # both rows chose an end at once, so generation stopped
        record = with_answer(with_answer(right, "greedy", greedy), "sampled", sampled)
        assert "greedy tokens" not in failed(compare_records([record], Oracle(ended, WEIGHTS)))


class TestWhatFails:
    @pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.n_layer == 3], ids=lambda mutant: mutant.name)
    def test_every_planted_mistake_is_found(self, oracle, probe, mutant):
        one_step = Probe.of(probe.as_arrays() | {"new_tokens": np.asarray(1)})
        record = oracle_record(mutant.plant(CONFIG, WEIGHTS), one_step, dtype="float32")
        report = compare_records([record], oracle)
        assert any("logits" in what for what in failed(report))

    @pytest.mark.parametrize("answer", sorted(set(ANSWERS) - {"greedy", "sampled"}))
    def test_each_answer_is_looked_at(self, oracle, right, answer):
        value = right.answers[answer].copy()
        value[(..., *[-1] * value.ndim)] += 1e-3
        assert not compare_records([with_answer(right, answer, value)], oracle).passed

    @pytest.mark.parametrize("answer", ["logits", "cached_logits", "hidden_states", "attentions", "loss"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_value_that_is_not_finite_is_never_close(self, oracle, right, answer, value):
        broken = right.answers[answer].copy()
        broken[(..., *[0] * broken.ndim)] = value
        report = compare_records([with_answer(right, answer, broken)], oracle)
        assert not report.passed
        json.loads(report.to_json())  # which knows no NaN

    @pytest.mark.parametrize("answer", sorted(set(ANSWERS) - {"loss"}))
    def test_another_shape_is_a_failure_that_says_both_shapes(self, oracle, right, answer):
        report = compare_records([with_answer(right, answer, right.answers[answer][:1])], oracle)
        assert not report.passed
        if answer not in ("hidden_states", "attentions"):
            assert any(m.where.startswith("shape (1, ") and "expected (" in m.where for m in report.failures)

    def test_another_backend_that_is_off_while_both_are_near_the_oracle(self, oracle, right):
        bound = expect(oracle, right.probe, Rounding.of("float32")).logits.bound
        expected = oracle.forward(right.probe.input_ids, right.probe.attention_mask, right.probe.position_ids).logits
        above, below = (
            with_answer(right, "logits", expected + s * 0.9 * bound, backend=b) for s, b in ((1, "tf"), (-1, "flax"))
        )
        report = compare_records([above, below], oracle)
        assert report.passed  # each may lie as far from the oracle, to its own side
        far = with_answer(above, "logits", expected + 1.2 * bound)
        assert {(m.backend, m.against, m.what) for m in compare_records([far, below], oracle).failures} >= {
            ("tf", "flax", "logits"), ("tf", "oracle", "logits"),
        }  # fmt: skip

    def test_the_place_of_the_largest_difference_is_named(self, oracle, right):
        logits = right.answers["logits"].copy()
        logits[1, 20, 7] += 0.5
        logits[1, 0, 3] -= 0.25
        first = compare_records([with_answer(right, "logits", logits)], oracle).failures[0]
        assert (first.what, first.where, round(first.difference, 3)) == ("logits", "row 1, token 20, vocabulary 7", 0.5)

    def test_a_place_in_the_padding_is_called_that(self, oracle, right):
        logits = right.answers["logits"].copy()
        logits[1, 0, 3] -= 0.25
        first = compare_records([with_answer(right, "logits", logits)], oracle).failures[0]
        assert first.where == "row 1, token 0, vocabulary 3 (padding)"

    def test_a_step_over_the_cache_whose_position_is_off_by_one(self, oracle, probe, right):
        cached = StepPositionOffByOne(CONFIG, WEIGHTS).forward(
            probe.input_ids, probe.attention_mask, probe.position_ids
        )
        report = compare_records([with_answer(right, "cached_logits", cached.logits)], oracle)
        assert failed(report) == {"logits over the cache"}

    @pytest.mark.parametrize("answer", sorted(ANSWERS))
    def test_text_in_place_of_numbers_is_a_failure(self, oracle, right, answer):
        text = np.full(right.answers[answer].shape, "1.0")
        assert not compare_records([with_answer(right, answer, text)], oracle).passed

    def test_a_backend_that_nobody_knows_is_refused(self, oracle, right):
        with pytest.raises(InputError, match=r"backend: no such backend .*found 'jax'"):
            compare_records([dataclasses.replace(right, backend="jax")], oracle)

    @pytest.mark.parametrize("answer", sorted(ANSWERS))
    def test_an_answer_that_is_missing_is_named(self, oracle, right, answer):
        rest = {name: value for name, value in right.answers.items() if name != answer}
        with pytest.raises(InputError, match=f"pt: {answer}: has not answered"):
            compare_records([dataclasses.replace(right, answers=rest)], oracle)


IN_ATTENTION = ("rotary sign", "rotary half split", "rotary only queries", "rotary none", "no scale",
                "mask shows padding", "mask shows the future", "softmax over queries", "heads interleaved")  # fmt: skip


class TestSixteenBits:
    """Answers of 16 bits can fail too: the bounds are what rounding does, not a share of the largest logit."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("name", [None, *IN_ATTENTION])
    def test_attention_that_is_wrong_fails(self, oracle, probe, name, dtype):
        one_step = Probe.of(probe.as_arrays() | {"new_tokens": np.asarray(1)})
        mutant = {None: Oracle, **{mutant.name: mutant.plant for mutant in MUTANTS}}[name]
        report = compare_records([oracle_record(mutant(CONFIG, WEIGHTS), one_step, dtype=dtype)], oracle)
        assert ("attentions" in failed(report)) == (name is not None) and report.passed == (name is None)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("change", [lambda u: 1 - u, lambda u: u / 2, lambda u: np.sqrt(u), lambda u: u * 0])
    def test_a_token_that_another_number_draws_fails(self, oracle, right, dtype, change):
        """Each sampled token from the distribution as it is, by a number that is not the seed's."""
        ids, mask, probe = right.probe.prompt_ids, right.probe.prompt_mask, right.probe
        for step in range(probe.new_tokens):
            logits = oracle.forward(ids, mask, positions_of_mask(mask)).logits[:, -1]
            chosen = [draw(row, float(change(uniforms(probe.seed, step, n)[0]))) for n, row in enumerate(logits)]
            ids, mask = np.c_[ids, chosen], np.c_[mask, np.ones_like(mask[:, :1])]
        record = dataclasses.replace(with_answer(right, "sampled", ids), dtype=dtype)
        assert failed(compare_records([record], oracle)) == {"sampled tokens"}


class TestChosenTokens:
    def changed(self, record: Record, answer: str, row: int, step: int, token: int) -> Record:
        ids = record.answers[answer].copy()
        ids[row, record.probe.prompt_ids.shape[1] + step] = token
        return with_answer(record, answer, ids)

    @pytest.mark.parametrize("answer", ["greedy", "sampled"])
    def test_a_wrong_token_is_found_with_its_row_and_step(self, oracle, right, answer):
        start = right.probe.prompt_ids.shape[1]
        logits = oracle.forward(right.answers[answer][:, : start + 11]).logits[1, -1]
        worst = int(logits.argmin())
        report = compare_records([self.changed(right, answer, 1, 11, worst)], oracle)
        assert failed(report) == {f"{answer} tokens"}
        assert report.failures[0].where == "row 1, step 11"

    @pytest.mark.parametrize("answer", ["greedy", "sampled"])
    def test_either_of_two_tokens_that_tie_is_right(self, probe, answer):
        """Two tokens with the same row in the head tie exactly: choosing the other one is right too."""
        one_step = Probe.of(probe.as_arrays() | {"new_tokens": np.asarray(1)})
        start = probe.prompt_ids.shape[1]
        chosen = int(oracle_record(Oracle(CONFIG, WEIGHTS), one_step).answers[answer][0, start])
        twin = (chosen + 1) % CONFIG.vocab_size
        weights = {name: value.copy() for name, value in WEIGHTS.items()}
        for name in ("lm_head.weight", "lm_head.bias"):
            weights[name][twin] = weights[name][chosen]
        tied = Oracle(CONFIG, weights)
        record = oracle_record(tied, one_step)
        other = {chosen: twin, twin: chosen}[int(record.answers[answer][0, start])]
        report = compare_records([self.changed(record, answer, 0, 0, other)], tied)
        assert f"{answer} tokens" not in failed(report)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda ids, start: ids[:, :-1], "row 0 stops after 11 tokens"),
            (lambda ids, start: np.where(np.arange(ids.shape[1]) == 0, 3, ids), "does not begin with the prompt"),
            (lambda ids, start: np.where(np.arange(ids.shape[1]) == start, 999, ids), "a token that the vocabulary"),
        ],
    )
    def test_a_broken_text_is_a_failure_with_a_reason(self, oracle, right, change, words):
        start = right.probe.prompt_ids.shape[1]
        report = compare_records([with_answer(right, "greedy", change(right.answers["greedy"], start))], oracle)
        assert failed(report) == {"greedy tokens"} and words in report.failures[0].where

    def test_shared_text_is_counted_and_not_judged(self, oracle, right):
        start = right.probe.prompt_ids.shape[1]
        ids = right.answers["sampled"].copy()
        ids[0, start + 3 :] = 5
        other = with_answer(right, "sampled", ids, backend="tf")
        texts = {t.answer: (t.same, t.tokens) for t in compare_records([right, other], oracle).texts}
        assert texts["greedy"] == (24, 24)
        assert texts["sampled"] == (15, 24)


class TestTheReport:
    @pytest.fixture
    def report(self, oracle, right):
        logits = right.answers["logits"].copy()
        logits[0, 1, 2] = np.inf
        return compare_records([with_answer(right, "logits", logits)], oracle, checkpoint="model")

    def test_a_failure_is_raised_when_asked_with_its_facts(self, report):
        with pytest.raises(
            ParityError,
            match=r"model: pt and oracle disagree on logits at row 0, token 1, vocabulary 2 .*"
            r"at most 1.\de-05 in float32, found inf",
        ):
            report.raise_if_failed()

    def test_json_tells_the_same(self, report):
        facts = json.loads(report.to_json())
        assert facts["passed"] is False and facts["dtype"] == "float32" and facts["backends"] == ["pt"]
        assert facts["measures"][0]["difference"] == "inf" and facts["measures"][0]["holds"] is False
        assert facts["versions"]["pt"]["numpy"] == np.__version__

    def test_the_table_has_a_row_a_measure(self, report):
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        with console.file:
            console.print(report.table())
        text = console.export_text()
        assert "pt in float32: 2 of 10 disagree" in text

    @pytest.mark.parametrize("width", [60, 80, 140])
    @pytest.mark.parametrize("backends", [("pt",), ("pt", "tf", "flax")])
    def test_when_all_is_well_the_verdict_comes_first_and_a_line_a_backend(self, oracle, right, width, backends):
        records = [dataclasses.replace(right, backend=name) for name in backends]
        report = compare_records(records, oracle, manifest="missing")
        lines = printed(report.summary(), width)
        assert lines[0].startswith("all agree: ") and "not checked against a manifest" in lines[1]
        assert [line.split()[0] for line in lines[4:]] == [*backends] and len(lines) == 4 + len(backends)

    @pytest.mark.parametrize("width", [60, 80])
    def test_what_is_wrong_is_wrapped_and_never_wider_than_the_terminal(self, oracle, right, probe, width):
        wrong = oracle_record(RotarySign(CONFIG, WEIGHTS), probe, dtype="float32", backend="flax")
        report = compare_records([right, wrong], oracle)
        summary, table = printed(report.summary(), width), printed(report.table(), width)
        assert summary[0].startswith("14 of 24 disagree: pt, flax")
        assert max(len(line) for line in [*summary, *table]) <= width
        assert not set("".join([*summary, *table])) & set("│┃|…")
        assert {"vocabulary", "positions", "attentions", "NO", "ok"} <= set(" ".join(table).split())

    def test_a_model_of_zeros_is_judged_too(self, probe):
        zeros = {name: np.zeros_like(value) for name, value in WEIGHTS.items()}
        record = oracle_record(Oracle(CONFIG, zeros, dtype="float32"), probe)
        report = compare_records([record], Oracle(CONFIG, zeros))
        assert {m.what: m.difference for m in report.measures}["hidden states"] <= FLOAT32_ABSOLUTE

    def test_a_model_that_answers_nan_is_never_right(self, probe):
        weights = {name: value.copy() for name, value in WEIGHTS.items()}
        weights["transformer.h.1.mlp.fc_out.bias"][0] = np.nan
        with np.errstate(all="ignore"):
            record = oracle_record(Oracle(CONFIG, weights, dtype="float32"), probe)
            report = compare_records([record], Oracle(CONFIG, weights))
        held = {measure.what for measure in report.measures if measure.holds}
        assert not report.passed and held == set()

    def test_what_is_asked_differs(self, oracle, right, probe):
        other = dataclasses.replace(
            right, backend="tf", probe=dataclasses.replace(probe, input_ids=(probe.input_ids + 1) % 200)
        )
        with pytest.raises(InputError, match="tf: input_ids: answers another probe"):
            compare_records([right, other], oracle)

    def test_dtypes_that_differ_are_refused(self, oracle, right):
        other = dataclasses.replace(right, backend="tf", dtype="float64")
        with pytest.raises(InputError, match=r"tf: records of different dtypes \(expected float32, found float64"):
            compare_records([right, other], oracle)

    def test_nothing_to_compare_is_refused(self, oracle):
        with pytest.raises(InputError, match="at least one record"):
            compare_records([], oracle)


class TestRecordsOnDisk:
    def test_a_record_comes_back_as_it_was(self, right, tmp_path):
        right.save(tmp_path / "pt")
        back = Record.load(tmp_path / "pt")
        assert (back.backend, back.dtype, back.facts) == (right.backend, right.dtype, right.facts)
        assert all(np.array_equal(back.answers[name], right.answers[name]) for name in ANSWERS)
        asked = back.probe.as_arrays()
        assert all(np.array_equal(value, asked[name]) for name, value in right.probe.as_arrays().items())

    def test_numpy_reads_it_and_what_numpy_wrote_is_read(self, right, tmp_path):
        right.save(tmp_path)
        path = tmp_path / "record.npz"
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        assert all(arrays[name].tobytes() == right.answers[name].tobytes() for name in ANSWERS)
        np.savez(path, **arrays)
        back = Record.load(tmp_path, config=CONFIG).answers
        assert all(np.array_equal(back[name], right.answers[name]) for name in ANSWERS)

    def test_numbers_in_the_other_byte_order_come_back_as_they_were(self, right, tmp_path):
        swapped = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in right.answers.items()}
        dataclasses.replace(right, answers=swapped).save(tmp_path)
        back = Record.load(tmp_path).answers
        assert all(np.array_equal(back[name], right.answers[name]) for name in ANSWERS)

    @pytest.mark.parametrize("value", [np.array([None]), np.array(["x"]), np.array([1j]), np.array([1], "i2")])
    def test_what_no_record_can_hold_is_not_written(self, right, tmp_path, value):
        with pytest.raises(InputError, match=r"record\.npz: logits: not an array of plain numbers"):
            with_answer(right, "logits", value).save(tmp_path)
        with pytest.raises(InputError, match="facts: not JSON"):
            dataclasses.replace(right, facts={"seconds": float("nan")}).save(tmp_path)
        assert [*tmp_path.iterdir()] == []

    def test_a_missing_part_is_named(self, right, tmp_path):
        dataclasses.replace(right, answers={k: v for k, v in right.answers.items() if k != "greedy"}).save(tmp_path)
        with pytest.raises(FormatError, match=r"a part of the record is missing .*no greedy"):
            Record.load(tmp_path)

    def test_arrays_that_are_no_npz_are_named(self, right, tmp_path):
        right.save(tmp_path)
        (tmp_path / "record.npz").write_bytes(b"nonsense")
        with pytest.raises(FormatError, match=r"record\.npz: not a record's arrays"):
            Record.load(tmp_path)

    def test_a_missing_record_is_named(self, tmp_path):
        with pytest.raises(MissingFileError, match=r"record\.json: no such file"):
            Record.load(tmp_path)


class TestProbe:
    def test_it_has_whole_rows_and_padding_on_every_side(self, probe):
        assert probe.attention_mask[0].all()
        assert probe.attention_mask[1, 0] == 0 and probe.attention_mask[2, -1] == 0
        assert probe.attention_mask[3, 0] == 1 and 0 in probe.attention_mask[3, 1:-1]
        assert (probe.far_position_ids - probe.position_ids == 1900).all()

    def test_a_small_model_gets_one_that_fits(self):
        config = revealing_config(n_positions=8, vocab_size=3)
        small = make_probe(config)
        small.check(config)
        assert small.prompt_ids.shape[1] + small.new_tokens <= 8

    def test_too_small_a_model_is_refused(self):
        with pytest.raises(InputError, match="8 positions"):
            make_probe(revealing_config(n_positions=7))

    def test_seeds_ask_different_things(self, probe):
        assert not np.array_equal(make_probe(CONFIG, seed=1).input_ids, probe.input_ids)

    def test_a_probe_that_does_not_fit_the_model_is_refused(self, probe):
        with pytest.raises(InputError, match="no such token"):
            probe.check(revealing_config(vocab_size=8))
        with pytest.raises(InputError, match=r"new_tokens: does not fit .*found 3000"):
            dataclasses.replace(probe, new_tokens=3000).check(CONFIG)
        with pytest.raises(InputError, match="prefill: leaves no token for steps"):
            dataclasses.replace(probe, prefill=24).check(CONFIG)

    def test_it_comes_back_from_a_file_and_another_file_is_refused(self, probe, tmp_path):
        probe.save(tmp_path / "probe.npz")
        assert np.array_equal(Probe.load(tmp_path / "probe.npz").labels, probe.labels)
        np.savez(tmp_path / "other.npz", input_ids=probe.input_ids)
        with pytest.raises(FormatError, match=r"other\.npz: not a probe"):
            Probe.load(tmp_path / "other.npz")
        with pytest.raises(MissingFileError, match="none"):
            Probe.load(tmp_path / "none")


class TestTolerances:
    def test_larger_logits_are_allowed_more_and_smaller_ones_no_less(self):
        single = tolerance_of("float32")
        assert single.of_logits(0.1) == FLOAT32_ABSOLUTE
        assert single.of_logits(50.0) == pytest.approx(10 * FLOAT32_ABSOLUTE)

    def test_they_are_in_the_order_of_the_dtypes(self):
        limits = [tolerance_of(dtype).of_logits(5.0) for dtype in ("float64", "float32", "float16", "bfloat16")]
        assert limits == sorted(limits)

    def test_another_dtype_has_none(self):
        with pytest.raises(InputError, match=r"no tolerance .*int8"):
            tolerance_of("int8")


@pytest.mark.parametrize(("first", "margins", "errors", "found"), [
    (None, None, (1e-6,), None),
    (3, (0.01, 0.02), (1e-6,), (0.02, 0.06, True)),
    (3, (0.01, 0.2), (1e-6,), (0.2, 0.06, False)),
    (3, (0.01, float("nan")), (1e-6,), (float("inf"), 0.06, False)),
    (3, (0.01, 0.02), (float("inf"),), (float("inf"), 0.06, False)),
    (None, None, (float("nan"),), (float("inf"), 0.06, False)),
])  # fmt: skip
def test_where_a_text_parts_is_a_measure_that_a_tie_explains(first, margins, errors, found):
    text = TextDifference("oracle", "pt", 1, 8, first, None if first is None else (4, 5), margins, 0.03, errors)
    inside = Comparison((), {}, (), texts=(text, dataclasses.replace(text, other="tf", errors=(float("nan"),))))
    measures = [*compare._parted("pt", inside)]
    assert [(m.difference, m.limit, m.holds) for m in measures] == ([] if found is None else [found])
    assert all(m.where == f"prompt 1, token {first or 0}" for m in measures)
