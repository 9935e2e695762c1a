"""A limit of the address space: a framework that it is too small for is refused by name, and never aborts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from wings import Wing


@pytest.mark.parametrize("kilobytes", [400_000, 900_000, 1_200_000])
def test_a_framework_loads_or_is_refused_in_one_line(wing: Wing, folder: Callable[..., Path], kilobytes) -> None:
    words = [sys.executable, "-m", "gptj", "generate", folder(), "--token-ids", "1 2", "--max-new-tokens", "2"]
    command = f'ulimit -v {kilobytes}; exec "$@" --backend {wing.name}'
    done = subprocess.run(["bash", "-c", command, "bash", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"gptj: LimitError: gptj.{wing.name}: ") and "address space" in done.stderr
    assert done.returncode or kilobytes > 400_000, "it was loaded in less than any framework takes"
