"""A fingerprint taken from tensors on their way to the disk is the one that is taken from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import CONFIG, array_of

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.config.schema import HEADS, Head, schema, schema_by_name
from gptj.parity import fingerprint
from gptj.parity.fingerprint import FINGERPRINT_TOLERANCE, FingerprintObserver, read_by_row, take_fingerprint
from gptj.reading.manifest import Fingerprint


def show(config: GPTJConfig, head: Head, *, rows: int = 3, without: str = "") -> Fingerprint | None:
    """What a witness says that is shown each tensor some rows at a time; the rows are spoilt once they are used."""
    with FingerprintObserver(config, head) as witness:
        for row in schema(config, head):
            if row.name == without:
                continue
            values = array_of(row)
            for at in range(0, len(values), rows):
                witness.see(row.name, values[at : at + rows])
            witness.wait_for(row.name)
            values[...] = np.nan
        return witness.fingerprint()


def require_same(one: Fingerprint | None, other: Fingerprint) -> None:
    assert one is not None
    assert (one.token_ids, one.output, one.places) == (other.token_ids, other.output, other.places)
    np.testing.assert_allclose([*one.values, one.norm], [*other.values, other.norm], 0, FINGERPRINT_TOLERANCE)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_witness_takes_the_fingerprint_of_what_passes_by(head: Head, rows: int) -> None:
    by_name = schema_by_name(CONFIG, head)
    require_same(show(CONFIG, head, rows=rows), take_fingerprint(CONFIG, head, lambda name: array_of(by_name[name])))


def test_another_tensor_makes_another_fingerprint() -> None:
    """So the test above could fail."""
    taken = show(CONFIG, "causal_lm")
    turned = show(CONFIG.replace(layer_norm_epsilon=1e-3), "causal_lm")
    assert taken is not None and turned is not None and abs(taken.norm - turned.norm) > 1e-6


@pytest.mark.parametrize("without", ["transformer.wte.weight", "transformer.h.0.attn.q_proj.weight", "lm_head.bias"])
def test_who_has_not_seen_everything_says_nothing(without: str) -> None:
    assert show(CONFIG, "causal_lm", without=without) is None


def test_a_tied_head_needs_a_tensor_that_has_passed() -> None:
    assert show(CONFIG.replace(tie_word_embeddings=True), "causal_lm") is None


def test_a_writer_that_stops_early_is_not_waited_for() -> None:
    row = schema(CONFIG)[0]
    with pytest.raises(ZeroDivisionError), FingerprintObserver(CONFIG, "causal_lm") as witness:
        witness.see(row.name, array_of(row))
        raise ZeroDivisionError


def test_an_error_of_the_witness_reaches_who_asks_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(fingerprint, "_widen", fail)
    with pytest.raises(MemoryError):
        show(CONFIG, "causal_lm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", None])
def test_a_writer_shows_its_witness_what_it_stores(tmp_path: Path, dtype: str | None) -> None:
    with FingerprintObserver(CONFIG, "causal_lm") as witness:
        write_checkpoint(tmp_path / "x", CONFIG, array_of, dtype=dtype, witness=witness)
        taken = witness.fingerprint()
    require_same(taken, take_fingerprint(CONFIG, "causal_lm", read_by_row(open_checkpoint(tmp_path / "x"))))
