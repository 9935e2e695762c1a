"""Ids that the tokenizer does not know, text that would steer a terminal, and where a model is prepared for decoding.

`gptj generate` runs here on a toy model, which needs no framework, with ten ids more than its tokenizer has.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizer_samples import gpt2, small
from toy_decoder import ToyDecoder, toy_config

from gptj.checkpoint import write_checkpoint
from gptj.command import main as cli
from gptj.command.opened_model import PAYS_FROM_TOKENS
from gptj.command.printing import write_text
from gptj.errors import CheckpointWarning, InputError, TokenizerError, harmless
from gptj.generation import Generates, known_tokens_only
from gptj.generation.stopping import decode_with
from gptj.parity.revealing import revealing_fill
from gptj.text.tokenizer import GPTJTokenizer

UNKNOWN = 305
PROMPT = "The quick"


# ---- the tokenizer


def test_an_unknown_id_is_refused_unless_told():
    ids = [*small().encode("to be"), UNKNOWN]
    with pytest.raises(InputError, match=rf"token_ids\[{len(ids) - 1}\]: unknown token id.*0 to 299, found {UNKNOWN}"):
        small().decode(ids)
    with pytest.raises(InputError, match="unknown token id"):
        small().stream().push(ids)
    with pytest.raises(InputError, match="unknown token id"):
        small().batch_decode([ids])


@pytest.mark.parametrize(("unknown", "shown"), [("show", "<|305|>"), ("replace", "\ufffd")])
def test_an_unknown_id_is_shown_or_replaced_as_told(unknown: Any, shown: str):
    ids = [UNKNOWN, *small().encode("naïve 🤗"), UNKNOWN, *small().encode("!")]
    text = f"{shown}naïve 🤗{shown}!"
    assert small().decode(ids, unknown=unknown) == text
    assert small().decode(np.array(ids), unknown=unknown, skip_special_tokens=True) == text
    assert small().batch_decode([ids, ids[:1]], unknown=unknown) == [text, shown]
    stream = small().stream(unknown=unknown)
    assert "".join(stream.push([one]) for one in ids) + stream.finish() == text
    assert small().decode(UNKNOWN, unknown=unknown) == shown


@pytest.mark.parametrize("unknown", ["show", "replace"])
@pytest.mark.parametrize("wrong", [-1, 0.5, True, "1", None])
def test_what_is_no_token_id_is_refused_all_the_same(unknown: Any, wrong: Any):
    with pytest.raises(InputError):
        small().decode([wrong], unknown=unknown)


@pytest.mark.parametrize("wrong", ["skip", "", None, True])
def test_another_word_for_unknown_is_refused(wrong: Any):
    for call in (small().decode, small().batch_decode):
        with pytest.raises(InputError, match="unknown: no such choice"):
            call([], unknown=wrong) if call == small().decode else call([[]], unknown=wrong)
    with pytest.raises(InputError, match="unknown: no such choice"):
        small().stream(unknown=wrong)


def test_gpt2s_vocabulary_in_gptjs_embedding_is_the_normal_case():
    tokenizer = GPTJTokenizer.gpt2(extra_tokens=False)
    assert tokenizer.decode([3290, 50300, 50399], unknown="show") == " dog<|50300|><|50399|>"
    assert gpt2().decode([50300], unknown="show") == gpt2().decode([50300])


def test_stop_strings_take_an_unknown_id_for_a_character_that_is_no_text():
    decode = decode_with(small())
    assert decode is not None and decode([UNKNOWN]) == "\ufffd"
    assert decode_with(None) is None
    others = SimpleNamespace(decode=lambda ids: "of another library")
    assert decode_with(others)([1]) == "of another library"  # type: ignore[misc]


def test_only_known_tokens_keeps_what_it_is_told_to():
    logits = np.zeros((2, 6))
    masked = known_tokens_only(3, but=[1, 4])(np.zeros((2, 1), np.int64), logits)
    assert np.isinf(masked).tolist() == [[False, False, False, True, False, True]] * 2
    assert not np.isinf(logits).any()


# ---- gptj generate


class Toy(Generates[Any]):
    """A model of the toy decoder's, that notes how it was loaded."""

    placement = None

    def __init__(self, dtype: str = "float32") -> None:
        self.config = toy_config(vocab_size=310)
        self.dtype, self.fast_path, self.prepared = np.dtype(dtype), None, False

    def _decoder(self, batch: int, capacity: int) -> Any:
        return ToyDecoder(self.config, batch, capacity)

    def _host(self, array: Any) -> Any:
        return np.asarray(array)

    def _native(self, array: Any) -> Any:
        return array

    def prepare_for_inference(self) -> None:
        self.prepared = True


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A folder with a tokenizer of 300 tokens beside a model of 310, which loves the 306th."""
    folder = write_checkpoint(tmp_path / "toy", toy_config(vocab_size=310), revealing_fill(0))
    small().save_pretrained(folder)
    bias = [[[UNKNOWN], 1000.0], [small().encode("n"), 500.0]]
    (folder / "generation_config.json").write_text(json.dumps({"sequence_bias": bias}))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the toy backend was asked: devices, loads with their options, and the models."""
    asked: list[Any] = []

    @contextlib.contextmanager
    def on_device(name: str) -> Any:
        asked.append(name)
        yield contextlib.nullcontext()

    def from_pretrained(directory: Any, **options: Any) -> Toy:
        asked.extend((options, Toy(options.get("param_dtype", "float32"))))
        return asked[-1]

    model = SimpleNamespace(from_pretrained=from_pretrained)
    backend = SimpleNamespace(GPTJForCausalLM=model, on_device=on_device, to_numpy=np.asarray)
    monkeypatch.setattr("gptj.command.opened_model.gptj.backend", lambda name: backend)
    monkeypatch.setattr("gptj.command.opened_model.choose_backend", lambda name: name or "pt")
    monkeypatch.setattr(cli, "ENVIRONMENT", {})
    return asked


@pytest.fixture
def run(spoken: Path, calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*words: Any, stdin: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        cli.gptj_command.main(["generate", str(spoken), *map(str, words)], standalone_mode=False)
        return capsys.readouterr().out

    return call


FEW = ("--max-new-tokens", "3")


def test_the_command_line_keeps_to_what_the_tokenizer_knows(run: Any):
    assert run(PROMPT, *FEW) == PROMPT + "nnn\n"
    assert json.loads(run(PROMPT, "--json", *FEW))["token_ids"][-3:] == 3 * small().encode("n")
    assert run(PROMPT, "--stream", *FEW) == PROMPT + "nnn\n"
    assert run(PROMPT, "--num-beams", "2", *FEW) == PROMPT + "nnn\n"


@pytest.mark.parametrize("ways", [(), ("--stream",), ("--stop", "never here"), ("--stream", "--stop", "<|3")])
def test_an_unknown_id_that_was_made_is_shown_and_nothing_is_lost(run: Any, ways: tuple[str, ...]):
    assert run(PROMPT, "--any-token", *FEW, *ways) == PROMPT + 3 * "<|305|>" + "\n"


def test_the_json_has_the_number_and_the_text_of_an_unknown_id(run: Any):
    record = json.loads(run(PROMPT, "--any-token", "--json", *FEW))
    assert record["token_ids"][-3:] == [UNKNOWN] * 3 and record["text"].endswith(3 * "<|305|>")


def test_a_stop_string_is_found_beside_unknown_ids(run: Any):
    bias = json.dumps([[[UNKNOWN], -1000.0], [[UNKNOWN + 1], -1000.0], [small().encode("n"), 500.0]])
    made = run(PROMPT, "--any-token", "--stop", "nn", "--set", f"sequence_bias={bias}", "--max-new-tokens", 9)
    assert made == PROMPT + "nn\n"


def test_unknown_ids_of_a_prompt_are_shown_too(run: Any):
    assert run("--token-ids", f"{UNKNOWN} 1", "--stream", *FEW).startswith("<|305|>")


def test_turns_keep_to_the_known_tokens_and_show_others(run: Any):
    assert run("-i", *FEW, stdin="The\n\n") == "nnn\n"
    assert run("-i", "--any-token", *FEW, stdin="The\n\n") == 3 * "<|305|>" + "\n"


def test_an_eos_beyond_the_tokenizer_still_ends_a_text(run: Any):
    assert run(PROMPT, "--set", f"eos_token_id={UNKNOWN}", *FEW) == PROMPT + "\n"


# ---- prepared where it pays, and where it runs


@pytest.mark.parametrize(
    ("backend", "options", "inference", "prepared"),
    [
        ("tf", (), True, False),
        ("tf", ("--dtype", "bfloat16"), True, False),
        ("pt", ("--max-new-tokens", PAYS_FROM_TOKENS - 30), False, False),
        ("pt", ("--max-new-tokens", PAYS_FROM_TOKENS - 30, "--quantize", "int8"), True, False),
        ("flax", (), False, True),
        ("flax", ("--dtype", "float64"), False, True),
        ("flax", ("--dtype", "float16"), False, False),
    ],
)
def test_the_fast_path_is_taken_where_it_pays(
    run: Any, calls: list[Any], backend: str, options: Any, inference, prepared
):
    run(PROMPT, "--backend", backend, *FEW[: 0 if "--max-new-tokens" in options else 2], *options)
    _, given, model = calls
    assert (given.get("inference", False), model.prepared) == (inference, prepared)


@pytest.mark.parametrize(("prompts", "inference"), [(1, False), (3, True)])
def test_packing_pays_over_all_prompts(run: Any, calls: list[Any], prompts: int, inference: bool):
    lines = "\n".join([PROMPT] * prompts)
    run("--prompts", "-", "--max-new-tokens", PAYS_FROM_TOKENS // 2, stdin=lines)
    assert calls[1].get("inference", False) == inference
    calls.clear()
    run("--prompts", "-", "--max-new-tokens", PAYS_FROM_TOKENS // 2, "--batch-size", prompts, stdin=lines)
    assert "inference" not in calls[1]  # a batch is a step, however many rows it has


@pytest.mark.parametrize(
    ("options", "device"),
    [((), "auto"), (("--device", "cpu"), "cpu"), (("--device", "cuda"), "cuda"), (("--quantize", "int4"), "cpu")],
)
def test_the_model_is_loaded_on_the_device_that_is_asked_for(run: Any, calls: list[Any], options: Any, device: str):
    run(PROMPT, *FEW, *options)
    assert calls[0] == device


@pytest.mark.parametrize("backend", ["tf", "flax"])
def test_pytorch_alone_quantizes(run: Any, calls: list[Any], backend: str):
    with pytest.raises(InputError, match="PyTorch alone quantizes"):
        run(PROMPT, "--quantize", "int8", "--backend", backend)
    assert calls == []  # nothing was loaded for it


# ---- text on a terminal


STEERS = {
    "ESC": "\x1b[31mred\x1b[0m", "title": "\x1b]0;title\x07", "C1": "\x9b31m", "CR": "safe\rgone", "bell": "\a",
    "backspace": "ab\b\bcd", "delete": "\x7f", "NUL": "\0", "lines": "\u2028\u2029\x85", "override": "\u202egnp.exe",
    "isolate": "\u2066x\u2069", "form feed": "\f\v",
}  # fmt: skip


@pytest.mark.parametrize("text", STEERS.values(), ids=list(STEERS))
def test_what_steers_a_terminal_is_escaped(text: str):
    shown = harmless(text)
    assert shown.isprintable() and "\\" in shown


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "two\nlines\tand a tab",
        "naïve Ünïcode",
        "👩‍👩‍👧",
        "שלום عليكم",
        "\\x1b",
        "",
        "e\u0301",
        "\u3000",
        "\u00a0",
    ],
)
def test_all_other_text_stays_as_it_is(text: str):
    assert harmless(text) == text


def test_text_is_escaped_on_a_terminal_and_raw_in_a_pipe(monkeypatch: pytest.MonkeyPatch):
    text = "a\x1b[2Jb\n"
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        write_text(text)
        shown = os.read(master, 100)
    os.close(master)
    assert shown == b"a\\x1b[2Jb\r\n"
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    write_text(text)
    assert pipe.getvalue() == text


def test_token_ids_need_no_tokenizer(run: Any, spoken: Path):
    """One that cannot be used is said, and ids are printed; a text is refused by name."""
    settings = spoken / "tokenizer_config.json"
    before = settings.read_bytes()
    settings.write_text('{"tokenizer_class": "LlamaTokenizer"}')
    try:
        with pytest.warns(CheckpointWarning, match=r"the tokenizer is not used.*tokenizer_class"):
            assert run("--token-ids", "1 2", *FEW).startswith("1 2 ")
        with pytest.raises(TokenizerError, match="tokenizer_class"):
            run(PROMPT, *FEW)
    finally:
        settings.write_bytes(before)
