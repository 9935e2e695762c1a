"""The calls of transformers 4.34's GPT-J page, one by one, on a small folder in place of the hub's repositories.

Only names change: AutoTokenizer is GPTJTokenizer, AutoModelForCausalLM is GPTJForCausalLM, and the module is the wing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj import GPTJConfig, GPTJTokenizer
from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_fill
from gptj.pretrained import FreshWeightsWarning

pytestmark = pytest.mark.filterwarnings("ignore::gptj.pretrained.FreshWeightsWarning")

TEXT = "Hello, my dog is cute"
QUESTION = "Who was Jim Henson?", "Jim Henson was a nice puppet"
PROMPT = (
    "In a shocking finding, scientists discovered a herd of unicorns living in a remote, "
    "previously unexplored valley, in the Andes Mountains. Even more surprising to the "
    "researchers was the fact that the unicorns spoke perfect English."
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPTJConfig(n_positions=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    files = GPTJTokenizer.gpt2().files()
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "gptj", config, revealing_fill(0), extra_files=files)


@pytest.fixture
def page(wing: Any, repository: Path) -> Any:
    """The wing's classes by the page's names."""
    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[wing.name]

    def find(name: str) -> Any:
        return getattr(wing.module, prefix + name)

    return find


def tensors(wing: Any) -> str:
    return {"pt": "pt", "tf": "tf", "flax": "np"}[wing.name]


def test_loading_in_half_precision_from_a_branch(wing, page, repository):
    arguments: dict[str, Any] = {"revision": "float16"}
    if wing.name == "pt":
        import torch

        model = page("GPTJForCausalLM").from_pretrained(repository, torch_dtype=torch.float16, **arguments).to("cpu")
        assert model.dtype == torch.float16
    elif wing.name == "tf":
        model = page("GPTJForCausalLM").from_pretrained(repository, torch_dtype="float16", **arguments)
        assert model.dtype == "float16"
    else:
        import jax.numpy as jnp

        model = page("GPTJForCausalLM").from_pretrained(repository, dtype=jnp.float16, **arguments)
        assert model.dtype == jnp.float16  # as on the page: of the computation, and not of the parameters


def test_sampling_a_text(wing, page, repository):
    model = page("GPTJForCausalLM").from_pretrained(repository)
    tokenizer = GPTJTokenizer.from_pretrained(repository)
    input_ids = tokenizer(PROMPT, return_tensors=tensors(wing)).input_ids
    gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
    gen_text = tokenizer.batch_decode(gen_tokens)[0]
    assert gen_text.startswith(PROMPT) and gen_tokens.shape[1] <= 100


def test_a_configuration_makes_a_model(page):
    GPTJConfig()
    configuration = GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    model = page("GPTJModel")(configuration)
    assert model.config == configuration


def test_the_base_models_hidden_states(wing, page, repository):
    tokenizer = GPTJTokenizer.from_pretrained(repository)
    model = page("GPTJModel").from_pretrained(repository)
    inputs = tokenizer(TEXT, return_tensors="jax" if wing.name == "flax" else tensors(wing))
    outputs = model(inputs) if wing.name == "tf" else model(**inputs)
    assert outputs.last_hidden_state.shape == (1, 6, 32)


def test_the_language_models_loss_and_logits(wing, page, repository):
    tokenizer = GPTJTokenizer.from_pretrained(repository)
    model = page("GPTJForCausalLM").from_pretrained(repository)
    inputs = tokenizer(TEXT, return_tensors=tensors(wing))
    if wing.name == "pt":
        outputs = model(**inputs, labels=inputs["input_ids"])
        assert float(wing.numpy(outputs.loss)) > 0
    else:
        outputs = model(inputs) if wing.name == "tf" else model(**inputs)
    assert outputs.logits.shape == (1, 6, 50400) and outputs.logits[:, -1].shape == (1, 50400)


def test_classes_of_a_text(wing, page, repository):
    tokenizer = GPTJTokenizer.from_pretrained(repository)
    model = page("GPTJForSequenceClassification").from_pretrained(repository)
    inputs = tokenizer(TEXT, return_tensors=tensors(wing))
    logits = wing.call(model, **inputs).logits
    predicted_class_id = int(np.argmax(wing.numpy(logits), axis=-1)[0])
    assert model.config.id2label[predicted_class_id].startswith("LABEL_")
    num_labels = len(model.config.id2label)
    model = page("GPTJForSequenceClassification").from_pretrained(repository, num_labels=num_labels)
    if wing.name == "pt":
        import torch

        labels: Any = torch.tensor([1])
    elif wing.name == "tf":
        import tensorflow as tf

        labels = tf.constant(1)
    else:
        labels = np.array([1])
    assert float(wing.numpy(model(**inputs, labels=labels).loss)) > 0


def test_several_classes_of_a_text(wing, page, repository):
    tokenizer = GPTJTokenizer.from_pretrained(repository)
    kind = {"problem_type": "multi_label_classification"}
    model = page("GPTJForSequenceClassification").from_pretrained(repository, **kind)
    inputs = tokenizer(TEXT, return_tensors=tensors(wing))
    num_labels = len(model.config.id2label)
    model = page("GPTJForSequenceClassification").from_pretrained(repository, num_labels=num_labels, **kind)
    if wing.name != "pt":
        assert float(wing.numpy(model(**inputs, labels=np.ones((1, num_labels), np.float32)).loss)) > 0
        return
    import torch

    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > -1]
    hot = torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels)
    assert float(wing.numpy(model(**inputs, labels=torch.sum(hot, dim=1).to(torch.float)).loss)) > 0


def test_an_answer_to_a_question(wing, page, repository):
    tokenizer = GPTJTokenizer.from_pretrained(repository)
    model = page("GPTJForQuestionAnswering").from_pretrained(repository)
    question, text = QUESTION
    inputs = tokenizer(question, text, return_tensors=tensors(wing))
    outputs = wing.call(model, **inputs)
    if wing.name == "pt":
        answer_start_index, answer_end_index = outputs.start_logits.argmax(), outputs.end_logits.argmax()
    else:
        answer_start_index = int(np.argmax(wing.numpy(outputs.start_logits), axis=-1)[0])
        answer_end_index = int(np.argmax(wing.numpy(outputs.end_logits), axis=-1)[0])
    assert inputs.input_ids[0, answer_start_index : answer_end_index + 1].ndim == 1
    if wing.name == "pt":
        import torch

        ends: Any = torch.tensor([14]), torch.tensor([15])
    elif wing.name == "tf":
        import tensorflow as tf

        ends = tf.constant([14]), tf.constant([15])
    else:
        ends = np.array([14]), np.array([15])
    outputs = model(**inputs, start_positions=ends[0], end_positions=ends[1])
    assert float(wing.numpy(outputs.loss).mean()) >= 0


def test_a_head_that_the_folder_lacks_is_announced(page, repository):
    with pytest.warns(FreshWeightsWarning, match=r"score\.weight"):
        page("GPTJForSequenceClassification").from_pretrained(repository)
