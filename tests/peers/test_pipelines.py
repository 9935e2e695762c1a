"""transformers' pipelines, unchanged, over our PyTorch models and our tokenizer: what they say of their own."""

import pytest
import transformers
from transformers import AutoTokenizer, pipeline

from gptj.errors import InputError
from gptj.pretrained import FreshWeightsWarning
from gptj.pt import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel
from gptj.text.tokenizer import GPTJTokenizer

PROMPTS = ["The quick brown", "jumps over the lazy dog, and"]
NEW = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def ours(folder):
    return pipeline(
        "text-generation",
        model=GPTJForCausalLM.from_pretrained(folder),
        tokenizer=GPTJTokenizer.from_pretrained(folder),
        device="cpu",
    )


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.GPTJForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.filterwarnings("ignore:.*generation flags.*")
@pytest.mark.parametrize(
    "options",
    [{}, {"return_full_text": False}, {"return_tensors": True}, {"prefix": "lazy "},
     {"clean_up_tokenization_spaces": False}, {"num_beams": 3}, {"repetition_penalty": 1.3}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("prompt", [*PROMPTS, PROMPTS], ids=["one", "another", "several"])
def test_text_is_the_same_as_of_their_own_model_and_tokenizer(ours, theirs, prompt, options):
    assert ours(prompt, **NEW, **options) == theirs(prompt, **NEW, **options)


def test_a_batch_of_prompts_of_different_lengths_says_what_each_says_alone(ours):
    assert ours(PROMPTS, batch_size=2, **NEW) == [ours(prompt, **NEW) for prompt in PROMPTS]


def test_several_texts_are_sampled_for_a_prompt(ours):
    texts = ours(PROMPTS[0], max_new_tokens=8, do_sample=True, temperature=1.5, num_return_sequences=3)
    assert len(texts) == 3 and all(text["generated_text"].startswith(PROMPTS[0]) for text in texts)


def test_an_empty_prompt_begins_with_the_bos_token(ours):
    assert len(ours("", return_tensors=True, **NEW)[0]["generated_token_ids"]) >= 1


def test_a_long_prompt_is_cut_where_the_tokenizer_knows_the_length(ours):
    ours.tokenizer.model_max_length = 16
    try:
        [text] = ours(" ".join(PROMPTS * 3), handle_long_generation="hole", return_tensors=True, **NEW)
    finally:
        ours.tokenizer.model_max_length = None
    assert len(text["generated_token_ids"]) == 16


def test_a_pipeline_is_saved_and_opened_by_both(ours, theirs, tmp_path):
    ours.save_pretrained(tmp_path / "saved")
    again = pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
    assert again(PROMPTS[0], **NEW) == theirs(PROMPTS[0], **NEW)
    model = GPTJForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path / "saved")
    mine = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert mine(PROMPTS[0], **NEW) == ours(PROMPTS[0], **NEW)


@pytest.mark.parametrize(
    ("task", "name", "given"),
    [
        ("feature-extraction", "GPTJModel", PROMPTS[0]),
        ("text-classification", "GPTJForSequenceClassification", PROMPTS[0]),
    ],
)
def test_the_other_heads_pipelines_say_the_same(folder, tmp_path, task, name, given):
    own = {"GPTJModel": GPTJModel, "GPTJForSequenceClassification": GPTJForSequenceClassification}[name]
    if own is GPTJModel:
        model = own.from_pretrained(folder)
    else:
        with pytest.warns(FreshWeightsWarning):
            model = own.from_pretrained(folder)
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 64
    model.save_pretrained(tmp_path / "head")
    tokenizer.save_pretrained(tmp_path / "head")
    their_model = getattr(transformers, name).from_pretrained(tmp_path / "head")
    theirs = pipeline(task, model=their_model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "head"), device="cpu")
    mine = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    found, expected = (flat(one(given)) for one in (mine, theirs))
    assert found == pytest.approx(expected, abs=2e-5) and len(found) > 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of their arrays, in their pipeline
def test_answering_questions_needs_windows_of_a_text_which_our_tokenizer_does_not_cut(folder):
    """The error names the call's argument; transformers' own tokenizer, over the same folder, has it."""
    with pytest.warns(FreshWeightsWarning):
        model = GPTJForQuestionAnswering.from_pretrained(folder)
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 64
    question = {"question": "The dog?", "context": PROMPTS[1]}
    with pytest.raises(InputError, match="stride: not supported"):
        pipeline("question-answering", model=model, tokenizer=tokenizer, device="cpu")(**question)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    answer = pipeline("question-answering", model=model, tokenizer=tokenizer, device="cpu")(**question)
    assert answer["answer"] in PROMPTS[1]


def flat(value):
    """The numbers in an answer, and the numbers of the characters of its words."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    if isinstance(value, list):
        return [number for one in value for number in flat(one)]
    return [*value.encode()] if isinstance(value, str) else [value]
