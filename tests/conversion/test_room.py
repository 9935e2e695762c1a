"""The room that a conversion needs is known before it begins; a system that does not say what there is is no error."""

from __future__ import annotations

import errno
import shutil
from types import SimpleNamespace

import pytest
from checkpoint_samples import CONFIG, write_sample
from gptj_conversion.convert import convert, plan

from gptj.config.schema import schema
from gptj.errors import WriteError

BYTES = 4 * sum(row.size for row in schema(CONFIG, "causal_lm"))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_room_for_all_tensors_is_asked_for_before_the_first_is_read(tmp_path, monkeypatch, dtype):
    source = write_sample(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=BYTES - 1))
    assert plan(source, tmp_path / "out", dtype=dtype).nbytes == BYTES
    with pytest.raises(WriteError, match=f"not enough space .*expected {BYTES} bytes free"):
        convert(source, tmp_path / "out", dtype=dtype, progress=lambda *event: pytest.fail("work was begun"))
    assert not (tmp_path / "out").exists()


def test_a_system_that_does_not_say_how_much_room_there_is_is_written_to(tmp_path, monkeypatch):
    source = write_sample(tmp_path / "source")

    def fail(path):
        raise OSError(errno.ENOSYS, "statfs")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    planned = plan(source, tmp_path / "out")
    assert planned.free_bytes is None and planned.fits
    assert convert(source, tmp_path / "out").is_dir()
