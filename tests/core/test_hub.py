"""A repository id is looked up in the Hugging Face cache, offline; a path that exists never is."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from pretended_hub import pretend_hub

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.config import GPTJConfig
from gptj.errors import InputError, MissingFileError
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.paths.hub import HubPlace, locate, locate_source
from gptj.pretrained import prepare
from gptj.text.tokenizer import GPTJTokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"

LOAD = """
from gptj.pretrained import prepare
print(prepare("causal_lm", "someone/gptj-tiny").checkpoint.directory)
"""


@pytest.fixture
def cache(tmp_path):
    """A cache as the hub's client lays it out: blobs, and a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--someone--gptj-tiny"
    written = write_checkpoint(tmp_path / "written", revealing_config(n_layer=1), revealing_fill(0))
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(written.iterdir()):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def run(code, cache, cwd):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PATH": "", "HOME": str(cwd)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)


def test_a_repository_is_opened_from_the_cache_offline(cache, tmp_path):
    done = run(LOAD, cache, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"models--someone--gptj-tiny/snapshots/{REVISION}")


def test_a_repository_that_the_cache_lacks_is_named(tmp_path):
    done = run(LOAD, tmp_path / "empty", tmp_path)
    assert done.returncode == 1 and "MissingFileError: someone/gptj-tiny: no such folder" in done.stderr


def test_without_the_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingFileError, match=r'pip install "gptj-multibackend\[hub\]"'):
        locate("someone/gptj-tiny")


@pytest.mark.parametrize("name", ["here", "a/b/c", "/a/b", "../a", "./a", "a b/c"])
def test_what_is_no_repository_id_is_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(name) == Path(name)


def test_a_folder_that_exists_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "gptj-tiny").mkdir(parents=True)
    assert locate("someone/gptj-tiny") == Path("someone/gptj-tiny")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the client was asked, over repositories that are folders of this test."""
    return pretend_hub(monkeypatch, tmp_path)


def remote(tmp_path, repository, folder=""):
    """A repository with a small model in it."""
    path = tmp_path / "remote" / repository / folder
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(path, revealing_config(n_layer=1), revealing_fill(0))


def test_the_arguments_of_the_hub_reach_its_client(asked, tmp_path):
    remote(tmp_path, "someone/tiny")
    prepare("causal_lm", "someone/tiny", overrides={
        "revision": "float16", "cache_dir": "c", "token": "t", "local_files_only": True, "force_download": True,
    })  # fmt: skip
    expected = {"revision": "float16", "cache_dir": "c", "token": "t", "local_files_only": True, "force_download": True}
    assert [{**call, "allow_patterns": None} for call in asked] == [
        {"repo_id": "someone/tiny", **expected, "allow_patterns": None}
    ]


def test_nothing_is_asked_that_was_not_said(asked, tmp_path):
    remote(tmp_path, "someone/tiny")
    prepare("causal_lm", "someone/tiny", overrides={"revision": None, "token": None})
    assert asked[0].keys() == {"repo_id", "allow_patterns"}


def test_a_subfolder_alone_is_fetched(asked, tmp_path):
    remote(tmp_path, "someone/tiny", "inner")
    loading = prepare("causal_lm", "someone/tiny", subfolder="inner")
    assert loading.checkpoint.directory.name == "inner"
    assert all(pattern.startswith("inner/") for pattern in asked[0]["allow_patterns"])


def test_a_revision_may_be_written_behind_the_name(asked, tmp_path):
    remote(tmp_path, "someone/tiny")
    assert locate("someone/tiny@float16").name == "tiny" and asked[0]["revision"] == "float16"
    with pytest.raises(InputError, match="two revisions"):
        HubPlace(revision="main").locate("someone/tiny@float16")


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"])
def test_the_weights_that_there_are_are_fetched_for_the_converter(asked, tmp_path, weights):
    folder = tmp_path / "remote" / "someone" / "old"
    folder.mkdir(parents=True)
    for name in ("config.json", weights, "code.py"):
        (folder / name).write_bytes(b"{}")
    found = locate_source("someone/old")
    assert sorted(path.name for path in found.iterdir()) == sorted(["config.json", weights])
    with pytest.raises(MissingFileError, match=r"someone/old.*gptj convert someone/old DIR"):
        shutil.rmtree(tmp_path / "snapshots")
        prepare("causal_lm", "someone/old")


def test_safetensors_are_preferred_to_other_weights(asked, tmp_path):
    path = remote(tmp_path, "someone/both")
    (path / "pytorch_model.bin").write_bytes(b"")
    assert not (locate_source("someone/both") / "pytorch_model.bin").exists() and len(asked) == 1


EVERY_COMMAND = pytest.mark.parametrize("command", ["inspect", "verify", "convert", "generate", "parity"])


@pytest.fixture
def invoke(asked, tmp_path, monkeypatch):
    """A command over someone/tiny: its result, and the folder that it came to; models are not run here."""
    remote(tmp_path, "someone/tiny")
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    monkeypatch.setattr("gptj.backends.Backend.missing", ())  # as where every framework is installed
    reached = []

    def run_parity(directory, *arguments, **options):
        reached.append(directory)
        return SimpleNamespace(passed=True, as_dict=dict)

    monkeypatch.setattr("gptj.parity.run_parity", run_parity)
    monkeypatch.setattr(
        "gptj.command.continuation.continue_prompts",
        lambda request, *rest, **options: reached.append(request.directory),
    )

    def call(command, *arguments, name="someone/tiny"):
        more = {"convert": ["out"], "generate": ["--token-ids", "1 2"], "parity": ["--backends", "pt", "--json"]}
        return CliRunner().invoke(gptj_command, [command, name, *more.get(command, []), *arguments])

    call.reached = reached
    return call


@EVERY_COMMAND
def test_a_command_takes_a_repository(asked, tmp_path, invoke, command):
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert asked[0]["repo_id"] == "someone/tiny" and "revision" not in asked[0]
    assert all(directory == tmp_path / "snapshots" / "someone" / "tiny" for directory in invoke.reached)
    assert bool(invoke.reached) == (command in ("generate", "parity"))


@EVERY_COMMAND
@pytest.mark.parametrize("said", ["in front", "behind", "behind the name", "twice the same"])
def test_every_command_that_takes_a_repository_takes_its_revision(asked, invoke, command, said):
    name = "someone/tiny@float16" if said in ("behind the name", "twice the same") else "someone/tiny"
    if said == "in front":
        more = {"convert": ["out"], "generate": ["--token-ids", "1 2"], "parity": ["--backends", "pt", "--json"]}
        words = [command, "--revision", "float16", name, *more.get(command, [])]
        done = CliRunner().invoke(gptj_command, words)
    else:
        done = invoke(command, *(["--revision", "float16"] if said != "behind the name" else []), name=name)
    assert done.exit_code == 0, done.output
    assert [call["repo_id"] for call in asked] == ["someone/tiny"] * len(asked)
    assert {call["revision"] for call in asked} == {"float16"}


@EVERY_COMMAND
def test_two_revisions_are_refused(asked, invoke, command):
    done = invoke(command, "--revision", "main", name="someone/tiny@float16")
    assert isinstance(done.exception, InputError) and "two revisions" in str(done.exception) and not asked


@EVERY_COMMAND
def test_a_revision_of_a_folder_is_refused(asked, invoke, tmp_path, command):
    done = invoke(command, "--revision", "main", name=str(tmp_path / "remote" / "someone" / "tiny"))
    assert isinstance(done.exception, InputError) and "--revision: is for a repository" in str(done.exception)
    assert not asked


@EVERY_COMMAND
def test_a_revision_without_a_name_is_refused(asked, invoke, command):
    done = invoke(command, "--revision", "")
    assert isinstance(done.exception, InputError) and "revision: no revision" in str(done.exception) and not asked


def test_an_assistants_revision_is_its_own(asked, tmp_path, invoke):
    remote(tmp_path, "someone/small")
    done = invoke("generate", "--revision", "float16", "--assistant", "someone/small")
    assert done.exit_code == 0, done.output
    revisions = {call["repo_id"]: call.get("revision") for call in asked}
    assert revisions == {"someone/tiny": "float16", "someone/small": None}


def test_weights_of_other_formats_are_fetched_in_the_revision_too(asked, tmp_path):
    folder = tmp_path / "remote" / "someone" / "old"
    folder.mkdir(parents=True)
    for name in ("config.json", "tf_model.h5"):
        (folder / name).write_bytes(b"{}")
    assert locate_source("someone/old", place=HubPlace(revision="r")).name == "old"
    assert len(asked) > 1 and {call["revision"] for call in asked} == {"r"}


def test_configs_and_tokenizers_are_read_from_a_repository(asked, tmp_path):
    path = remote(tmp_path, "someone/tiny")
    GPTJTokenizer.train(["some text, some more"], 262).save_pretrained(path)
    config = GPTJConfig.from_pretrained("someone/tiny", revision="r", pad_token_id=3)
    assert config == revealing_config(n_layer=1).replace(pad_token_id=3, extra=config.extra)
    assert len(GPTJTokenizer.from_pretrained("someone/tiny", revision="r")) == 262
    assert {call["revision"] for call in asked} == {"r"}
