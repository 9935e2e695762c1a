"""The harness gives our models the numbers that it gives transformers' of the same folder, in every backend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_samples import write_sample_adapter
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptj import GPTJConfig
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import BackendError, InputError, MissingFileError, SchemaError
from gptj.generation.scoring.windows import Limits, windows_of
from gptj.harness import GPTJLM, evaluate, main

NAMES = ("local_choice", "local_last_word", "local_perplexity", "local_continue")
LOG_LIKELIHOOD = 1e-4

pytestmark = pytest.mark.filterwarnings("default")


def run(model: Any, tasks: Path, names: tuple[str, ...] = NAMES, **options: Any) -> Any:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=[*names], task_manager=manager, bootstrap_iters=0, **options)


@pytest.fixture(scope="session")
def theirs(folder: Path, tasks: Path) -> Any:
    """The results of the harness' own model over transformers."""
    return run(HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3), tasks)


@pytest.fixture(scope="session")
def ours(backend: str, folder: Path, tasks: Path) -> Any:
    return run("gptj", tasks, model_args=f"pretrained={folder},backend={backend}")


@pytest.fixture(scope="session")
def short(folder: Path, tasks: Path) -> Any:
    """The same with shorter windows and another token before a text."""
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=20, prefix_token_id=5, batch_size=8)
    return run(model, tasks, NAMES[::2])


@pytest.fixture(scope="session")
def two_shorter(folder: Path, tasks: Path) -> Any:
    """The results of the harness' own model with windows of 46."""
    return run(HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=46, batch_size=3), tasks)


def responses(results: Any, task: str) -> list[Any]:
    """What the model answered to each request of each document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["filtered_resps"]]


@pytest.mark.parametrize("task", NAMES[:3])
def test_log_likelihoods_are_those_of_the_hf_model(ours: Any, theirs: Any, task: str) -> None:
    got, expected = responses(ours, task), responses(theirs, task)
    if task == "local_perplexity":
        assert got == pytest.approx(expected, abs=LOG_LIKELIHOOD, rel=1e-6) and len(got) == 5
        return
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=LOG_LIKELIHOOD, rel=1e-6)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert len(got) == {"local_choice": 21, "local_last_word": 7}[task]


def test_the_texts_are_those_of_the_hf_model(ours: Any, theirs: Any) -> None:
    assert responses(ours, "local_continue") == responses(theirs, "local_continue")
    assert any(responses(ours, "local_continue"))


def test_so_are_all_results(ours: Any, theirs: Any) -> None:
    for task in NAMES:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    assert ours["results"]["local_choice"]["acc,none"] not in (0, 1)


def test_so_are_those_of_a_server(backend: str, folder: Path, tasks: Path, two_shorter: Any) -> None:
    """The harness counts the token that it lets a server make: texts that are too long have two tokens less there."""
    command = [sys.executable, "-m", "gptj", "serve", str(folder), "--backend", backend, "--name", "m", "--port", "0"]
    command += ["--no-warm-up"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            place = f"http://127.0.0.1:{server.stdout.readline().rpartition(':')[2].strip()}/v1/completions"
            asked = f"model=m,base_url={place},tokenizer={folder},max_length=48,num_concurrent=4"
            served = run("local-completions", tasks, model_args=asked)
        finally:
            server.terminate()
    for task in NAMES:
        got, its = responses(served, task), responses(two_shorter, task)
        for one, other in zip(got, its, strict=True):  # a text, a number, or a number and whether it is the likeliest
            assert one == other if isinstance(one, str) else list(pair(one)) == approximately(pair(other))


def pair(answer: Any) -> tuple[float, bool | None]:
    return answer if isinstance(answer, tuple | list) else (answer, None)


def approximately(answer: tuple[float, bool | None]) -> list[Any]:
    return [pytest.approx(answer[0], abs=LOG_LIKELIHOOD, rel=1e-6), answer[1]]


def test_what_was_run_is_said(ours: Any, backend: str) -> None:
    config = ours["config"]
    assert config["model"] == "gptj" and config["backend"] == backend
    assert config["model_num_parameters"] > 10_000 and "float32" in config["model_dtype"]


def test_a_batch_size_and_a_shorter_window_change_what_they_say(
    backend: str, folder: Path, tasks: Path, short: Any
) -> None:
    names = NAMES[::2]
    model = GPTJLM(str(folder), backend, batch_size="2", max_length=20, prefix_token_id=5)
    got = run(model, tasks, names)
    for name in names:
        flat = [[*one] if isinstance(one, tuple | list) else [one] for one in responses(got, name)]
        theirs = [[*one] if isinstance(one, tuple | list) else [one] for one in responses(short, name)]
        assert [one[0] for one in flat] == pytest.approx([one[0] for one in theirs], abs=LOG_LIKELIHOOD, rel=1e-6)


def test_few_shots_and_limits_are_the_harnesss(backend: str, folder: Path, tasks: Path, theirs: Any) -> None:
    model = GPTJLM(str(folder), backend)
    few = evaluate(model, ["local_choice"], include_path=tasks, limit=2, bootstrap_iters=0)
    assert len(few["samples"]["local_choice"]) == 2
    assert responses(few, "local_choice")[0][0] == pytest.approx(responses(theirs, "local_choice")[0][0], abs=1e-4)


def test_the_command_prints_the_harnesss_table_and_its_json(
    backend: str, folder: Path, tasks: Path, theirs: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    words = ["eval", str(folder), "--tasks", "local_ch*,local_last*,local_perplexity", "--include-path", str(tasks)]
    words += ["--backend", backend]
    gptj_command.main(words, standalone_mode=False)
    table = capsys.readouterr().out
    assert "local_choice" in table and "bits_per_byte" in table and "acc_norm" in table
    gptj_command.main([*words, "--json", "--limit", "3", "--batch-size", "2"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)  # though the harness prints there, where it draws samples
    assert found["n-samples"]["local_choice"]["effective"] == 3 and "samples" not in found


# ---- without a backend


def test_it_is_registered() -> None:
    assert get_model("gptj") is GPTJLM


def test_windows_are_the_harnesss() -> None:
    for n in range(1, 15):
        for length in range(1, 7):
            for context in range(1, length + 1):
                pairs = get_rolling_token_windows([*range(1, n + 1)], 0, length, context)
                expected = [(tuple(a + b[:-1]), tuple(b)) for a, b in map(make_disjoint_window, pairs)]
                found = windows_of(range(n + 1), 1, Limits(length, length - context + 1))
                assert [(window.token_ids, window.targets) for window in found] == expected


def test_the_harnesss_own_command_line_knows_it(folder: Path, tasks: Path) -> None:
    """A process of its own, in PyTorch: the line that the documentation has."""
    words = ["--model", "gptj", "--model_args", f"pretrained={folder},backend=pt", "--tasks", "local_perplexity"]
    line = [sys.executable, "-m", "gptj.harness", *words, "--include_path", str(tasks)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "bits_per_byte" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": "red"}, "colour.*no such model argument"),
        ({"batch_size": 0}, "batch_size: no batch size"),
        ({"batch_size": "many"}, "batch_size: no batch size"),
        ({"max_length": 49}, "max_length: out of range"),
        ({"device": "tpu"}, "device: no such device"),
        ({"quantize": "int3"}, "quantize"),
    ],
)
def test_arguments_are_refused_by_name(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GPTJLM(str(folder), "pt", **arguments)


def test_what_cannot_be_answered_is_refused_by_name(folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        GPTJLM(str(folder), "cuda")
    model = GPTJLM(str(folder), "pt")
    with pytest.raises(InputError, match="no_such_task"):
        evaluate(model, ["no_such_task"], include_path=tasks)
    with pytest.raises(InputError, match="no chat template"):
        run(model, tasks, ("local_continue",), apply_chat_template=True)
    with pytest.raises(InputError, match="max_gen_toks: leaves no room"):
        run(model, tasks, ("local_continue",), gen_kwargs="max_gen_toks=48")
    text = (tasks / "local_perplexity.yaml").read_text()
    for name, changed, message in (
        ("no_data", text.replace("local_perplexity.json", "nowhere.json"), "FileNotFoundError: .*nowhere.json"),
        ("no_field", text.replace("{{page}}", "{{nothing}}"), "UndefinedError: 'nothing' is undefined"),
    ):
        (tmp_path / f"{name}.yaml").write_text(changed.replace("task: local_perplexity", f"task: {name}"))
        with pytest.raises(InputError, match=f"tasks: the harness cannot run them.*{message}"):
            evaluate(model, [name], include_path=tmp_path)


def test_the_harnesss_own_command_line_ends_in_one_line(
    folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", "gptj", "--model_args", f"pretrained={folder},backnd=pt", "--tasks", "local_continue"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--include_path", str(tasks)])
    with pytest.raises(SystemExit, match=r"^gptj: InputError: 'backnd': no such model argument") as caught:
        main()
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_fetched_are_said(folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**options: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub")

    monkeypatch.setattr("gptj.harness.simple_evaluate", offline)
    with pytest.raises(MissingFileError, match=r"a task's data cannot be fetched .found .*someone/data"):
        evaluate(GPTJLM(str(folder), "pt"), ["local_continue"], include_path=tasks)


def test_an_adapter_is_put_to_work(folder: Path, tasks: Path, theirs: Any, tmp_path: Path) -> None:
    path = write_sample_adapter(tmp_path / "adapter", config=GPTJConfig.from_file(folder))
    results = run(GPTJLM(str(folder), "pt", adapter=path), tasks, ("local_perplexity",))
    got, plain = (responses(one, "local_perplexity") for one in (results, theirs))
    assert max(abs(a - b) for a, b in zip(got, plain, strict=True)) > 0.01


def test_sampled_texts_follow_the_seed(folder: Path, tasks: Path) -> None:
    def texts(seed: int) -> list[Any]:
        model = GPTJLM(str(folder), "pt", seed=seed)
        how = "do_sample=True,temperature=1.5,max_gen_toks=6"
        return responses(run(model, tasks, ("local_continue",), gen_kwargs=how), "local_continue")

    assert texts(1) == texts(1) != texts(2)


def test_a_folder_without_a_language_models_head_is_refused(backend: str, folder: Path, tmp_path: Path) -> None:
    config = GPTJConfig.from_file(folder)
    weights = open_checkpoint(folder)
    base = write_checkpoint(tmp_path / "base", config, lambda row: weights.read(f"transformer.{row.name}"), head="base")
    shutil.copy(folder / "tokenizer.json", base)
    with pytest.raises(SchemaError, match=r"not a whole causal language model .found no lm_head.weight"):
        GPTJLM(str(base), backend)
