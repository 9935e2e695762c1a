"""`gptj score` in each wing: what it prints is what the model's `score` says."""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from tokenizer_samples import small
from wings import Wing

from gptj.command.main import gptj_command
from gptj.errors import InputError

FEW = {"vocab_size": 300, "n_positions": 24, "n_layer": 1}
TEXTS = ["The quick brown", "naïve é", "x", "The quick brown fox jumps over the lazy dog. " * 4]
PAIRS = [("The quick", " brown"), ("Whether ", "'tis nobler"), ("", "won")]


@pytest.fixture(scope="module")
def spoken(folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer beside it."""
    path = Path(shutil.copytree(folder(**FEW), tmp_path_factory.mktemp("spoken") / "model"))
    small().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(wing: Wing, spoken: Path) -> Any:
    return wing.model("causal_lm").from_pretrained(spoken)


@pytest.fixture
def run(
    wing: Wing, spoken: Path, model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """`gptj score` in this process, over lines of stdin: what it prints on stdout and on stderr."""
    monkeypatch.setattr(wing.model("causal_lm"), "from_pretrained", functools.cache(lambda *a, **o: model))
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})

    def call(stdin: str, *arguments: Any, file: str = "-") -> Any:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        words = [str(a) for a in ("score", spoken, file, *arguments, "--backend", wing.name)]
        gptj_command.main(words, standalone_mode=False)
        return capsys.readouterr()

    return call


def same(records: list[dict[str, Any]], scores: list[Any]) -> bool:
    return [record["log_likelihood"] for record in records] == pytest.approx(
        [score.log_likelihood for score in scores], rel=1e-6
    ) and [record["is_greedy"] for record in records] == [score.is_greedy for score in scores]


def test_the_lines_of_a_file_are_texts(run: Any, model: Any) -> None:
    expected = model.score(TEXTS, tokenizer=small())
    out, err = run("\n".join(TEXTS) + "\n", "--json", "--tokens")
    found = json.loads(out)
    assert same(found["documents"], expected)
    assert [one["line"] for one in found["documents"]] == [1, 2, 3, 4]
    assert [one["token_ids"] for one in found["documents"]] == [small().encode(text) for text in TEXTS]
    tokens, n_bytes = sum(len(score.token_ids) for score in expected), len("".join(TEXTS).encode())
    total = sum(score.log_likelihood for score in expected)
    assert (found["total"]["tokens"], found["total"]["bytes"]) == (tokens, n_bytes)
    assert found["total"]["log_likelihood"] == pytest.approx(total)
    assert found["total"]["perplexity"] == pytest.approx(math.exp(-total / tokens))
    assert found["total"]["bits_per_byte"] == pytest.approx(-total / math.log(2) / n_bytes)
    assert err.endswith(f"scored {tokens:,} of {tokens:,} tokens\n")


def test_the_table_has_a_line_a_text_and_one_for_all(run: Any, model: Any) -> None:
    expected = model.score(TEXTS, tokenizer=small())
    head, *rows = run("\n".join(TEXTS)).out.splitlines()
    assert head.split() == ["line", "tokens", "log-likelihood", "perplexity", "bits", "per", "byte"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4", "all"]
    assert [row.split()[1] for row in rows[:4]] == [str(len(score.token_ids)) for score in expected]


def test_json_lines_are_texts_ids_and_continuations(run: Any, model: Any) -> None:
    lines: list[Any] = [{"prompt": one, "completion": two} for one, two in PAIRS]
    lines += [{"text": TEXTS[0]}, {"token_ids": [4, 5, 6]}, {"prompt": [4], "completion": [5, 6]}]
    contexts, continuations = zip(*PAIRS, strict=True)
    expected = model.score(contexts, continuations, tokenizer=small())
    expected += model.score(TEXTS[0], tokenizer=small()) + model.score([4, 5, 6]) + model.score([[4]], [[5, 6]])
    found = json.loads(run("\n".join(map(json.dumps, lines)), "--json").out)
    assert same(found["documents"], expected)


def test_the_whole_file_is_one_text_in_windows_without_a_prefix(run: Any, model: Any) -> None:
    text = "\n".join(TEXTS)
    options = ("--whole", "--max-length", 9, "--stride", 4, "--no-prefix", "--batch-size", 2)
    found = json.loads(run(text + "\n", "--json", *options).out)
    expected = model.score(text, tokenizer=small(), max_length=9, stride=4, prefix_token_id=None)
    assert same(found["documents"], expected) and found["total"]["tokens"] == len(small().encode(text)) - 1


def test_an_end_of_text_is_a_token_where_it_is_allowed(run: Any) -> None:
    text = "one<|endoftext|>two"
    plain, special = (json.loads(run(text, "--json", *more).out)["total"] for more in ((), ("--allow-special",)))
    assert plain["tokens"] == len(small().encode(text))
    assert special["tokens"] == len(small().encode(text, allow_special=True)) < plain["tokens"]
    assert special["bytes"] == plain["bytes"] == len(text)


@pytest.mark.parametrize(
    ("stdin", "options", "message"),
    [
        ('{"text": "a"}\n{"token_ids": [300]}', (), r"stdin: line 2: token_ids\[0\]: no such token"),
        ("a", ("--max-length", "25"), "max_length: out of range"),
        ("a", ("--stride", "0"), "stride: out of range"),
        ('{"token_ids": [1]}', ("--no-prefix",), "stdin: no token to score"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_model_is_loaded(
    run: Any, wing: Wing, monkeypatch: pytest.MonkeyPatch, stdin: str, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("gptj.command.opened_model.OpenedModel.load", lambda *a: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        run(stdin, *options)


def test_tokens_are_for_json(run: Any) -> None:
    with pytest.raises(click.UsageError, match="--tokens"):
        run("a", "--tokens")
