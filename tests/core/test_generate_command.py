"""What `gptj generate` settles before it loads a model: every field can be set, and the folder's own come first."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from generation_fields import CALLS, TOKENS

from gptj import GPTJConfig
from gptj.command import generate as generate_command
from gptj.command.generate import Desk, Job, Request, batches
from gptj.command.main import _fields
from gptj.command.prompts import Prompt
from gptj.errors import ConfigError, GPTJError, InputError
from gptj.generation import GenerationConfig

OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stop_strings": ({}, {"stop_strings": "end"}),
    "remove_invalid_values": ({}, {"remove_invalid_values": True}),
    "renormalize_logits": ({}, {"renormalize_logits": True}),
    "bos_token_id": ({}, {"bos_token_id": 3}),
}
OF_THE_CALL = {
    "return_dict_in_generate",
    *(f.name for f in dataclasses.fields(GenerationConfig) if "output_" in f.name),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("gptj.command.generate.choose_backend", lambda name: "pt")
    monkeypatch.setattr("gptj.command.generate._tokenizer", lambda directory, config, needed: None)
    config = GPTJConfig(vocab_size=60, n_positions=24, n_embd=16, n_head=2, n_layer=1, rotary_dim=4, eos_token_id=3)
    (tmp_path / "config.json").write_text(config.to_json())
    return tmp_path


def desk(folder: Path, *, seed: int | None = 0, truncate: bool = False, **settings: Any) -> Desk:
    return Desk(Request(directory=folder, seed=seed, truncate=truncate, settings=settings), needs_tokenizer=False)


def ids(*numbers: int, **settings: Any) -> Prompt:
    return Prompt(token_ids=numbers, settings=settings)


def test_a_folder_that_is_not_there_is_named_before_a_backend_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj.command.generate.choose_backend", lambda name: pytest.fail("asked for a backend"))
    with pytest.raises(GPTJError, match="nowhere"):
        desk(Path("nowhere"))


def test_every_field_can_be_set_or_is_the_calls_own() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationConfig)} - {"extra"}
    assert TOKENS.keys() | CALLS.keys() | OTHERS.keys() | OF_THE_CALL == fields


@pytest.mark.parametrize("field", [*TOKENS, *CALLS, *OTHERS])
def test_a_field_is_set_as_its_name_and_value(folder: Path, field: str) -> None:
    without, changes = {**TOKENS, **CALLS, **OTHERS}[field]
    options = {k: v for k, v in (without | changes).items() if k not in ("one_token_prompt", "assistant")}
    said = _fields(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
    )
    expected = GenerationConfig(**{"eos_token_id": 3} | options)
    assert getattr(desk(folder, seed=None, **said).config, field) == getattr(expected, field)


@pytest.mark.parametrize("field", sorted(OF_THE_CALL))
def test_a_field_of_the_calls_output_is_refused(folder: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: has no effect on the command line"):
        desk(folder, **{field: True})


def test_the_command_line_is_over_the_folder_and_a_line_over_both(folder: Path) -> None:
    stored = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, max_length=20)
    (folder / "generation_config.json").write_text(stored.to_json())
    whole = desk(folder, temperature=0.7)
    assert (whole.config.temperature, whole.config.top_k, whole.config.max_length) == (0.7, 7, 20)
    job = whole.job(ids(5, temperature=0.9, max_new_tokens=3))
    assert (job.config.temperature, job.config.top_k, job.config.max_new_tokens) == (0.9, 7, 3)
    assert not whole.job(ids(5, do_sample=False)).config.do_sample


def test_it_is_greedy_unless_sampling_is_asked_for(folder: Path) -> None:
    assert desk(folder, seed=None).config.strategy == "greedy"
    assert desk(folder, seed=1).config.strategy == "sample"
    assert desk(folder, seed=None, top_p=0.9).config.strategy == "sample"
    assert desk(folder, seed=None, temperature=0).config.strategy == "greedy"
    assert desk(folder, seed=None, penalty_alpha=0.6, top_k=4).config.strategy == "contrastive"


def test_the_nth_prompt_draws_with_the_seed_plus_n(folder: Path) -> None:
    settled = desk(folder, seed=2**64 - 1, max_new_tokens=2)
    jobs = settled.jobs([ids(5), ids(5), Prompt(token_ids=(5,), seed=9)])
    assert [job.seed for job in jobs] == [2**64 - 1, 0, 9]


def test_G2_a_prompt_that_is_too_long_is_refused_before_anything_is_loaded_or_cut(folder: Path) -> None:
    long = ids(*range(4, 24))
    with pytest.raises(InputError, match=r"longer than the model's positions .*20 of the prompt \+ 9 new"):
        desk(folder, max_new_tokens=9).job(long)
    assert desk(folder, max_new_tokens=9, truncate=True).job(long).ids == [*range(9, 24)]
    assert desk(folder, max_length=20, truncate=True).job(long).ids == [*range(5, 24)]
    with pytest.raises(InputError, match="longer than the model's positions"):
        desk(folder, max_new_tokens=24, truncate=True).job(long)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(token_ids=(60,), file="f", line=3), r"^f: line 3: input_ids\[0\]\[0\]: no such token"),
        (Prompt(token_ids=(), file="f", line=3), r"^f: line 3: prompt: no token"),
        (Prompt(token_ids=(1,), seed=-1, file="f", line=3), r"^f: line 3: seed: no such seed .*found -1"),
        (Prompt(token_ids=(1,), seed=True, file="f", line=3), r"^f: line 3: seed: no such seed"),
        (Prompt(token_ids=(1,), settings={"eos_token_id": 60}), r"^eos_token_id: no such token"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named_with_its_line(folder: Path, prompt: Prompt, message: str) -> None:
    with pytest.raises(InputError, match=message):
        desk(folder, max_new_tokens=2).job(prompt)


def test_a_batch_has_one_config_and_prompts_that_follow_each_other(folder: Path) -> None:
    prompts = [ids(1), ids(2, 3), ids(4), ids(5, max_new_tokens=3), ids(6)]

    def sizes(size: int, **settings: Any) -> list[list[int]]:
        jobs: list[Job] = desk(folder, **settings).jobs(prompts)
        return [[job.ids[0] for job in batch] for batch in batches(jobs, size)]

    assert sizes(2, max_new_tokens=2) == [[1, 2], [4], [5], [6]]
    assert sizes(9, max_new_tokens=2) == [[1, 2, 4], [5], [6]]
    assert sizes(9, max_new_tokens=2, min_length=4) == [[1], [2], [4], [5], [6]]


def test_what_a_framework_would_import_for_nothing_is_hidden_for_its_import_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is there already is left alone."""
    monkeypatch.setitem(generate_command.UNUSED, "pt", ("jsonless", "json.tool", "os"))
    monkeypatch.delitem(sys.modules, "json.tool", raising=False)
    seen = []

    def backend(name: str) -> Any:
        for module in ("json.tool", "os"):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                seen.append(module)
        return SimpleNamespace(on_device=lambda device: contextlib.nullcontext(contextlib.nullcontext()))

    monkeypatch.setattr("gptj.backend", backend)
    with desk(folder).at_work():
        importlib.import_module("json.tool")
    assert seen == ["json.tool"] and "jsonless" not in sys.modules and sys.modules["os"] is not None
    monkeypatch.setattr("gptj.backend", lambda name: {}[name])
    with pytest.raises(KeyError), desk(folder).at_work():
        pass
    assert "jsonless" not in sys.modules
