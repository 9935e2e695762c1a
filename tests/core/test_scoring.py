"""Scoring without a framework: windows, batches, sums over the vocabulary, and the arguments that are refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gptj.errors import GPTJError, InputError
from gptj.generation.held import PARTS, HeldLogits, Selected
from gptj.generation.scoring import Measure, Score, Scores, windows_of
from gptj.generation.scoring.likelihood import likelihoods_of, score_windows
from gptj.generation.scoring.sequences import encode_pair
from gptj.generation.scoring.windows import Limits, Window, limits_of
from gptj.parity.oracle import Oracle, token_losses
from gptj.parity.revealing import revealing_config, revealing_weights

CONFIG = revealing_config()
ORACLE = Oracle(CONFIG, revealing_weights(CONFIG))


class OracleModel(Scores):
    """`Scores` over the oracle; notes the shapes that were read."""

    config = CONFIG

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []
        self.made: list[int] = []

    def _last_states(self, token_ids):
        self.read.append(token_ids.shape)
        return ORACLE.forward(token_ids).logits

    def _logits_at(self, states, rows, columns):
        self.made.append(len(rows))
        return states[rows, columns]

    def _held(self, logits, columns=None):
        return logits

    def _with(self, params):
        return self


class Words:
    """A tokenizer: a token a letter, a space belongs to the letter after it (a is 1, " a" is 27)."""

    def encode(self, text):
        ids, space = [], 0
        for letter in text:
            if letter == " ":
                space = 26
            else:
                ids.append(ord(letter) - ord("a") + 1 + space)
                space = 0
        return ids


def rows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]


def same(one: Score, other: Score) -> bool:
    return (
        one.token_ids.tolist() == other.token_ids.tolist()
        and np.abs(one.log_likelihoods - other.log_likelihoods).max(initial=0) < 1e-12
        and one.greedy.tolist() == other.greedy.tolist()
    )


# ---- windows


@pytest.mark.parametrize(
    ("n", "first", "length", "stride", "expected"),
    [
        (5, 1, 4, 4, [((0, 1, 2, 3), (1, 2, 3, 4))]),
        (6, 1, 4, 4, [((0, 1, 2, 3), (1, 2, 3, 4)), ((1, 2, 3, 4), (5,))]),
        (10, 1, 4, 4, [((0, 1, 2, 3), (1, 2, 3, 4)), ((4, 5, 6, 7), (5, 6, 7, 8)), ((5, 6, 7, 8), (9,))]),
        (7, 1, 4, 2, [((0, 1, 2, 3), (1, 2, 3, 4)), ((2, 3, 4, 5), (5, 6))]),
        (6, 1, 1, 1, [((n,), (n + 1,)) for n in range(5)]),
        (6, 4, 4, 4, [((1, 2, 3, 4), (4, 5))]),  # a context that is too long loses its beginning
        (6, 2, 8, 8, [((0, 1, 2, 3, 4), (2, 3, 4, 5))]),
        (9, 3, 4, 4, [((2, 3, 4, 5), (3, 4, 5, 6)), ((4, 5, 6, 7), (7, 8))]),
        (1, 1, 4, 4, []),
        (0, 1, 4, 4, []),
    ],
)
def test_windows(n, first, length, stride, expected):
    found = windows_of(range(n), first, Limits(length, stride))
    assert [(window.token_ids, window.targets) for window in found] == expected


def test_every_token_is_scored_once_by_the_tokens_just_before_it_whatever_the_sizes():
    for n, first, length in itertools.product(range(14), range(1, 6), range(1, 7)):
        for stride in range(1, length + 1):
            scored = []
            for window in windows_of(range(n), first, Limits(length, stride)):
                assert 1 <= len(window.token_ids) <= length and len(window.targets) <= len(window.token_ids)
                assert window.targets[-1] == window.token_ids[-1] + 1
                assert [*window.token_ids] == [*range(window.token_ids[0], window.token_ids[-1] + 1)]
                scored += window.targets
            assert scored == [*range(first, n)]


# ---- the sums


@pytest.mark.parametrize("scale", [1, 1e3, 1e30])
def test_a_likelihood_is_the_log_softmax(scale):
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((70, 50)) * scale).astype(np.float32)
    targets = rng.integers(0, 50, 70)
    values, greedy = likelihoods_of(logits, targets)
    expected = -token_losses(logits.astype(np.float64), targets)
    assert np.allclose(values, expected, rtol=1e-13, atol=1e-13)
    assert greedy.tolist() == (logits.argmax(1) == targets).tolist()


def test_many_small_terms_are_not_lost():
    logits = np.zeros((1, 100_000), np.float32)
    logits[0, 0] = 16  # in float32, one of e**-16 added to 1 is nothing
    values, _ = likelihoods_of(logits, np.array([0]))
    assert values[0] == pytest.approx(-math.log1p(99_999 * math.exp(-16)), rel=1e-13)


class DeviceLogits(HeldLogits):
    """Logits that only give what a device gives; of equals it names the highest id."""

    def best(self, count, named, temperature):
        logits = self._array
        order = np.argsort(logits, axis=1, kind="stable")[:, ::-1][:, :count]
        values = np.take_along_axis(logits, order, 1)
        with np.errstate(all="ignore"):
            weights = np.where(logits > values[:, -1:], 0, np.exp((logits - values[:, :1]) / temperature))
        parts = np.pad(weights, ((0, 0), (0, -weights.shape[1] % PARTS)))
        return Selected(
            values,
            order,
            np.isfinite(logits).all(1),
            np.take_along_axis(logits, named, 1),
            parts.reshape(len(parts), PARTS, -1).sum(2),
        )

    def _fetched(self, array):
        return array

    def _rows(self, rows):
        return self._array[rows]

    def _position(self, n):
        raise NotImplementedError


@pytest.mark.parametrize("vocab", [1, 2, 7, 600])
def test_what_a_device_selects_gives_the_same_likelihoods(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 4, (64, vocab)).astype(np.float32)  # with many equal ones, the largest among them
    targets = rng.integers(0, vocab, 60)
    values, greedy = likelihoods_of(DeviceLogits(logits), targets)
    expected = likelihoods_of(logits[:60], targets)
    assert np.allclose(values, expected[0], rtol=0, atol=1e-5)
    assert greedy.tolist() == expected[1].tolist()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(held, value):
    logits = np.zeros((3, 300), np.float32)
    logits[1, 299] = value
    with pytest.raises(GPTJError, match="non-finite logits"):
        likelihoods_of(DeviceLogits(logits) if held else logits, np.array([0, 0, 0]))


# ---- batches


def test_scores_are_the_oracles_in_the_order_of_the_texts_whatever_the_batch():
    texts = rows(3, 17, 0, 1, 5, 17, 2)
    expected = ORACLE.score(texts, prefix_token_id=7)
    assert [len(score.token_ids) for score in expected] == [3, 17, 0, 1, 5, 17, 2]
    for batch_size in (None, 1, 2, 3, 100):
        model = OracleModel()
        found = model.score(texts, prefix_token_id=7, batch_size=batch_size)
        assert all(map(same, found, expected))
        assert all(b <= (batch_size or 99) for b, _ in model.read)
        assert [t for _, t in model.read] == sorted((t for _, t in model.read), reverse=True)


def test_the_oracle_scores_what_its_logits_say():
    text = rows(9)[0]
    score = ORACLE.score(text, prefix_token_id=7)[0]
    logits = ORACLE.forward([[7, *text]]).logits[0, :-1]
    assert np.abs(score.log_likelihoods + token_losses(logits, text)).max() == 0
    assert score.log_likelihood == pytest.approx(-token_losses(logits, text).sum(), rel=1e-14)
    assert score.perplexity == pytest.approx(math.exp(token_losses(logits, text).mean()), rel=1e-12)
    greedy, _ = ORACLE.generate([text[:3]], max_new_tokens=4)
    continued = ORACLE.score([text[:3]], [greedy[0, 3:].tolist()])[0]
    assert continued.is_greedy and not score.is_greedy


def test_choices_of_one_token_are_read_once():
    model = OracleModel()
    found = model.score([[1, 2, 3]] * 4 + [[1, 2]], [[4], [5], [6], [4, 5], [3, 6]])
    assert model.read == [(2, 4)]
    assert all(map(same, found, ORACLE.score([[1, 2, 3]] * 4 + [[1, 2]], [[4], [5], [6], [4, 5], [3, 6]])))


def test_logits_are_made_of_the_scored_places_alone_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("gptj.generation.scoring.likelihood.LOGITS_AT_ONCE", 3 * CONFIG.vocab_size)
    model = OracleModel()
    context, continuation = rows(20, 7)
    found = model.score([context], [continuation])
    assert model.made == [3, 3, 1]
    assert same(found[0], ORACLE.score([context], [continuation])[0])


def test_a_long_text_is_scored_in_windows(monkeypatch):
    text = rows(30)[0]
    for stride in (None, 1, 3, 8):
        found = OracleModel().score(text, prefix_token_id=7, max_length=8, stride=stride)[0]
        assert same(found, ORACLE.score(text, prefix_token_id=7, max_length=8, stride=stride)[0])
        assert found.token_ids.tolist() == text
    step = ORACLE.score(text, prefix_token_id=7, max_length=8, stride=1)[0]
    last = ORACLE.forward([text[21:29]]).logits[0, -1]
    assert step.log_likelihoods[-1] == -token_losses(last, np.array(text[29]))


def test_windows_are_made_as_they_are_needed(monkeypatch):
    """A small stride reads each token many times, so that all windows at once would be many times the text."""
    monkeypatch.setattr("gptj.generation.scoring.likelihood.TOKENS_SORTED", 40)
    made, read, model = [], [], OracleModel()

    def windows():
        for window in windows_of(rows(60)[0], 1, Limits(8, 1)):
            made.append(len(window.token_ids))
            yield window

    for _ in score_windows(model, windows()):
        read.append(sum(made))
    assert len(read) == 52 and read[0] <= 40 + 8 and max(b - a for a, b in itertools.pairwise(read)) <= 40 + 8
    found = OracleModel().score(rows(60, 3, 9), prefix_token_id=7, max_length=8, stride=1)
    assert all(map(same, found, ORACLE.score(rows(60, 3, 9), prefix_token_id=7, max_length=8, stride=1)))


def test_progress_is_told_after_every_batch():
    told = []
    OracleModel().score(rows(3, 1, 5), prefix_token_id=7, batch_size=2, progress=lambda *n: told.append(n))
    assert told == [(8, 9), (9, 9)]


# ---- what is read, and what is scored


def test_the_first_token_follows_the_prefix_or_is_not_scored():
    text = rows(4)[0]
    bos = revealing_config(bos_token_id=3)
    assert same(Oracle(bos, ORACLE._read).score(text)[0], ORACLE.score(text, prefix_token_id=3)[0])
    eos = revealing_config(bos_token_id=None, eos_token_id=5)
    assert same(Oracle(eos, ORACLE._read).score(text)[0], ORACLE.score(text, prefix_token_id=5)[0])
    bare = ORACLE.score(text, prefix_token_id=None)[0]
    assert bare.token_ids.tolist() == text[1:]
    neither = Oracle(revealing_config(bos_token_id=None, eos_token_id=None), ORACLE._read)
    with pytest.raises(InputError, match="neither bos nor eos"):
        neither.score(text)


def test_an_empty_context_is_the_prefix_unless_the_continuation_begins_with_it():
    def read(continuation):
        return ORACLE.score([[]], [continuation], prefix_token_id=7)[0]

    assert same(read([4, 5]), ORACLE.score([[7]], [[4, 5]])[0])
    assert same(read([7, 5]), ORACLE.score([[7]], [[5]])[0])
    with pytest.raises(InputError, match="nothing but the token"):
        read([7])
    with pytest.raises(InputError, match="nothing comes before it"):
        ORACLE.score([[]], [[4]], prefix_token_id=None)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("ab", " cd", ([1, 2], [29, 4])),
        ("ab ", "cd", ([1, 2], [29, 4])),
        ("ab  ", "cd", ([1, 2], [29, 4])),
        ("", "cd", ([], [3, 4])),
        (" ", "cd", ([], [29, 4])),
    ],
)
def test_spaces_between_context_and_continuation_belong_to_the_second(context, continuation, expected):
    assert encode_pair(Words().encode, context, continuation) == expected


@pytest.mark.parametrize(
    "texts", [[1, 2, 3], [[1, 2, 3]], (1, 2, 3), np.array([1, 2, 3]), np.array([[1, 2, 3]]), [np.array([1, 2, 3])]]
)
def test_one_row_of_ids_in_any_form(texts):
    assert same(OracleModel().score(texts, prefix_token_id=7)[0], ORACLE.score([[1, 2, 3]], prefix_token_id=7)[0])


def test_texts_are_encoded_by_the_tokenizer():
    found = OracleModel().score(["ab", "c"], tokenizer=Words(), prefix_token_id=7)
    assert [score.token_ids.tolist() for score in found] == [[1, 2], [3]]
    assert [score.n_bytes for score in found] == [2, 1]
    assert OracleModel().score("ab", " c", tokenizer=Words())[0].token_ids.tolist() == [29]


V = CONFIG.vocab_size


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ab",), {}, r"texts\[0\]: text, and no tokenizer"),
        ((None,), {}, "texts: no texts"),
        (([],), {}, "texts: no text"),
        ((b"ab",), {}, "texts: no texts"),
        (({"input_ids": [1]},), {}, "texts: no texts"),
        ((7,), {}, "texts: not a row of token ids"),
        ((np.array(7),), {}, "texts: not a row of token ids"),
        (([[1]], 7), {}, "continuations: not a row of token ids"),
        (([[1]],), {"progress": 3}, "progress: cannot be called"),
        (([1, [2]],), {}, r"texts\[0\]"),
        (([[1], [2, V]],), {}, rf"texts\[1\]\[1\]: no such token \(expected 0 to {V - 1}, found {V}\)"),
        (([[1, -1]],), {}, "no such token"),
        (([[1.0]],), {}, r"texts\[0\]: not whole numbers"),
        (([[True]],), {}, r"texts\[0\]: not whole numbers"),
        (([[1, None]],), {}, r"texts\[0\]"),
        (([[[1]]],), {}, r"texts\[0\]"),
        (([[1]], [[2], [3]]), {}, "continuations: not one a text"),
        (([[1]], [[]]), {}, r"continuations\[0\]: no token of its own"),
        (([[1], [V]], [[2], [3]]), {}, r"texts\[1\]\[0\]: no such token"),
        (([[1], [2]], [[2], [V]]), {}, r"continuations\[1\]\[0\]: no such token"),
        (([[1]], ["a"]), {"tokenizer": Words()}, r"continuations\[0\]: text beside token ids"),
        ((["ab"], ["c"]), {"tokenizer": object()}, "tokenizer: cannot be used"),
        ((["ab"], [" "]), {"tokenizer": Words()}, r"continuations\[0\]: no token of its own"),
        (([[1]],), {"prefix_token_id": V}, "prefix_token_id"),
        (([[1]],), {"prefix_token_id": -1}, "prefix_token_id"),
        (([[1]],), {"prefix_token_id": True}, "prefix_token_id: no token id"),
        (([[1]],), {"prefix_token_id": "eos"}, "prefix_token_id: no token id"),
        (([[1]],), {"max_length": 0}, "max_length: out of range"),
        (([[1]],), {"max_length": CONFIG.n_positions + 1}, "max_length: out of range"),
        (([[1]],), {"max_length": 2.0}, "max_length: out of range"),
        (([[1]],), {"max_length": 4, "stride": 5}, "stride: out of range"),
        (([[1]],), {"stride": 0}, "stride: out of range"),
        (([[1]],), {"stride": True}, "stride: out of range"),
        (([[1]],), {"batch_size": 0}, "batch_size: out of range"),
        (([[1]],), {"batch_size": 2.5}, "batch_size: out of range"),
    ],
)
def test_arguments_that_break_a_rule_are_refused_by_name_before_anything_is_computed(arguments, options, message):
    model = OracleModel()
    with pytest.raises(InputError, match=message):
        model.score(*arguments, **{"prefix_token_id": 7, **options})
    assert model.read == []


# ---- measures


def test_measures():
    score = Score(np.array([1, 2]), np.array([-1.0, -2.0]), np.array([True, False]), n_bytes=6)
    assert (score.log_likelihood, score.is_greedy) == (-3.0, False)
    assert score.perplexity == math.exp(1.5) and score.bits_per_byte == 3 / math.log(2) / 6
    total = Measure.of([score, Score(np.array([3]), np.array([-3.0]), np.array([True]), n_bytes=4)])
    assert (total.tokens, total.log_likelihood, total.n_bytes) == (3, -6.0, 10)
    assert total.perplexity == math.exp(2)
    unknown = Measure.of([score, Score(np.array([3]), np.array([-3.0]), np.array([True]))])
    assert unknown.n_bytes is None and unknown.bits_per_byte is None


def test_measures_of_nothing_and_of_the_impossible():
    nothing = Score(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), n_bytes=0)
    assert nothing.log_likelihood == 0 and nothing.is_greedy
    assert math.isnan(nothing.perplexity) and nothing.bits_per_byte is None
    assert Measure(1, -1e6, 1).perplexity == math.inf


def test_windows_that_score_nothing_are_none():
    assert [*score_windows(OracleModel(), [])] == []
    assert limits_of(CONFIG) == Limits(CONFIG.n_positions, CONFIG.n_positions)
    assert Window((1,), (2,)) == Window((1,), (2,))


def test_a_score_of_a_long_text_is_shown_in_a_line() -> None:
    score = Score(np.arange(900), np.full(900, -0.5), np.zeros(900, bool), 3000)
    assert repr(score) == "Score(token_ids=int64 (900,), log_likelihood=-450.0, n_bytes=3000)"
