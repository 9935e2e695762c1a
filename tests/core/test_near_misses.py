"""What is nearly right: a misspelt folder, dtype, field or argument gets the one that is meant, whoever reads it."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import gptj
from gptj import backends, pretrained
from gptj.adapters import AdapterConfig
from gptj.adapters.files import read_adapter, write_adapter
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.command import main as cli
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name
from gptj.errors import ConfigError, GPTJError, InputError, MissingFileError
from gptj.generation import GenerationConfig
from gptj.generation.config import UNSUPPORTED
from gptj.parity.revealing import revealing_fill
from gptj.paths.hub import HubPlace
from gptj.pretrained.loading import LOADING_ARGUMENTS
from gptj.text import tokenizer_calls
from gptj.text.tokenizer_calls import set_from_pretrained, take_call_arguments
from gptj.text.tokenizer_files import write_tokenizer_files

# ---- a folder that is not there


def opened(kind: str, path: Path) -> None:
    """Ask for a folder in one of the ways that there are."""
    if kind == "config":
        GPTJConfig.from_pretrained(path)
    elif kind == "generation config":
        GenerationConfig.from_pretrained(path)
    elif kind == "tokenizer":
        gptj.GPTJTokenizer.from_pretrained(path)
    elif kind == "weights":
        open_checkpoint(path)
    elif kind == "hub":
        HubPlace().locate(path)
    else:
        done = CliRunner().invoke(
            cli.gptj_command, [kind, str(path), *(["hi", "--backend", "pt"] if kind == "generate" else [])]
        )
        assert done.exception is not None
        raise done.exception


KINDS = ("config", "generation config", "tokenizer", "weights", "hub", "inspect", "verify", "generate", "plan")


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_folder_gets_the_neighbour_that_is_meant(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(backends, "require", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "verse").mkdir(parents=True)
    (tmp_path / "models" / "versed.txt").touch()
    with pytest.raises(MissingFileError, match=r"models/vers: no such .*Did you mean 'models/verse'\?"):
        opened(kind, Path("models/vers"))


@pytest.mark.parametrize("kind", ["config", "generation config", "weights", "verify", "generate"])
def test_a_folder_that_is_not_there_says_what_can_be_given(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "require", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=r"gpt-j-6b: no such .*folder, or a repository .* as OWNER/NAME"):
        opened(kind, Path("gpt-j-6b"))


TAKE_A_PATH = {
    "config": GPTJConfig.from_pretrained,
    "generation config": GenerationConfig.from_pretrained,
    "tokenizer": gptj.GPTJTokenizer.from_pretrained,
    "model": HubPlace().locate,
    "adapter": read_adapter,
    "config saved": GPTJConfig().save_pretrained,
    "generation config saved": GenerationConfig().save_pretrained,
    "tokenizer saved": lambda path: write_tokenizer_files(None, path),  # type: ignore[arg-type]
    "adapter saved": lambda path: write_adapter(path, AdapterConfig(), (), lambda row: row),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("door", TAKE_A_PATH)
@pytest.mark.parametrize("given", [None, "", b"verse", 3, ["verse"]])
def test_what_is_no_path_is_refused_by_name_at_every_door(door, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="directory: not a path"):
        TAKE_A_PATH[door](given)
    assert not [*tmp_path.iterdir()]


# ---- arguments that are misspelt


@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "temperature"), ("max_new_token", "max_new_tokens"), ("top_kk", "top_k"), ("xyzzy", None)],
)
def test_a_generation_config_says_which_field_is_meant(name, meant):
    with pytest.raises(ConfigError, match="no such field") as caught:
        GenerationConfig(**{name: 1})
    assert caught.value.where == repr(name)
    assert caught.value.hint == (None if meant is None else f"Did you mean {meant}?")


def test_a_generation_config_says_why_a_field_of_transformers_is_refused():
    for name, (default, reason) in UNSUPPORTED.items():
        for value in (default, "something else"):
            with pytest.raises(ConfigError) as caught:
                GenerationConfig(**{name: value})
            assert caught.value.where == name and reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("paddin", "padding"), ("truncaton", "truncation"), ("return_tensor", "return_tensors"), ("xyzzy", None)],
)
def test_a_tokenizers_call_says_which_argument_is_meant(name, meant):
    with pytest.raises(InputError, match="no such argument") as caught:
        take_call_arguments({name: True})
    assert caught.value.hint == (None if meant is None else f"Did you mean {meant}?")


def test_the_arguments_that_a_tokenizers_call_is_guessed_by_are_its_own():
    own = {*inspect.signature(gptj.GPTJTokenizer.__call__).parameters} - {"self", "further"}
    assert own <= {*tokenizer_calls._CALL_ARGUMENTS}


@pytest.mark.parametrize(("name", "meant"), [("paddin_side", "padding_side"), ("revison", "revision"), ("xyz", None)])
def test_opening_a_tokenizer_says_which_option_is_meant(name, meant):
    with pytest.raises(InputError, match="no such option") as caught:
        set_from_pretrained(None, {name: "left"})
    assert caught.value.hint == (None if meant is None else f"Did you mean {meant}?")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("dtyp", "dtype"), ("quantise", "quantize"), ("devicemap", "device_map"), ("revison", "revision"),
     ("torch_dtyp", "torch_dtype"), ("n_layr", "n_layer"), ("num_label", "num_labels"), ("xyzzy", None)],
)  # fmt: skip
def test_opening_a_model_says_which_argument_or_field_is_meant(name, meant, tmp_path):
    config = GPTJConfig(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
    write_checkpoint(tmp_path, config, revealing_fill(0))
    with pytest.raises(GPTJError, match=r"no such (argument|field)") as caught:
        pretrained.prepare("causal_lm", tmp_path, overrides={name: 1})
    assert caught.value.hint == (None if meant is None else f"Did you mean {meant}?")


def test_the_arguments_that_opening_is_guessed_by_are_its_own():
    source = (Path(gptj.__file__).parent / "pretrained" / "base.py").read_text()
    node = next(n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == "from_pretrained")
    own = {argument.arg for argument in node.args.kwonlyargs}
    assert "dtype" in own and own <= {*LOADING_ARGUMENTS}


# ---- dtypes


@pytest.mark.parametrize(
    ("said", "meant"),
    [("fp16", "float16"), ("half", "float16"), ("BF16", "bfloat16"), ("Float32", "float32"), ("double", "float64"),
     ("int8", None), ("float8_e4m3fn", None), ("complex64", None)],
)  # fmt: skip
def test_a_dtypes_nickname_gets_the_dtype_that_is_meant(said, meant):
    with pytest.raises(InputError, match="no parameter dtype") as caught:
        dtype_name(said)
    assert caught.value.hint == (None if meant is None else f"Did you mean {meant}?")
