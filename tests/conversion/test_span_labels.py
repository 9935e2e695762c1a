"""A question-answering folder with num_labels 3 is written with 2 in every format: a start and an end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gptj_conversion.convert import convert, open_source
from gptj_conversion.verify import verify

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.config.schema import schema
from gptj.parity.revealing import revealing_config, revealing_fill

FORMATS = ["safetensors", "bin", "flax", "tf"]
LABELS = {
    "num_labels": {"num_labels": 3},
    "names": {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    "one": {"num_labels": 1},
}


def relabelled(folder, labels):
    """The folder whose config.json says another number of labels."""
    members = json.loads((folder / "config.json").read_text())
    for name in ("num_labels", "id2label", "label2id"):
        members.pop(name, None)
    (folder / "config.json").write_text(json.dumps(members | LABELS[labels]))
    (folder / "manifest.json").unlink()
    return folder


def labels_of(folder) -> int:
    """As transformers counts them: the names in id2label, else num_labels, else two."""
    members = json.loads((folder / "config.json").read_text())
    return len(members["id2label"]) if "id2label" in members else members.get("num_labels", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model"
    return write_checkpoint(path, revealing_config(n_layer=1), revealing_fill(0), head="question_answering")


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_is_written_with_two_labels(whole, tmp_path, to, labels):
    source = relabelled(convert(whole, tmp_path / "source", fingerprint=False), labels)
    assert labels_of(source) != 2
    out = convert(source, tmp_path / "out", to=to)
    assert labels_of(out) == GPTJConfig.from_file(out).num_labels == 2
    verify(out, fingerprint=True)
    written, expected = open_source(out), open_checkpoint(whole)
    assert written.head == "question_answering"
    for row in schema(written.config, "question_answering"):
        assert np.array_equal(written.read(row), expected.read(row.name))


@pytest.mark.parametrize("form", FORMATS[1:])
def test_every_format_is_read_whatever_its_labels(whole, tmp_path, form):
    source = relabelled(convert(whole, tmp_path / "source", to=form, fingerprint=False), "names")
    out = convert(source, tmp_path / "out", fingerprint=False)
    assert labels_of(out) == 2
    assert open_checkpoint(out).tensors["qa_outputs.weight"].shape[0] == 2


@pytest.mark.parametrize("to", FORMATS)
def test_a_classifier_keeps_its_labels(tmp_path, to):
    config = revealing_config(n_layer=1, num_labels=3)
    source = write_checkpoint(tmp_path / "model", config, revealing_fill(0), head="sequence_classification")
    assert labels_of(convert(source, tmp_path / "out", to=to, fingerprint=False)) == 3
