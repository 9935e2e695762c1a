"""Every lawful oddity opens from the command line, with the good folder's weights and tokens, and says what is odd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forked import gptj
from lawful import good_folder, oddities
from tokenizer_samples import CORPUS, small

from gptj import GPTJTokenizer
from gptj.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    opened = open_checkpoint(good_folder(tmp_path_factory.mktemp("good") / "model"))
    return {name: opened.read(name) for name in opened.tensors}


@pytest.mark.parametrize("oddity", oddities(), ids=lambda oddity: oddity.what)
def test_a_lawful_oddity_is_converted_to_the_same_weights(tmp_path: Path, good, oddity):
    folder = good_folder(tmp_path / "model")
    oddity.make(folder)
    options = [word for name, value in oddity.arguments.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = gptj("convert", folder / oddity.inside, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert oddity.says is None or oddity.says in done.stderr, done.stderr
    said = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert all(sum(line in other for other in said) == 1 for line in said), done.stderr  # each thing once
    opened = open_checkpoint(tmp_path / "out")
    assert opened.tensors.keys() == good.keys()
    assert all(np.array_equal(opened.read(name), array) for name, array in good.items())
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(CORPUS[0]) == small().encode(CORPUS[0])
