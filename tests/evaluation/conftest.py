"""A small model, and tasks of lm-evaluation-harness over files beside it; nothing is asked of a network.

The backends are those that GPTJ_TEST_BACKENDS names; one that cannot be imported fails.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

for _name, _value in {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "USE_TF": "0",
    "USE_FLAX": "0", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "TOKENIZERS_PARALLELISM": "false",
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)

from tokenizer_samples import CORPUS
from wings import named_backends

from gptj import GPTJTokenizer
from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.parity.revealing import revealing_fill

LONG = " ".join(CORPUS)

CHOICES = [
    {"question": "The quick brown fox", "choices": ["jumps", "sleeps over the", "'tis"], "answer": 0},
    {"question": "Whether 'tis nobler", "choices": ["in the mind", "or", "won"], "answer": 2},
    {"question": "naïve café, ", "choices": ["Ελληνικά", "漢字", "x"], "answer": 1},
    {"question": LONG, "choices": ["It's", "the dog's day", " "], "answer": 1},
    {"question": "a", "choices": ["b", "c", "d"], "answer": 1},
    {"question": "", "choices": ["The", "<|endoftext|>dog", "won"], "answer": 0},
    {"question": "<|endoftext|>The", "choices": ["quick", "lazy", "dog"], "answer": 2},
]
TEXTS = [{"page": LONG}, {"page": CORPUS[1]}, {"page": "x"}, {"page": "<|endoftext|>naïve"}, {"page": "  spaces \n\n"}]
QUESTIONS = [
    {"question": "The quick", "answer": "x"},
    {"question": LONG, "answer": "y"},
    {"question": "won", "answer": "e"},
]

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_last_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "local_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "local_continue": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["the", "\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", named_backends(), scope="session")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with few positions, so that texts are longer, and its tokenizer."""
    path = tmp_path_factory.mktemp("evaluated") / "model"
    tokenizer = GPTJTokenizer.train(CORPUS, 300)
    config = GPTJConfig(
        vocab_size=320,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    write_checkpoint(path, config, revealing_fill(0))
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks, one a kind of request."""
    path = tmp_path_factory.mktemp("tasks")
    data = {"local_choice": CHOICES, "local_last_word": CHOICES, "local_perplexity": TEXTS, "local_continue": QUESTIONS}
    os.environ["HF_DATASETS_CACHE"] = str(path / "cache")
    for name, text in TASKS.items():
        file = path / f"{name}.json"
        file.write_text("\n".join(map(json.dumps, data[name])))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test"
        (path / f"{name}.yaml").write_text(head + text)
    return path
