"""How `gptj generate` ends when it is told to: the same code in every wing, here in the one that starts soonest."""

from __future__ import annotations

import signal
from pathlib import Path

from commands import LETTER, ended, endless_model, started


def test_G6_a_termination_is_143_and_what_was_made_is_out(tmp_path: Path) -> None:
    process = started("pt", endless_model(tmp_path / "model"), "To", "--stream", "--max-new-tokens", "2000")
    begun = process.stdout.read(22)
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert begun.decode() == "To" + 20 * LETTER and done.rc == 143 and done.err == ""


def test_G6_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    with started("pt", endless_model(tmp_path / "model"), "To", "--stream", "--max-new-tokens", "2000") as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(600) == 1
