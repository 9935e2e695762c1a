"""The orchestration, with stand-ins for the backends' processes: what is passed, kept, and said when one fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutants import MUTANTS
from oracle_record import oracle_record
from weight_choices import CHOICES, FOREIGN, chosen_weights, named, two_sets

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.errors import BackendError, FormatError, InputError, ParityError, SchemaError, WriteError
from gptj.parity import processes, run
from gptj.parity.oracle import Oracle
from gptj.parity.probe import Probe, make_probe
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.run import open_oracle, run_parity
from gptj.parity.trace import TraceFacts, write_trace
from gptj.parity.trace_record import batch_of_probe


def answering(command: list[str], *, plant: Any = None, **options: object) -> subprocess.CompletedProcess[str]:
    """In place of `run_command`: a float32 oracle answers as the backend that was asked for."""
    told = dict(zip(command[5::2], command[6::2], strict=True))
    config = revealing_config()
    weights = chosen_weights() if "--weights" in told else revealing_weights(config)
    planted = Oracle(config, weights) if plant is None else plant(config, weights)
    oracle = type(planted)(planted.config, planted._read, dtype="float32")
    probe = Probe.load(told["--probe"])
    oracle_record(oracle, probe, backend=told["--backend"]).save(told["--out"])
    write_answering_trace(oracle, probe, told["--trace"])
    return subprocess.CompletedProcess(command, 0, "", "")


def write_answering_trace(oracle: Oracle, probe: Probe, path: str) -> None:
    """The trace of a float32 oracle."""
    batch = batch_of_probe(probe)
    write_trace(path, oracle.taps(**batch), TraceFacts("oracle", "float32", oracle.config), inputs=batch)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(run, "installed_backends", lambda: ("pt", "tf"))
    monkeypatch.setattr(run, "choose_backend", lambda name: name)


class TestRunParity:
    def test_every_installed_backend_is_asked_the_same_and_judged(self, checkpoint, installed, monkeypatch, tmp_path):
        monkeypatch.setattr(processes, "run_command", answering)
        told: list[str] = []
        report = run_parity(checkpoint, seed=3, keep=tmp_path / "kept", progress=told.append)
        assert report.passed and report.backends == ("pt", "tf")
        assert told[0] == "pt; 0 of 2 done" and "1 of 2 done" in told[-2] and told[-1] == "comparing with the oracle"
        kept = sorted(p.relative_to(tmp_path / "kept").as_posix() for p in (tmp_path / "kept").rglob("*.*"))
        records = [
            f"{name}/{file}" for name in ("pt", "tf") for file in ("record.json", "record.npz", "trace.safetensors")
        ]
        assert kept == ["oracle.safetensors", "probe.npz", *records]
        assert {measure.what for measure in report.measures if measure.against == "oracle"} >= {"every value between"}
        assert report.inside is not None and report.inside.passed
        assert Probe.load(tmp_path / "kept" / "probe.npz").seed == 3

    @pytest.mark.parametrize(
        ("mutant", "stage", "looks_like"),
        [
            ("rotary sign", "block 0, rotated q", "rotary sign"),
            ("masked row attends evenly", "block 0, weights", "masked row attends evenly"),
            ("lm_head.bias dropped", "logits", "bias dropped"),
        ],
    )
    def test_a_mistake_is_named_with_its_operation_block_and_name(
        self, checkpoint, installed, monkeypatch, mutant, stage, looks_like
    ):
        wrong = next(one for one in MUTANTS if one.name == mutant)
        monkeypatch.setattr(processes, "run_command", lambda command, **options: answering(command, plant=wrong.plant))
        report = run_parity(checkpoint, ["pt"])
        assert not report.passed
        assert [(d.backend, d.stage, d.born, d.looks_like) for d in report.divergences] == [
            ("pt", stage, True, looks_like)
        ]
        headline = report.divergences[0].headline
        assert headline.startswith(f"pt first differs in {stage}: born there, ")
        assert "where rounding explains" in headline and headline.endswith(f"; looks like: {looks_like}")
        with pytest.raises(ParityError, match=f"looks like: {looks_like}"):
            report.raise_if_failed()
        assert report.as_dict()["divergences"][0]["headline"] == headline
        assert "first differs" in "".join(map(str, [part.renderable for part in report.summary().renderables[5:]]))

    def test_what_would_have_been_caught_is_said_where_it_is_asked(self, checkpoint, installed, monkeypatch):
        monkeypatch.setattr(processes, "run_command", answering)
        told: list[str] = []
        report = run_parity(checkpoint, ["pt", "tf"], sensitivity=True, progress=told.append)
        assert report.passed and told[-1] == "planting mistakes"
        assert [found.backend for found in report.sensitivity] == ["pt", "tf"]
        assert all(found.planted and not found.missed for found in report.sensitivity)
        facts = report.as_dict()
        assert {row["backend"] for row in facts["sensitivity"]} == {"pt", "tf"}
        assert {row["what"] for row in facts["smallest_changes"]} == {"one weight", "one rotary angle", "epsilon"}
        json.loads(report.to_json())

    def test_backends_run_side_by_side_where_memory_allows(self, checkpoint, installed, monkeypatch):
        together = threading.Barrier(2, timeout=20)

        def meeting(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            together.wait()
            return answering(command)

        monkeypatch.setattr(processes, "run_command", meeting)
        monkeypatch.setattr(processes, "processors", lambda: 4)
        monkeypatch.setattr(processes, "memory", lambda: (2**34, 2**33))
        assert run_parity(checkpoint, ["pt", "tf"]).passed

    def test_a_probe_of_ones_own_is_asked(self, checkpoint, installed, monkeypatch, tmp_path):
        monkeypatch.setattr(processes, "run_command", answering)
        run_parity(checkpoint, ["pt"], probe=make_probe(revealing_config(), seed=9), keep=tmp_path)
        assert Probe.load(tmp_path / "probe.npz").seed == 9

    @pytest.mark.parametrize(
        ("backends", "error", "words"),
        [
            (["jax"], BackendError, "no such backend .*pt, tf, flax"),
            (["pt", "pt"], InputError, "backends: named twice .*pt"),
            ([], BackendError, "no framework is installed"),
        ],
    )
    def test_wrong_names_are_refused_before_anything_runs(self, tmp_path, monkeypatch, backends, error, words):
        if backends != ["jax"]:
            monkeypatch.setattr(run, "choose_backend", lambda name: name)
        with pytest.raises(error, match=words):
            run_parity(tmp_path / "missing", backends)

    def test_a_checkpoint_without_a_language_model_is_refused(self, installed, tmp_path):
        base = write_checkpoint(tmp_path / "base", revealing_config(), revealing_fill(), head="base")
        with pytest.raises(SchemaError, match=r"lm_head"):
            run_parity(base, ["pt"])


def transposed(directory: Path, name: str, weights: str | None = None) -> None:
    """Turn a square matrix where it lies in the file, which no shape shows."""
    opened = open_checkpoint(directory, weights=weights)
    tensor, values = opened.tensors[name], opened.read(name)
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(np.ascontiguousarray(values.T).tobytes())


class TestTheManifest:
    """What all backends agree on may still be other weights than were written."""

    Q_PROJ = "transformer.h.1.attn.q_proj.weight"

    @pytest.fixture
    def model(self, tmp_path, installed, monkeypatch) -> Path:
        monkeypatch.setattr(processes, "run_command", answering)
        return write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill())

    def test_it_is_checked_first_and_what_differs_is_named(self, model, monkeypatch):
        transposed(model, self.Q_PROJ)
        monkeypatch.setattr(processes, "run_command", lambda *a, **k: pytest.fail("a backend was asked"))
        with pytest.raises(FormatError, match=rf"not what was written: tensor {self.Q_PROJ} .*differs"):
            run_parity(model)

    def test_the_report_says_that_it_was_checked(self, model):
        report = run_parity(model, ["pt"])
        assert report.passed and report.manifest == report.as_dict()["manifest"] == "checked"

    def test_the_report_says_that_there_is_none(self, model):
        (model / "manifest.json").unlink()
        assert run_parity(model, ["pt"]).manifest == "missing"

    def test_it_is_not_checked_where_that_is_not_wanted(self, model):
        transposed(model, self.Q_PROJ)
        report = run_parity(model, ["pt"], check_manifest=False)
        assert report.manifest == "skipped"

    @pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
    @pytest.mark.parametrize(("name", "way"), [choice for choice in CHOICES if choice[0] != "other.safetensors"])
    def test_the_chosen_set_is_compared_and_the_report_says_whose_manifest_it_is(
        self, tmp_path, installed, monkeypatch, name, way
    ):
        monkeypatch.setattr(processes, "run_command", answering)
        path, options = named(two_sets(tmp_path / "model", name), name, way)
        report = run_parity(path, ["pt"], weights=options[1] if options else None)
        assert report.passed and report.manifest == "of other weights"
        assert "it is of others" in "".join(map(str, report.summary().renderables))

    @pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
    def test_a_chosen_set_of_the_manifest_is_checked_beside_another(self, tmp_path, installed, monkeypatch):
        monkeypatch.setattr(processes, "run_command", lambda *a, **k: pytest.fail("a backend was asked"))
        model = write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill(), max_shard_bytes=20_000)
        write_checkpoint(tmp_path / "other", revealing_config(), revealing_fill(1))
        (tmp_path / "other" / "model.safetensors").rename(model / "model.safetensors")
        transposed(model, self.Q_PROJ, weights="model.safetensors.index.json")
        with pytest.raises(FormatError, match=rf"not what was written: tensor {self.Q_PROJ} .*differs"):
            run_parity(model, weights="model.safetensors.index.json")

    @pytest.mark.parametrize("name", FOREIGN)
    def test_a_chosen_set_of_another_format_is_to_be_converted(self, tmp_path, installed, name):
        folder = two_sets(tmp_path / "model", name)
        with pytest.raises(FormatError, match=rf"gptj convert {folder} OUT --weights {name}"):
            run_parity(folder, ["pt"], weights=name)

    def test_a_manifest_that_is_none_is_refused(self, model):
        (model / "manifest.json").write_text("{}")
        with pytest.raises(FormatError, match=r"manifest\.json"):
            run_parity(model, ["pt"])


class TestArguments:
    @pytest.mark.parametrize("seed", [-1, 2**63, True, "0", 1.5])
    def test_a_seed_that_no_probe_can_have_is_refused_before_anything_runs(self, checkpoint, installed, seed):
        with pytest.raises(InputError, match="seed: breaks its rule"):
            run_parity(checkpoint, ["pt"], seed=seed)

    @pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "9", True, None])
    def test_a_timeout_that_is_no_time_is_refused(self, checkpoint, installed, timeout_s):
        with pytest.raises(InputError, match="timeout_s: breaks its rule"):
            run_parity(checkpoint, ["pt"], timeout_s=timeout_s)

    def test_a_folder_to_keep_that_is_a_file_is_named(self, checkpoint, installed, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(WriteError, match="file: could not be written"):
            run_parity(checkpoint, ["pt"], keep=tmp_path / "file")

    def test_no_place_for_what_is_not_kept_is_named(self, checkpoint, installed, monkeypatch):
        def full(**options: object) -> None:
            raise OSError(28, "No space left on device", "/tmp/x")

        monkeypatch.setattr(run.tempfile, "TemporaryDirectory", full)
        with pytest.raises(WriteError, match="No space left"):
            run_parity(checkpoint, ["pt"])

    def test_a_record_that_was_not_asked_for_is_refused(self, checkpoint, installed, monkeypatch):
        def other(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            done = answering(command)
            out = Path(command[command.index("--out") + 1])
            facts = json.loads((out / "record.json").read_text())
            (out / "record.json").write_text(json.dumps(facts | {"backend": "flax"}))
            return done

        monkeypatch.setattr(processes, "run_command", other)
        with pytest.raises(FormatError, match=r"not the record that was asked for .*pt in float32, found flax"):
            run_parity(checkpoint, ["pt"])


class TestOpenOracle:
    def test_it_reads_the_weights_rounded_as_a_backend_loads_them(self, checkpoint):
        import ml_dtypes

        name, weights = "lm_head.bias", revealing_weights(revealing_config())
        whole, rounded = (open_oracle(checkpoint, dtype=dtype).read(name) for dtype in ("float64", "bfloat16"))
        assert (whole == weights[name]).all()
        assert (rounded == weights[name].astype(ml_dtypes.bfloat16).astype(float)).all() and (rounded != whole).any()


def test_importing_the_judgement_imports_no_framework():
    code = (
        "import sys, gptj.parity.compare, gptj.parity.run, gptj.parity.record; "
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_package_can_be_imported():
    import gptj.parity

    for name in gptj.parity.__all__:
        assert callable(getattr(gptj.parity, name)), name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = gptj.parity.nonsense
