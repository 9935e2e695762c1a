"""Every example of the pages on generation, fine-tuning and adapters, and of each framework's page, as doctests."""

import doctest
from pathlib import Path

import pytest
from adapter_samples import write_sample_adapter
from finetune_samples import lines_file

from gptj import GPTJConfig, GPTJTokenizer
from gptj.checkpoint import write_checkpoint
from gptj.finetune import Settings, finetune
from gptj.finetune.curve import read_curve
from gptj.parity.revealing import revealing_fill

DOCS = Path(__file__).parents[2] / "docs"
PAGE = {"pt": "pytorch.md", "tf": "tensorflow.md", "flax": "flax.md"}
FOLDERS = {
    "gptj-tiny": "causal_lm",
    "gptj-tiny-classifier": "sequence_classification",
    "gptj-tiny-answerer": "question_answering",
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folders that the pages speak of, in the current directory, with GPT-2's tokenizer."""
    config = GPTJConfig(
        vocab_size=50400,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        num_labels=3,
        pad_token_id=50256,
    )
    files = GPTJTokenizer.gpt2().files()
    for name, head in FOLDERS.items():
        write_checkpoint(tmp_path / name, config, revealing_fill(0), head=head, extra_files=files)
    monkeypatch.chdir(tmp_path)


def test_every_example_on_the_backends_page_runs(wing, folders):
    found = doctest.testfile(
        str(DOCS / PAGE[wing.name]), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert found.failed == 0 and found.attempted >= 20


def test_every_example_of_generation_runs(wing, folders, monkeypatch):
    monkeypatch.setenv("GPTJ_BACKEND", wing.name)
    found = doctest.testfile(str(DOCS / "generation.md"), module_relative=False)
    assert found.failed == 0 and found.attempted >= 9


def test_the_recipes_of_adapters_run(wing, folders, monkeypatch):
    monkeypatch.setenv("GPTJ_BACKEND", wing.name)
    for name, seed in (("verse", 0), ("prose", 1)):
        write_sample_adapter(Path(f"{name}-adapter"), config=GPTJConfig.from_file("gptj-tiny"), seed=seed)
    page = (DOCS / "adapters.md").read_text()
    loading, recipes = page.split("## Train")
    name = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}[wing.name]
    recipe = next(recipe for recipe in recipes.split("## PEFT")[0].split("\n### ") if recipe.startswith(name))
    test = doctest.DocTestParser().get_doctest(loading + recipe, {}, name, "adapters.md", 0)
    found = doctest.DocTestRunner().run(test)
    assert found.failed == 0 and found.attempted >= 22


def test_the_recipe_of_fine_tuning_runs(wing, folders):
    lines_file(Path.cwd(), [{"text": "The quick brown fox jumps over the lazy dog. " * 4}] * 12, "lines.jsonl")
    page = (DOCS / "finetune.md").read_text()
    data, *recipes = page[page.index("## In Python") :].split("\n### ")
    name = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}[wing.name]
    recipe = data + next(recipe for recipe in recipes if recipe.startswith(name))
    test = doctest.DocTestParser().get_doctest(recipe, {}, name, "finetune.md", 0)
    found = doctest.DocTestRunner().run(test, clear_globs=False)
    assert found.failed == 0 and found.attempted >= 14
    settings = Settings(length=32, batch=2, steps=8, lr=1e-3, schedule="constant", warmup=0)
    finetune("gptj-tiny", "lines.jsonl", "command", settings, backend=wing.name, device="cpu")
    rows = read_curve(Path("command/loss.csv"))
    assert [row.loss for row in rows] == pytest.approx([float(loss) for loss in test.globs["losses"]], rel=1e-4)
