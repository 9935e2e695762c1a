"""`gptj generate` in each wing: one text whether whole, streamed, batched or in turns, and how it ends."""

from __future__ import annotations

import functools
import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import LETTER, ended, endless_model, started
from pretended_hub import pretend_hub
from tokenizer_samples import small
from wings import Wing

from gptj.command.main import gptj_command
from gptj.errors import ConfigError, GPTJError, InputError

FEW = {"vocab_size": 300, "n_positions": 48, "n_layer": 1}
TEXT = "The quick"
TEXTS = ["The quick brown", "Whether 'tis", "naïve é", "won"]
GREEDY = ("--max-new-tokens", "9")
SAMPLED = (*GREEDY, "--seed", "5", "--temperature", "1.5", "--top-k", "40")


@pytest.fixture(scope="module")
def spoken(folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer beside it."""
    path = Path(shutil.copytree(folder(**FEW), tmp_path_factory.mktemp("spoken") / "model"))
    small().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def load(wing: Wing) -> Callable[..., Any]:
    """The wing's from_pretrained, which loads and compiles a folder's model once."""
    return functools.cache(wing.model("causal_lm").from_pretrained)


@pytest.fixture
def run(
    wing: Wing, spoken: Path, load: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """`gptj generate` in this process: what it prints on stdout."""
    monkeypatch.setattr(wing.model("causal_lm"), "from_pretrained", load)
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})

    def call(*arguments: Any, stdin: str = "", model: Path = spoken) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        words = [str(a) for a in ("generate", model, *arguments, "--backend", wing.name)]
        gptj_command.main(words, standalone_mode=False)
        return capsys.readouterr().out

    return call


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_the_models(wing: Wing, spoken: Path, load: Any, run: Any, options: tuple[str, ...]) -> None:
    model = load(spoken)
    how = {"do_sample": True, "temperature": 1.5, "top_k": 40, "seed": 5} if options is SAMPLED else {}
    ids = wing.numpy(model.generate([small().encode(TEXT)], max_new_tokens=9, **how))[0].tolist()
    record = json.loads(run(TEXT, "--json", *options))
    assert record["token_ids"] == ids
    assert record["prompt_tokens"] == len(small().encode(TEXT))
    shown = small().decode(ids[:-1] if ids[-1] == 215 else ids)
    assert record["text"] == shown and run(TEXT, *options) == shown + "\n"


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_is_whole(run: Any, options: tuple[str, ...]) -> None:
    assert run(TEXT, "--stream", *options) == run(TEXT, *options)


@pytest.mark.parametrize(
    "options", [GREEDY, SAMPLED, (*GREEDY, "--num-beams", "3")], ids=["greedy", "sampled", "beams"]
)
def test_a_batch_gives_what_each_prompt_gives_alone(run: Any, options: tuple[str, ...]) -> None:
    lines = "\n".join(TEXTS)
    batched = records(run("--prompts", "-", "--json", "--batch-size", 3, *options, stdin=lines))
    assert [r.pop("line") for r in batched] == [1, 2, 3, 4]
    seed = "--seed" in options
    alone = [
        json.loads(run(text, "--json", *options, *(("--seed", 5 + n) if seed else ()))) for n, text in enumerate(TEXTS)
    ]
    assert [r["token_ids"] for r in batched] == [r["token_ids"] for r in alone]
    assert [r["text"] for r in batched] == [r["text"] for r in alone]
    assert run("--prompts", "-", *options, stdin=lines) == "\n\n".join(r["text"] for r in alone) + "\n"


def test_a_batch_whose_length_counts_columns_is_one_by_one(run: Any) -> None:
    """max_length counts padding too, so a padded prompt would get fewer tokens."""
    options = ("--json", "--set", "max_length=20", "--set", "eos_token_id=null")
    lines = "\n".join(TEXTS)
    batched, alone = (records(run("--prompts", "-", "--batch-size", n, *options, stdin=lines)) for n in (4, 1))
    assert batched == alone and {len(r["token_ids"]) for r in batched} == {20}


def test_a_line_may_have_its_own_settings_seed_or_ids(run: Any) -> None:
    lines = [{"prompt": TEXT, "top_k": 40, "temperature": 1.5, "seed": 5}, {"token_ids": [4, 5], "max_new_tokens": 2}]
    sampled, ids = records(run("--prompts", "-", "--json", *GREEDY, stdin="\n".join(map(json.dumps, lines))))
    assert sampled["token_ids"] == json.loads(run(TEXT, "--json", *SAMPLED))["token_ids"] and sampled["seed"] == 5
    assert ids["token_ids"] == json.loads(run("--token-ids", "4 5", "--json", "--max-new-tokens", 2))["token_ids"]
    assert "seed" not in ids


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_turns_are_the_continuation_of_all_that_was_said(
    wing: Wing, spoken: Path, load: Any, run: Any, options: Any
) -> None:
    model, ids, answers = load(spoken), [], []
    for number, turn in enumerate(("The quick\n", " fox")):
        ids += small().encode(turn)
        how = {"do_sample": True, "temperature": 1.5, "top_k": 40, "seed": 5 + number} if options is SAMPLED else {}
        new = wing.numpy(model.generate([ids], max_new_tokens=9, **how))[0].tolist()[len(ids) :]
        new = [i for i in new if i != 215]
        answers.append(small().decode(new) + "\n")
        ids += new
    assert run("-i", *options, stdin="The quick\\\n\n fox\n\nnot read\n") == "".join(answers)


def test_a_context_that_is_full_is_said_or_forgets_its_oldest(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-i", "--max-new-tokens", 30, "--set", "eos_token_id=null")
    turns = "The quick\nfox\nand\n"
    with pytest.raises(InputError, match=r"the context is full .*at most 47 tokens .*Say --truncate left"):
        run(*options, stdin=turns)
    assert "The context is full: 48 of 48 tokens." in capsys.readouterr().err
    assert run(*options, "--truncate", "left", stdin=turns)


def test_a_prompt_that_is_too_long_is_refused_or_loses_its_beginning(run: Any) -> None:
    long = " ".join(TEXTS * 2)
    ids = small().encode(long)
    assert len(ids) > 48 - 9
    with pytest.raises(InputError, match="longer than the model's positions"):
        run(long, *GREEDY)
    cut = json.loads(run(long, "--json", "--truncate", "left", *GREEDY))
    kept = " ".join(map(str, ids[-39:]))
    assert cut["token_ids"] == json.loads(run("--token-ids", kept, "--json", *GREEDY))["token_ids"]


def test_T4_special_tokens_in_a_prompt_are_text_unless_allowed(run: Any) -> None:
    text = "<|endoftext|>a"
    plain, special = (json.loads(run(text, "--json", *GREEDY, *flag)) for flag in ((), ("--allow-special",)))
    assert special["token_ids"][: special["prompt_tokens"]] == small().encode(text, allow_special=True)
    assert plain["token_ids"][: plain["prompt_tokens"]] == small().encode(text)
    assert plain["prompt_tokens"] > special["prompt_tokens"]


def test_the_folders_generation_config_is_where_it_starts(run: Any, spoken: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(spoken, tmp_path / "own"))
    members = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_new_tokens": 4, "output_scores": True}
    members |= {"return_dict_in_generate": True, "eos_token_id": 215}
    (own / "generation_config.json").write_text(json.dumps(members))
    options = ("--temperature", "1.5", "--top-k", "40", "--seed", "3", "--max-new-tokens", "4")
    assert run(TEXT, "--seed", 3, model=own) == run(TEXT, *options)
    assert run(TEXT, "--set", "do_sample=false", "--max-new-tokens", 9, model=own) == run(TEXT, *GREEDY)


def test_a_stop_text_ends_it(run: Any) -> None:
    text = run(TEXT, *GREEDY, "--set", "eos_token_id=null")
    stop = text[len(TEXT) + 4 : len(TEXT) + 6]
    stopped = run(TEXT, *GREEDY, "--set", "eos_token_id=null", "--stop", stop, "--stop", "never")
    assert stopped.rstrip("\n").endswith(stop) and len(stopped) < len(text)


def test_several_sequences_of_a_prompt_are_an_object_each(run: Any) -> None:
    made = records(run(TEXT, "--json", *SAMPLED, "--set", "num_return_sequences=2"))
    assert [r["sequence"] for r in made] == [0, 1] and made[0]["token_ids"] != made[1]["token_ids"]


def test_an_assistant_changes_no_token(run: Any, spoken: Path) -> None:
    assert run(TEXT, *SAMPLED, "--assistant", spoken, "--set", "num_assistant_tokens=3") == run(TEXT, *SAMPLED)


def test_a_folder_without_a_tokenizer_takes_and_gives_ids(run: Any, folder: Callable[..., Path]) -> None:
    ids = ("--token-ids", "4,5 6", *GREEDY)
    whole = run(*ids, model=folder(**FEW))
    assert whole.startswith("4 5 6 ") and run(*ids, "--stream", model=folder(**FEW)) == whole
    with pytest.raises(GPTJError, match="tokenizer"):
        run(TEXT, model=folder(**FEW))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--set", "top_kk=3"), ConfigError, "'top_kk': no such field. Did you mean top_k"),
        (("--set", "early_stopping=true"), ConfigError, "early_stopping: has no effect without num_beams"),
        (("--set", "output_scores=true"), ConfigError, "output_scores: has no effect on the command line"),
        (("--seed", "-1"), InputError, "seed: no such seed"),
        (("--num-beams", "2", "--stream"), InputError, "num_beams: cannot be streamed"),
        (("--num-beams", "2", "-i"), InputError, "conversation: has one row"),
    ],
)
def test_what_cannot_be_is_named(run: Any, options: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(TEXT, *options)


# ---- how it ends


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("endless") / "model")


def test_G6_ctrl_c_ends_a_stream_and_what_was_made_is_out(wing: Wing, endless: Path) -> None:
    process = started(wing.name, endless, TEXT, "--stream", "--max-new-tokens", "2000")
    begun = process.stdout.read(len(TEXT) + 20)  # a piece is there as soon as it is made
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert begun.decode() == TEXT + 20 * LETTER and done.rc == 130 and "Traceback" not in done.err
    assert len(done.out) < 1980 and set(done.out.strip()) <= {LETTER}


def test_G6_ctrl_c_ends_an_answer_and_not_the_conversation(wing: Wing, endless: Path) -> None:
    process = started(wing.name, endless, "-i", "--max-new-tokens", "800")
    process.stdin.write(b"The quick\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b" fox\n")
    done = ended(process)
    cut, whole = done.out.splitlines()
    assert len(cut) < 799 and whole == 800 * LETTER and (done.rc, done.err) == (0, "")


def test_a_repository_is_continued_in_the_revision_that_is_named(run, spoken, tmp_path, monkeypatch):
    asked = pretend_hub(monkeypatch, tmp_path)
    shutil.copytree(spoken, tmp_path / "remote" / "someone" / "spoken")
    whole = run(TEXT, *GREEDY)
    assert run(TEXT, *GREEDY, "--revision", "float16", model="someone/spoken") == whole
    assert run(TEXT, *GREEDY, model="someone/spoken@float16") == whole
    assert {(call["repo_id"], call["revision"]) for call in asked} == {("someone/spoken", "float16")}
