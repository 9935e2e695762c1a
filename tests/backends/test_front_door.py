"""A wing is all that a script needs: README's ten lines change in one word, and what they print is short."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_samples import small
from wings import Wing

import gptj
from gptj.errors import InputError

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def spoken(folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer beside it."""
    path = Path(shutil.copytree(folder(vocab_size=300, n_layer=2), tmp_path_factory.mktemp("spoken") / "gpt-j-6b"))
    small().save_pretrained(path)
    return path


def ten_lines() -> str:
    """README's first code block in Python."""
    found = re.search(r"## Pick a backend\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readmes_ten_lines_change_in_one_word(
    wing: Wing, spoken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(spoken.parent)
    code = ten_lines()
    assert code.count("gptj.pt ") == 1 and len(code.strip().splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(code.replace("gptj.pt ", f"gptj.{wing.name} "), names)
    assert wing.numpy(names["logits"]).shape[2] == 300
    ids = [int(i) for i in wing.numpy(names["tokens"])[0]]
    assert capsys.readouterr().out == small().decode(ids) + "\n"


def test_the_wing_has_the_cores_names(wing: Wing) -> None:
    for name in gptj.__all__:
        own = getattr(wing.module, name)
        assert own is getattr(gptj, name) or issubclass(own, getattr(gptj, name))
    with pytest.raises(AttributeError, match="Did you mean GPTJForCausalLM"):
        wing.module.GPTJForCasualLM  # noqa: B018
    with pytest.raises(ImportError, match="Did you mean GPTJForCausalLM"):
        exec(f"from gptj.{wing.name} import GPTJForCasualLM")


def test_the_wings_tokenizer_gives_its_own_tensors_unless_told(wing: Wing, spoken: Path) -> None:
    tokenizer = wing.module.GPTJTokenizer.from_pretrained(spoken)
    assert type(tokenizer) is wing.module.GPTJTokenizer and isinstance(tokenizer, gptj.GPTJTokenizer)
    native = type(wing.module.from_numpy(np.zeros(2, np.int32)))
    given = tokenizer(["to be", "or not to be"], padding=True)
    assert isinstance(given.input_ids, native) and given.input_ids.shape == given.attention_mask.shape
    assert tokenizer("to be", return_tensors=None).input_ids == small().encode("to be")
    assert isinstance(tokenizer("to be", return_tensors="np").input_ids, np.ndarray)
    assert small()("to be").input_ids == small().encode("to be")


def test_what_a_call_gives_shows_itself_in_a_few_words(wing: Wing, spoken: Path) -> None:
    model = wing.model("causal_lm").from_pretrained(spoken, dtype="float32")
    ids = np.array([[1, 2, 3]])
    output = wing.call(model, ids, labels=ids, use_cache=True, output_hidden_states=True, output_attentions=True)
    shown = repr(output)
    assert len(shown) < 400 and "logits=float32 (1, 3, 300)" in shown and re.search(r"loss=\d+\.\d+,", shown)
    assert "hidden_states=3 × float32 (1, 3, " in shown and "KVCache(2 layers, keys and values float32 (1, " in shown
    assert "2 of 8 tokens" not in repr(model.init_cache(1, 8)) and "0 of 8 tokens" in repr(model.init_cache(1, 8))
    made = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert len(repr(made)) < 300 and "scores=2 × float32 (1, 300)" in repr(made)
    assert "float32 (1, 3, 300)" in output._repr_html_()


def test_a_model_runs_on_the_device_that_is_said(wing: Wing, spoken: Path) -> None:
    ids = np.array([[1, 2, 3]])
    with wing.module.on_device("cpu") as loading:
        with loading:
            model = wing.model("causal_lm").from_pretrained(spoken, dtype="float32")
        assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
    with pytest.raises(InputError, match=r"device: .* sees no such device .*found mps"), wing.module.on_device("mps"):
        pass
    with pytest.raises(InputError, match="one of auto, cpu, cuda, mps"), wing.module.on_device("gpu"):
        pass


def test_a_model_shows_itself_and_no_address(wing: Wing, spoken: Path) -> None:
    shown = repr(wing.model("causal_lm").from_pretrained(spoken))
    assert "GPTJForCausalLM" in shown and not re.search(r"0x[0-9a-f]{6}", shown) and len(shown) < 2000
    assert "GPTJModel" in repr(wing.model("base").from_pretrained(spoken))
