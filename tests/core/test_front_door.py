"""The front door: what pip installs, which names a module has, what people type, and what large objects show."""

from __future__ import annotations

import ast
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import pydoc
import re
import subprocess
import sys
import tomllib
import typing
import unittest.mock
from pathlib import Path
from types import ModuleType
from typing import Any

import gptj_conversion
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from generation_fields import TOKENS

import gptj
from gptj import backends
from gptj.backends import BACKENDS, DISTRIBUTION, EXTRAS, EXTRAS_BESIDE_ALL, install_line, likely_backend
from gptj.calls.outputs import CausalLMOutputWithPast, KVCache
from gptj.calls.prepared import check_device, check_quantize
from gptj.command import main as cli
from gptj.command.called import CALLED
from gptj.command.doctor import examine
from gptj.command.options import BackendsChoice
from gptj.config import GPTJConfig
from gptj.config.schema import HEADS
from gptj.errors import BackendAttributeError, BackendError, InputError
from gptj.generation import GenerateOutput, GenerationConfig, TokenStep
from gptj.generation.fields import CallFields, GenerationFields
from gptj.parity.report import Measure, ParityReport

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = [path for package in (gptj, gptj_conversion) for path in sorted(Path(package.__file__).parent.rglob("*.py"))]
MODELS = tuple(HEADS.values())


# ---- the distribution


def test_the_distribution_is_called_as_the_hints_say():
    assert PROJECT["name"] == DISTRIBUTION == "gptj-multibackend"


def test_every_extra_that_the_hints_name_is_one_and_all_has_them_all():
    extras = PROJECT["optional-dependencies"]
    assert extras.keys() >= (EXTRAS | EXTRAS_BESIDE_ALL).keys()
    assert extras["all"] == [f"{DISTRIBUTION}[{','.join(EXTRAS)}]"]
    own = [one for group in extras.values() for one in group if one.startswith("gptj")]
    assert own and all(one.startswith(f"{DISTRIBUTION}[") for one in own)


def test_no_other_file_spells_an_install_line():
    spelt = ["/".join(path.parts[-3:]) for path in SOURCES if re.search(r"gptj\[\w|pip install", path.read_text())]
    assert spelt == ["gptj/errors/__init__.py"]


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_the_pages_install_by_that_name(page):
    assert not re.search(r"(?<![\w-])gptj\[\w", (ROOT / page).read_text())


def test_the_readme_has_a_row_for_every_extra():
    text = (ROOT / "README.md").read_text()
    assert all(f"| `{DISTRIBUTION}[{extra}]` |" in text for extra in (*EXTRAS, "all"))


@pytest.mark.parametrize("module", EXTRAS["convert"])
def test_what_convert_brings_is_imported_somewhere(module):
    imports = {
        name.split(".")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [])
    }
    assert module in imports
    brought = [re.split(r"[<>=]", one)[0] for one in PROJECT["optional-dependencies"]["convert"]]
    assert brought == list(EXTRAS["convert"])


# ---- names


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frameworks that are installed, and none that is chosen."""
    monkeypatch.delenv("GPTJ_BACKEND", raising=False)
    monkeypatch.setattr(backends, "installed_backends", lambda: ("pt", "flax"))


@pytest.fixture
def wing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One framework that is installed: its wing."""
    monkeypatch.delenv("GPTJ_BACKEND", raising=False)
    module = ModuleType("gptj.pt")
    for name in MODELS:
        setattr(module, name, type(name, (), {}))
    monkeypatch.setattr(gptj, "backend", lambda: module)
    monkeypatch.setattr(backends, "installed_backends", lambda: ("pt",))
    return module


@pytest.mark.usefixtures("several")
def test_everything_that_looks_through_the_module_can():
    assert "class GPTJConfig" in pydoc.plain(pydoc.render_doc(gptj))
    assert dict(inspect.getmembers(gptj))["GPTJConfig"] is GPTJConfig
    assert unittest.mock.create_autospec(gptj).GPTJConfig is not None
    assert not set(MODELS) & set(dir(gptj))
    assert not any(hasattr(gptj, name) for name in MODELS)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("name", MODELS)
def test_without_a_choice_both_ways_of_asking_say_how_to_choose(name):
    with pytest.raises(BackendAttributeError, match=r"none was chosen.*pt, flax.*GPTJ_BACKEND=pt"):
        getattr(gptj, name)
    with pytest.raises(BackendError, match=r"none was chosen.*pt, flax.*GPTJ_BACKEND=pt"):
        exec(f"from gptj import {name}")


def test_with_a_choice_the_module_has_the_backends_names(wing: ModuleType):
    assert set(MODELS) <= set(dir(gptj))
    assert gptj.GPTJForCausalLM is wing.GPTJForCausalLM
    from gptj import GPTJForCausalLM

    assert GPTJForCausalLM is wing.GPTJForCausalLM


def test_a_backend_that_cannot_be_imported_is_no_attribute_and_an_import_error(monkeypatch):
    def broken() -> None:
        raise ImportError("libcublas is missing")

    monkeypatch.setattr(gptj, "backend", broken)
    assert not hasattr(gptj, "GPTJModel")
    with pytest.raises(ImportError, match="libcublas is missing"):
        exec("from gptj import GPTJModel")


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("GPTJForCasualLM", "GPTJForCausalLM"),
        ("GPTJTokeniser", "GPTJTokenizer"),
        ("GPTJconfig", "GPTJConfig"),
        ("GenerationConfg", "GenerationConfig"),
        ("chekpoint", "checkpoint"),
        ("TFGPTJForCausalLM", "from gptj.tf import TFGPTJForCausalLM"),
        ("FlaxGPTJModel", "from gptj.flax import FlaxGPTJModel"),
    ],
)
def test_a_misspelt_name_gets_the_one_that_is_meant(misspelt, meant):
    with pytest.raises(AttributeError, match=meant):
        getattr(gptj, misspelt)
    with pytest.raises(ImportError, match=meant):
        exec(f"from gptj import {misspelt}")


def test_the_rooms_that_the_table_of_contents_names_are_there():
    """In a process of its own: here the rooms have long been imported."""
    named = re.search(r"^    (\w+(?:, \w+)+) +the rooms behind them", gptj.__doc__ or "", re.MULTILINE)
    assert named is not None
    asked = "; ".join(f"gptj.{room}" for room in [*named[1].split(", "), "errors", "generation"])
    frameworks = "{'torch', 'tensorflow', 'keras', 'jax', 'flax'} & {*sys.modules}"
    program = f"import sys, gptj; {asked}; assert not {frameworks}; gptj.tf"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'gptj' has no attribute 'tf'. Say import gptj.tf"


def test_names_like_none_of_ours_are_left_to_python():
    with pytest.raises(ImportError, match="cannot import name 'xyzzy'"):
        exec("from gptj import xyzzy")
    exec("from gptj import checkpoint, inputs, parity")  # submodules


@pytest.mark.parametrize("name", BACKENDS)
def test_a_wing_has_the_cores_public_names(name):
    tree = ast.parse((Path(gptj.__file__).parent / name / "__init__.py").read_text())
    node = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert {element.value for element in node.value.elts} >= {*gptj.__all__, "errors"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("pytorch", "pt"), ("torch", "pt"), ("PyTorch", "pt"), ("PT", "pt"), ("pytroch", "pt")),
        *(("tensorflow", "tf"), ("keras", "tf"), ("TF", "tf"), ("tensor-flow", "tf")),
        *(("jax", "flax"), ("Flax", "flax"), ("flx", "flax"), ("linen", "flax"), (" flax", "flax")),
        *(("onnx", None), ("", None), ("mxnet", None)),
    ],
)
def test_a_frameworks_name_gets_the_backend_that_is_meant(said, meant, monkeypatch):
    assert likely_backend(said) == meant
    if said:
        monkeypatch.setenv("GPTJ_BACKEND", said)
        with pytest.raises(BackendError, match=f"GPTJ_BACKEND.*Did you mean {meant}" if meant else "no such backend"):
            gptj.backend()
        with pytest.raises(BackendError, match=f"Did you mean {meant}" if meant else "no such backend"):
            gptj.backend(said)


# ---- the command line


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.gptj_command, [*words])


def completions(*words: str, incomplete: str = "") -> list[str]:
    complete = ShellComplete(cli.gptj_command, {}, "gptj", "_GPTJ_COMPLETE")
    return [item.value for item in complete.get_completions([*words], incomplete)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "x", "hi", "--backend", "pytorch"), "'pytorch' is not one of pt, tf, flax. Did you mean pt?"),
        (("generate", "x", "hi", "--backend", "keras"), "Did you mean tf?"),
        (("generate", "x", "hi", "--backend", "jax"), "Did you mean flax?"),
        (("parity", "x", "--backends", "pt,tensorflow"), "Did you mean tf?"),
        (("demo", "--backends", "pt, torch"), "'torch' is not one of pt, tf, flax. Did you mean pt?"),
        (("convert", "a", "b", "--to", "msgpack"), "not one of safetensors, mesh, bin, flax, tf. Did you mean flax?"),
        (("convert", "a", "b", "--to", "pytorch"), "Did you mean bin?"),
        (("convert", "a", "b", "--to", "safetensor"), "Did you mean safetensors?"),
        (("inspect", "a", "--source-format", "h5"), "Did you mean tf?"),
        (("generate", "x", "hi", "--device", "gpu"), "'gpu' is not one of auto, cpu, cuda, mps. Did you mean cuda?"),
        (("generate", "x", "hi", "--dtype", "fp16"), "Did you mean float16?"),
        (("convert", "a", "b", "--dtype", "bf16"), "Did you mean bfloat16?"),
        (("convert", "a", "b", "--dtype", "half"), "Did you mean float16?"),
        (("parity", "x", "--dtype", "double"), "Did you mean float64?"),
        (("init", "x", "--dtype", "flaot32"), "Did you mean float32?"),
        (("convert", "a", "b", "--layout", "slm"), "Did you mean slim?"),
        (("generate", "x", "hi", "--quantize", "int-8"), "Did you mean int8?"),
        (("parity", "x", "y", "--path", "prepard"), "Did you mean prepared?"),
        (("parity", "record", "x", "--path", "compild"), "Did you mean compiled?"),
        (("parity", "matrix", "x", "--dtype", "double"), "Did you mean float64?"),
        (("generat", "x"), "No such command 'generat'. Did you mean generate?"),
        (("finetun",), "Did you mean finetune?"),
        (("parity", "recrod", "x"), "No such command or folder 'recrod'. Did you mean record?"),
        (("train", "x"), "No such command 'train'. Did you mean gptj finetune DIR DATA OUT?"),
        (("Chat",), "Did you mean gptj generate DIR --interactive?"),
        (("perplexty",), "Did you mean gptj score DIR FILE?"),
        (("version",), "Did you mean gptj --version?"),
        (("push",), "hf upload OWNER/NAME DIR"),
    ],
)
def test_a_name_that_people_type_gets_the_one_that_is_meant(words, said):
    done = run(*words)
    assert done.exit_code == 2 and said in " ".join(done.output.split())


def test_what_others_call_a_command_is_no_command_and_the_line_that_is_meant_can_be_typed():
    assert not CALLED.keys() & cli.COMMANDS.keys()
    lines = {line[1] for saying in CALLED.values() if (line := re.search(r"Did you mean gptj (.+)\?", saying))}
    assert len(lines) > 20
    for line in sorted(lines - {"--help", "--version"}):
        words = line.split()
        options = {word for word in words if word.startswith("-")}
        done = run(*itertools.takewhile(lambda word: word.islower() and word[0] != "-", words), "--help")
        assert done.exit_code == 0 and all(name in done.output for name in options), line


def test_blanks_in_a_list_of_backends_are_nothing():
    assert BackendsChoice.convert("pt, flax", None, None) == ("pt", "flax")
    assert BackendsChoice.convert(" tf ,pt", None, None) == ("tf", "pt")


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (("convert", "a", "b", "--to"), "", ["safetensors", "mesh", "bin", "flax", "tf"]),
        (("convert", "a", "b", "--source-format"), "t", ["tar", "tf"]),
        (("generate", "a", "--backend"), "", ["pt", "tf", "flax"]),
        (("parity", "a", "--backends"), "pt,", ["pt,tf", "pt,flax"]),
        (("demo", "--backends"), "pt,f", ["pt,flax"]),
        (("generate", "a", "--device"), "c", ["cpu", "cuda"]),
        ((), "do", ["doctor"]),
    ],
)
def test_values_are_completed(words, incomplete, expected):
    assert completions(*words, incomplete=incomplete) == expected


def test_help_lists_the_values_and_has_headings():
    text = run("convert", "--help").output
    assert "[safetensors|mesh|bin|flax|tf]" in text and "[safetensors|mesh|tar|bin|flax|tf]" in text
    assert [line for line in text.splitlines() if re.fullmatch(r"\w[\w ]*:", line)] == [
        *("Source:", "Result:", "Checks:", "Running:", "Other options:")
    ]
    assert "_GPTJ_COMPLETE=bash_source" in run("--help").output


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_debug_may_stand_after_every_command(command):
    assert "--debug" in run(command, "--help").output
    assert "No such option" not in run(command, "--debug", "--help").output


def test_the_line_for_completion_can_be_copied_at_any_width():
    for columns in (50, 80, 120):
        text = CliRunner().invoke(cli.gptj_command, ["--help"], terminal_width=columns).output
        assert '    eval "$(_GPTJ_COMPLETE=bash_source gptj)"' in text.splitlines()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_help_names_no_argument_that_its_command_has_not(command):
    text = run(command, "--help").output
    usage, *rest = text.splitlines()
    assert {*re.findall(r"\b(?:SRC|DST|DIR|PATH|PROMPT)\b", "\n".join(without_metavars(rest)))} <= {*usage.split()} | {
        word.strip("[]") for word in usage.split()
    }


def without_metavars(lines: list[str]) -> list[str]:
    """Help without the left column of its options, where a value's kind stands."""
    return [re.sub(r"^  -.*?(?:  |$)", "", line) for line in lines]


@pytest.mark.parametrize("debug", ["--debug", None])
def test_debug_shows_the_traceback_wherever_it_stands(debug, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gptj", "inspect", "nowhere", *([debug] if debug else [])])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setattr("warnings.showwarning", lambda *arguments, **options: None)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1 and ("Traceback" in capsys.readouterr().err) == (debug is not None)


def test_pytorch_alone_quantizes_and_the_error_says_so():
    with pytest.raises(InputError, match="PyTorch alone quantizes"):
        check_quantize("int8", ())
    with pytest.raises(InputError, match=r"expected None or int8\b.*found 'int9'\)$"):
        check_quantize("int9", ("int8",))


def test_a_device_that_is_not_there_is_named():
    there = {"cuda": False, "mps": False, "cpu": True}
    check_device("auto", there, "PyTorch 2")
    check_device("cpu", there, "PyTorch 2")
    with pytest.raises(InputError, match=r"PyTorch 2 sees no such device \(expected cpu, found cuda\)"):
        check_device("cuda", there, "PyTorch 2")
    with pytest.raises(InputError, match=r"one of auto, cpu, cuda, mps.*Did you mean cuda"):
        check_device("gpu", there, "PyTorch 2")


def test_doctor_says_what_the_machine_and_the_extras_are(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    report = examine()
    assert report.cores >= 1 and report.threads["OMP_NUM_THREADS"] == "3"
    assert report.memory_bytes is None or report.memory_bytes >= (report.free_memory_bytes or 0) > 0
    assert report.extras.keys() == (EXTRAS | EXTRAS_BESIDE_ALL).keys() - BACKENDS.keys()
    lines = report.lines()
    assert {"threads", "memory", "devices", "[hub]", "[vocab]", "[convert]", "[eval]", "[onnx]"} <= lines.keys()
    json.dumps(report.as_dict())
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "h5py" else found(name))
    assert examine().lines()["[convert]"] == f"not installed: {install_line('convert')}"


@pytest.mark.parametrize(
    ("card", "shown"),
    [
        ("A, 80 MiB, 70 MiB, 9.0, 570.1", "A, 80 MiB (70 MiB free), driver 570.1, best in bfloat16"),
        ("A, 80 MiB, 70 MiB, 8.0, 570.1", "A, 80 MiB (70 MiB free), driver 570.1, best in bfloat16"),
        ("A, 80 MiB, 70 MiB, 7.5, 570.1", "A, 80 MiB (70 MiB free), driver 570.1, best in float16"),
        ("A, 80 MiB, 70 MiB, 3.7, 470.1", "A, 80 MiB (70 MiB free), driver 470.1, best in float32"),
        ("A, 80 MiB, 70 MiB, [N/A], 470.1", "A, 80 MiB (70 MiB free), driver 470.1"),
        ("A, 80 MiB", "A, 80 MiB"),
    ],
)
def test_doctor_says_which_card_how_much_memory_and_which_dtype(card, shown, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    known = 'case "$1" in *compute_cap*) exit 2;; esac\n' if card == "A, 80 MiB" else ""  # an older one
    program.write_text(f"#!/bin/sh\n{known}echo '{card}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    report = examine()
    assert report.devices[0] == shown and report.lines()["devices"] == f"the CPU; {shown}"
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu" if name == "torch" else version(name))
    assert [one for one in examine().warnings if "a GPU is here, and PyTorch is installed without it" in one]


def test_doctor_says_that_there_is_no_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    program.chmod(0o755)
    for path in (str(tmp_path), "/bin"):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr("gptj.command.doctor._nodes", lambda: iter(()))
        assert examine().lines()["devices"] == "the CPU; no GPU that the system shows"
        assert not [one for one in examine().warnings if "a GPU is here" in one]


# ---- dtypes


@pytest.mark.parametrize("said", ["torch", "Flax ", "pt,tf"])
def test_doctor_warns_of_a_chosen_backend_that_there_is_not(said, monkeypatch):
    monkeypatch.setenv("GPTJ_BACKEND", said)
    assert [one for one in examine().warnings if "GPTJ_BACKEND: no such backend" in one]


def test_doctor_warns_of_a_chosen_backend_whose_framework_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    monkeypatch.setenv("GPTJ_BACKEND", "pt")
    assert [one for one in examine().warnings if "PyTorch is not installed" in one and install_line("pt") in one]


# ---- what large objects show


def output() -> CausalLMOutputWithPast[Any]:
    keys = tuple(np.zeros((1, 4, 3, 8), np.float32) for _ in range(28))
    states = tuple(np.zeros((1, 3, 64), np.float32) for _ in range(29))
    return CausalLMOutputWithPast(
        loss=np.float32(2.25), logits=np.zeros((1, 3, 50400), np.float32), past_key_values=KVCache(keys, keys, 3),
        hidden_states=states, attentions=(np.zeros((1, 2)), np.zeros((1, 3))),
    )  # fmt: skip


def test_an_output_shows_dtypes_and_shapes():
    assert repr(output()) == (
        "CausalLMOutputWithPast(loss=2.25, logits=float32 (1, 3, 50400), "
        "past_key_values=KVCache(28 layers, keys and values float32 (1, 4, 3, 8), growing), "
        "hidden_states=29 × float32 (1, 3, 64), attentions=2: float64 (1, 2), ..., float64 (1, 3))"
    )
    assert "<td" in output()._repr_html_() and "nowrap" in output()._repr_html_()  # 7.3e-05 in a narrow column
    assert "float32 (1, 3, 50400)" in output()._repr_html_()


def test_a_cache_shows_how_full_it_is():
    keys = tuple(np.zeros((2, 4, 32, 8), np.float16) for _ in range(3))
    assert repr(KVCache(keys, keys, 5, fixed=True)) == (
        "KVCache(3 layers, keys and values float16 (2, 4, 32, 8), 5 of 32 tokens)"
    )
    assert repr(KVCache((), (), 0)).startswith("KVCache(0 layers")


def test_what_generation_hands_back_is_short():
    logits = tuple(np.zeros((1, 50400), np.float32) for _ in range(20))
    made = GenerateOutput(np.zeros((1, 26), np.int64), lengths=np.array([26]), seeds=(1,), scores=logits)
    assert repr(made) == (
        "GenerateOutput(sequences=int64 (1, 26), scores=20 × float32 (1, 50400), lengths=int64 (1,), seeds=(1,))"
    )
    assert "20 × float32 (1, 50400)" in made._repr_html_()
    step = TokenStep(0, np.array([1]), np.array([True]), np.array([False]), logits=np.zeros((1, 50400)))
    assert len(repr(step)) < 150


def test_a_report_shows_its_verdict():
    measures = tuple(Measure("pt", "oracle", f"<answer {n}>", 1e-6 * n, 2e-6, "row 0") for n in range(4))
    report = ParityReport("float32", ("pt", "tf"), measures, (), (), 5.0)
    assert repr(report) == "ParityReport(pt, tf in float32: 1 of 4 disagree)"
    page = report._repr_html_()
    assert page.count("<tr>") == 5 and "&lt;answer 3&gt;" in page and "<answer" not in page


def test_a_config_shows_its_sizes_and_what_was_changed():
    assert repr(GPTJConfig(n_layer=2, resid_pdrop=0.1)) == (
        "GPTJConfig(vocab_size=50400, n_positions=2048, n_embd=4096, n_layer=2, n_head=16, rotary_dim=64, "
        "resid_pdrop=0.1)"
    )
    labelled = GPTJConfig(id2label={0: "no", 1: "yes"})
    for config in (GPTJConfig(), labelled, GPTJConfig(num_labels=7, n_embd=64, n_head=2, rotary_dim=None)):
        assert eval(repr(config), {"GPTJConfig": GPTJConfig}) == config
    assert len(repr(GPTJConfig(extra={f"key_{n}": "x" * 100 for n in range(99)}))) < 300
    assert "rotary_dim" in GPTJConfig()._repr_html_()


def test_a_generation_config_shows_what_was_set():
    assert repr(GenerationConfig()) == "GenerationConfig()"
    assert repr(GenerationConfig(max_new_tokens=5, do_sample=True, top_p=0.5)) == (
        "GenerationConfig(max_new_tokens=5, do_sample=True, top_p=0.5)"
    )
    assert "top_p" in GenerationConfig(do_sample=True, top_p=0.5)._repr_html_()


# ---- types


def test_the_keywords_that_checkers_know_are_the_configs_fields():
    fields = {field.name: field.type for field in dataclasses.fields(GenerationConfig)}
    assert GenerationFields.__annotations__.keys() | CallFields.__annotations__.keys() == fields.keys()
    assert CallFields.__annotations__.keys() == fields.keys() - {"return_dict_in_generate"}
    hints, own = typing.get_type_hints(GenerationFields), typing.get_type_hints(GenerationConfig)
    for name in fields:
        if "tuple" not in str(own[name]) and name != "extra":
            assert hints[name] == own[name], name
        assert (type(None) in typing.get_args(hints[name])) == (type(None) in typing.get_args(own[name])), name
    assert TOKENS.keys() <= hints.keys()


def test_the_package_says_that_it_is_typed():
    for package in (gptj, gptj_conversion):
        assert (Path(package.__file__).parent / "py.typed").exists()
