"""The judgement is tested without any framework; the end-to-end proof on the backends that GPTJ_TEST_BACKENDS names.

A backend that is named and cannot be imported fails. Where none is named, the end-to-end tests are not collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from wings import named_backends

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill

END_TO_END = [
    *(
        "test_demo.py",
        "test_end_to_end.py",
        "test_finetune_agrees.py",
        "test_imports.py",
        "test_matrix.py",
        "test_plugin.py",
    ),
    "test_training_agrees.py",
]

collect_ignore = [] if named_backends() else [*END_TO_END]
if {*named_backends()} != {"pt", "tf", "flax"}:
    collect_ignore.append("test_workflow.py")  # whose page has all three


@pytest.fixture(scope="session")
def backend_names() -> tuple[str, ...]:
    return named_backends()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The revealing model, float32, on disk."""
    return write_checkpoint(tmp_path_factory.mktemp("revealing") / "model", revealing_config(), revealing_fill())
