"""Fine-tuning's loop and checkpoints over a step in NumPy: resumed runs, kills, the best and the last, the curve."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from finetune_samples import TEXT, TableStep, tuned_model
from tokenizer_samples import small

from gptj.backends import install_line
from gptj.checkpoint import open_checkpoint, verify_checkpoint
from gptj.errors import CheckpointWarning, FormatError, GPTJError, InputError, MissingFileError, WriteError
from gptj.finetune import job, together
from gptj.finetune.checkpoints import Identity, RunFolder, write_moments
from gptj.finetune.curve import Row, draw_curve, perplexity, read_curve, write_curve
from gptj.finetune.data import Batches, Document, make_windows
from gptj.finetune.loop import Progress, Training
from gptj.finetune.settings import Settings
from gptj.finetune.together import SharedRunFolder, Team
from gptj.sharding import Processes

SETTINGS = Settings(steps=12, batch=2, accumulate=2, lr=0.1, save_every=3, eval_every=4)


def batches(settings=SETTINGS, text=TEXT):
    windows = make_windows("data", [Document(text)], small(), length=16, pack=True)
    return Batches(windows, settings.batch, settings.accumulate, settings.seed)


def identity(settings=SETTINGS, **changes):
    same = {"backend": "pt", "steps": settings.steps, "model": {"n": 1}, "data": {"sha256": "a"}, "evaluation": None}
    return Identity(settings=settings, **{**same, **changes})


def run(folder, settings=SETTINGS, *, resume=False, stop_at=None, evaluation=False, model=None):
    """A run of a table in NumPy; returns it, and the steps after which it saved."""
    step = TableStep(300)
    saved_at = []
    with RunFolder(folder, resume=resume) as place:
        found = place.last() if resume else None
        progress, rows = (Progress(), []) if found is None else (found.progress, found.rows)
        if found is not None:
            found_identity = identity(settings)
            found_identity.require_same(found.stored, found.folder)
            step.restore(found.moments({"table": (300, 300)}), updates=progress.updates)
            step.table = np.load(found.folder / "table.npy")

        def write_model(path: Path) -> None:
            if model is None:
                path.mkdir()
            else:
                tuned_model(path)
            np.save(path / "table.npy", step.table)
            write_moments(path, step.moments())

        def save(training: Training) -> None:
            saved_at.append(training.progress.step)
            place.save(training.progress, identity(settings), training.rows, write=write_model)

        measured = batches(text=TEXT[::-1]) if evaluation else None
        training = Training(
            step, settings, batches(settings), measured, steps=settings.steps, progress=progress, rows=rows
        )
        training.run(save=save, report=lambda report: None, stop=lambda: training.progress.step == stop_at)
    return training, saved_at


def losses(training):
    return [(row.step, row.loss, row.eval_loss, row.learning_rate, row.gradient_norm) for row in training.rows]


def test_a_run_learns_and_keeps_the_last_checkpoint(tmp_path):
    training, saved_at = run(tmp_path / "out")
    assert training.rows[-1].loss < 0.9 * training.rows[0].loss
    assert saved_at == [3, 6, 9, 12]
    assert names(tmp_path / "out" / "checkpoints") == ["step-00000012"]
    assert [row.step for row in training.rows] == list(range(1, 13))


@pytest.mark.parametrize("stop_at", [1, 3, 4, 11])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, stop_at):
    whole, _ = run(tmp_path / "whole", evaluation=True)
    first, _ = run(tmp_path / "out", evaluation=True, stop_at=stop_at)
    assert len(first.rows) == stop_at
    second, _ = run(tmp_path / "out", evaluation=True, resume=True)
    assert losses(second) == losses(whole)
    assert np.array_equal(second.step.table, whole.step.table)
    assert second.progress.tokens == whole.progress.tokens


def test_a_run_that_is_over_has_nothing_left_to_do(tmp_path):
    whole, _ = run(tmp_path / "out")
    again, saved_at = run(tmp_path / "out", resume=True)
    assert (saved_at, losses(again)) == ([], losses(whole))


def test_the_best_and_the_last_are_kept(tmp_path):
    settings = dataclasses.replace(SETTINGS, lr=1.0, schedule="constant", warmup=0, eval_every=1, save_every=1, clip=0)
    training, _ = run(tmp_path / "out", settings, evaluation=True)
    measured = [row.eval_loss for row in training.rows]
    best = 1 + int(np.argmin(measured))
    assert 1 <= best < 12, "a run whose best evaluation is not its last"
    assert training.progress.best_step == best and training.progress.best_loss == min(measured)
    kept = names(tmp_path / "out" / "checkpoints")
    assert kept == [f"step-{best:08d}", "step-00000012"]


def test_accumulated_batches_weigh_by_their_tokens(tmp_path):
    one = dataclasses.replace(SETTINGS, batch=4, accumulate=1)
    together, _ = run(tmp_path / "one", one)
    apart, _ = run(tmp_path / "four", dataclasses.replace(SETTINGS, batch=1, accumulate=4))
    for a, b in zip(together.rows, apart.rows, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.tokens == b.tokens


def test_a_float16_gradient_that_overflows_is_left_out(tmp_path):
    settings = dataclasses.replace(SETTINGS, dtype="float16")
    step = TableStep(300)
    step.overflows = [True, True, False]
    training = Training(step, settings, batches(), None, steps=3, progress=Progress(), rows=[])
    reports = []
    training.run(save=lambda training: None, report=reports.append, stop=lambda: False)
    assert [report.overflow for report in reports] == [True, True, False]
    assert (step.updates, training.progress.updates, training.progress.step) == (1, 1, 3)
    assert training.progress.scale.scale == 65536 / 4


def test_a_float16_gradient_that_always_overflows_ends_the_run():
    step = TableStep(300)
    step.overflows = [True] * 40
    settings = dataclasses.replace(SETTINGS, dtype="float16")
    training = Training(step, settings, batches(), None, steps=40, progress=Progress(), rows=[])
    with pytest.raises(InputError, match=r"--dtype.*bfloat16"):
        training.run(save=lambda training: None, report=lambda report: None, stop=lambda: False)
    assert training.progress.step == 16, "halved from 65,536 to 1"


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_a_run_without_one_update_is_an_error(tmp_path, steps):
    saved = []
    for progress in (Progress(), Progress(step=steps)):  # the second: resumed, where an earlier run let it pass
        step = TableStep(300)
        step.overflows = [True] * steps
        settings = dataclasses.replace(SETTINGS, dtype="float16", save_every=100, eval_every=100)
        training = Training(step, settings, batches(), None, steps=steps, progress=progress, rows=[])
        with pytest.raises(InputError, match=rf"--dtype.*nothing was learnt.*{steps} left out.*bfloat16"):
            training.run(save=saved.append, report=lambda report: None, stop=lambda: False)
    assert saved == [], "the end of such a run is no checkpoint"


def test_a_gradient_that_is_no_number_ends_the_run(tmp_path):
    step = TableStep(300)
    step.overflows = [False, True]
    training = Training(step, SETTINGS, batches(), None, steps=3, progress=Progress(), rows=[])
    with pytest.raises(InputError, match=r"the gradient of update 2 is no number.*in another OUT, with a lower --lr"):
        training.run(save=lambda training: None, report=lambda report: None, stop=lambda: False)
    assert step.updates == 1


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": dataclasses.replace(SETTINGS, lr=0.2)}, "--lr: another than the run.*expected 0.1, found 0.2"),
        ({"settings": dataclasses.replace(SETTINGS, steps=None, epochs=2)}, "--epochs.*and 1 more: --steps|--steps.*"),
        ({"settings": dataclasses.replace(SETTINGS, seed=1, batch=3)}, "--batch.*and 1 more: --seed"),
        ({"backend": "tf"}, "--backend.*expected 'pt', found 'tf'"),
        ({"model": {"n": 2}}, "DIR.*expected 'n 1', found 'n 2'"),
        ({"data": {"sha256": "b"}}, "DATA"),
        ({"evaluation": {"sha256": "b"}}, "--eval.*expected 'none', found 'some'"),
        ({"steps": 13}, "--steps"),
    ],
    ids=str,
)
def test_a_resumed_run_that_differs_is_refused_by_name(changes, words):
    stored = json.loads(json.dumps(identity().to_dict()))
    identity().require_same(stored, Path("step-1"))
    with pytest.raises(InputError, match=words):
        dataclasses.replace(identity(), **changes).require_same(stored, Path("step-1"))


def test_how_often_it_is_saved_may_change():
    stored = json.loads(json.dumps(identity().to_dict()))
    identity(dataclasses.replace(SETTINGS, save_every=1)).require_same(stored, Path("step-1"))


class Threads:
    """Two processes that agree, as threads."""

    def __init__(self):
        self.barrier, self.said = threading.Barrier(2, timeout=20), {}

    def run(self, work):
        """What `work` of each one's team gave, or raised."""

        def one(rank):
            mine = types.SimpleNamespace(gather_texts=lambda text: self.gather(rank, text))
            try:
                return work(Team(mine, Processes(rank, 2)))
            except (GPTJError, SystemExit) as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            return [*threads.map(one, range(2))]

    def gather(self, rank, text):
        self.said[rank] = text
        self.barrier.wait()
        found = [self.said[0], self.said[1]]
        self.barrier.wait()
        return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"sha256": "b"}}, "DATA"),
        ({"model": {"n": 2}}, "DIR"),
        ({"settings": dataclasses.replace(SETTINGS, lr=0.2)}, "--lr"),
        ({"settings": dataclasses.replace(SETTINGS, save_every=9)}, "settings"),
    ],
)
def test_processes_that_have_other_files_or_options_are_refused_by_name(tmp_path, changes, words):
    checkpoint = open_checkpoint(tuned_model(tmp_path))

    def work(team):
        team.require_alike(identity() if team.first else dataclasses.replace(identity(), **changes), checkpoint)

    first, second = Threads().run(work)
    assert isinstance(first, SystemExit)
    assert isinstance(second, InputError) and words in str(second) and "process 1 on" in str(second)
    assert Threads().run(lambda team: team.require_alike(identity(), checkpoint)) == [None, None]


def test_a_folder_that_the_others_do_not_see_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "_PATIENCE_S", 0.2)

    def work(team, second):
        with SharedRunFolder(tmp_path / ("out" if team.first else second), resume=True, team=team) as run:
            return run.steps()

    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    for second in ("other", "none"):
        first, found = Threads().run(lambda team, second=second: work(team, second))
        assert isinstance(first, SystemExit) and isinstance(found, WriteError)
        assert "does not see what the first one writes" in str(found) and str(tmp_path / second) in str(found)
        assert not (tmp_path / "out").exists()
    assert Threads().run(lambda team: work(team, "out")) == [[], []]
    assert [*(tmp_path / "out" / "checkpoints").iterdir()] == []


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(WriteError, match=r"is not empty .found 'config.json'.. Give another OUT"):
        RunFolder(tmp_path / "out", resume=False).require_usable()
    with pytest.raises(WriteError, match="no run was begun in it"):
        RunFolder(tmp_path / "out", resume=True).require_usable()
    run(tmp_path / "other")
    with pytest.raises(WriteError, match="Give --resume to go on with it"):
        RunFolder(tmp_path / "other", resume=False).require_usable()
    with pytest.raises(WriteError, match="no such folder"):
        RunFolder(tmp_path / "none" / "out", resume=False).require_usable()
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file: could not be written.*A file stands in the way"):
        RunFolder(tmp_path / "file", resume=False).require_usable()


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_of_it(tmp_path):
    """The disk is full: what was written of it is given back, and the checkpoint before it stands."""
    first, _ = run(tmp_path / "out", stop_at=3)
    progress = dataclasses.replace(first.progress, step=6)

    def write(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder(tmp_path / "out", resume=True) as place:
        with pytest.raises(
            WriteError,
            match=r"step-00000006: could not be written: No space.*Free some space.*3 is saved: with --resume",
        ):
            place.save(progress, identity(), first.rows, write=write)
        assert names(place.checkpoints) == ["step-00000003"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with RunFolder(tmp_path / "out", resume=False), pytest.raises(WriteError, match="another process fine-tunes"):
        RunFolder(tmp_path / "out", resume=True).__enter__()


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), RunFolder(tmp_path / "out", resume=False):
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "progress",
    [
        None,
        {},
        [],
        {"step": 3},
        {"step": 4, "scale": {}},
        {"step": 3, "scale": {"factor": 1}},
        {"place": 3, "scale": {}},
    ],
)
def test_a_damaged_place_is_refused(tmp_path, progress):
    run(tmp_path / "out", stop_at=3)
    path = tmp_path / "out" / "checkpoints" / "step-00000003" / "training.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "progress": progress}))
    refused = pytest.raises(FormatError, match=r"training.json: progress")
    with RunFolder(tmp_path / "out", resume=True) as place, refused:
        _ = place.last().progress


# ---- kills


def test_a_run_that_is_killed_leaves_its_last_checkpoint_whole(tmp_path):
    """Four kills at different moments, each of a run that resumes; each time what has a plain name opens."""
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    seen = []
    for kill in range(4):
        process = subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, env=environment)
        wanted = (seen[-1] if seen else 0) + 2
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and newest(folder) < wanted:
            time.sleep(0.002)
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err.decode()
        for name in names(folder / "checkpoints"):
            if not name.startswith("."):
                assert_whole(folder / "checkpoints" / name)
        seen.append(newest(folder))
    assert seen == sorted(seen)
    with RunFolder(folder, resume=True) as place:
        assert not [name for name in names(folder / "checkpoints") if name.startswith(".")]
        assert place.last().progress.step == seen[-1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> int:
    try:
        steps = [int(name[5:]) for name in names(folder / "checkpoints") if name.startswith("step-")]
        return max(steps, default=0)
    except FileNotFoundError:
        return 0


def assert_whole(folder: Path) -> None:
    with pytest.warns(CheckpointWarning, match="not checked, since manifest.json has no hash"):
        verify_checkpoint(folder)
    assert len(open_checkpoint(folder).tensors) == 25
    assert json.loads((folder / "training.json").read_text())["progress"]["step"] == int(folder.name[5:])
    assert len(read_curve(folder / "loss.csv")) == int(folder.name[5:])


# ---- the curve


def rows(count=4):
    return [
        Row(step=n, epoch=n / 3, loss=5 / n, learning_rate=0.1 / n, gradient_norm=1.5, tokens=10 * n, seconds=n / 7,
            eval_loss=4 / n if n % 2 == 0 else None)
        for n in range(1, count + 1)
    ]  # fmt: skip


def test_a_curve_is_read_as_it_was_written(tmp_path):
    write_curve(tmp_path / "loss.csv", rows())
    assert read_curve(tmp_path / "loss.csv") == rows()
    head, _, second, *_ = (tmp_path / "loss.csv").read_text().splitlines()
    assert head == "step,epoch,loss,learning_rate,gradient_norm,tokens,seconds,eval_loss,eval_perplexity"
    assert second.split(",")[-1] == repr(perplexity(2.0))


@pytest.mark.parametrize("text", ["step,loss\n1,2\n", "step,epoch,loss\nx\n", '"', "step"])
def test_a_damaged_curve_is_refused(tmp_path, text):
    (tmp_path / "loss.csv").write_text(text)
    with pytest.raises(FormatError, match=r"loss\.csv: no loss curve"):
        read_curve(tmp_path / "loss.csv")


def test_a_curve_that_is_cut_short_or_missing_is_said(tmp_path):
    with pytest.raises(MissingFileError, match=r"loss\.csv: no such file"):
        read_curve(tmp_path / "loss.csv")
    write_curve(tmp_path / "loss.csv", rows())
    text = (tmp_path / "loss.csv").read_text()
    (tmp_path / "loss.csv").write_text(text[: len(text) * 2 // 3])
    with pytest.raises(FormatError, match=r"row 3 has \d of 9 columns .is the file cut short"):
        read_curve(tmp_path / "loss.csv")


def test_a_curve_is_drawn():
    one = draw_curve([("", rows())], title="a curve")
    assert one.startswith(b"\x89PNG") and one != draw_curve([("", rows(3))], title="a curve")


def coloured(picture: bytes, color: str) -> np.ndarray:
    """Which of a picture's points are of a color, below and to the left of the legend."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    points = imread(io.BytesIO(picture))[:, :, :3]
    height, width, _ = points.shape
    return (np.abs(points - to_rgb(color)) < 0.08).all(2)[height // 3 :, : width * 2 // 3]


def test_a_run_of_one_update_and_any_folders_name_are_drawn():
    """A line through one point would show nothing; $ begins mathematics, and a font lacks letters."""
    picture = draw_curve([("", rows(1))], title="C:\\$\\frac$_^ 模型 " + "long " * 40)
    assert coloured(picture, "C0").any()


def test_curves_that_are_the_same_all_show():
    picture = draw_curve([(name, rows(40)) for name in ("PyTorch", "TensorFlow", "Flax")], title="three")
    assert all(coloured(picture, color).sum() > 800 for color in ("C0", "C1", "C2"))


def test_where_matplotlib_is_missing_the_picture_is_left_out_with_a_word(monkeypatch):
    training = Training(TableStep(300), SETTINGS, batches(), None, steps=1, progress=Progress(step=4), rows=rows())
    said = []
    assert job._picture(training, "out", said.append)[job.PICTURE].startswith(b"\x89PNG")
    monkeypatch.setattr(job, "can_draw", lambda: False)
    assert job._picture(training, "out", said.append) == {}
    assert said == [f"the loss curve is not drawn, since matplotlib is not installed: {install_line('finetune')}"]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    run(place, dataclasses.replace(SETTINGS, steps=10**6, save_every=1, warmup=0, schedule="constant"), resume=True,
        model=True)  # fmt: skip
