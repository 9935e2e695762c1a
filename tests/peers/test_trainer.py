"""transformers' Trainer and data collator, unchanged, over our PyTorch model and our tokenizer."""

import shutil

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from gptj.errors import WriteError
from gptj.pt import GPTJForCausalLM
from gptj.text.tokenizer import GPTJTokenizer

TEXTS = ["The quick brown fox", "jumps over the lazy dog,", "and the dog sleeps on.", "The lazy fox"] * 4


def trainer_of(model, tokenizer, output, **options):
    tokenizer.pad_token = tokenizer.eos_token
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[tokenizer(text, truncation=True, max_length=16) for text in TEXTS],
        eval_dataset=[tokenizer(text) for text in TEXTS[:4]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}], ids=["plain", "checkpointing"]
)
def test_a_model_is_trained_saved_and_opened_again(folder, tmp_path, options):
    model, tokenizer = GPTJForCausalLM.from_pretrained(folder), GPTJTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = trainer_of(model, tokenizer, tmp_path / "out", max_steps=4, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(tmp_path / "saved")
    opened = GPTJForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(opened, model)
    assert opened.config.pad_token_id == tokenizer.pad_token_id
    assert GPTJTokenizer.from_pretrained(tmp_path / "saved").encode("The fox") == tokenizer.encode("The fox")


def test_training_that_was_cut_off_goes_on_as_if_it_had_not_been(folder, tmp_path):
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    whole = GPTJForCausalLM.from_pretrained(folder)
    trainer_of(whole, tokenizer, tmp_path / "out", max_steps=4).train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    resumed = GPTJForCausalLM.from_pretrained(folder)
    trainer = trainer_of(resumed, tokenizer, tmp_path / "out", max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same(resumed, whole)


def test_a_checkpoint_of_the_trainer_is_a_folder_of_ours(folder, tmp_path):
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    model = GPTJForCausalLM.from_pretrained(folder)
    trainer_of(model, tokenizer, tmp_path / "out", max_steps=2).train()
    assert same(GPTJForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2"), model)


def test_the_model_is_saved_beside_the_checkpoints_and_training_goes_on_from_them(folder, tmp_path):
    """The end of most scripts: train, save_model() and the tokenizer into output_dir; and the same after a resume."""
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    whole = GPTJForCausalLM.from_pretrained(folder)
    trainer = trainer_of(whole, tokenizer, tmp_path / "out", max_steps=4)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"checkpoint-2", "checkpoint-4", "config.json", "model.safetensors", "tokenizer.json"}
    assert same(GPTJForCausalLM.from_pretrained(tmp_path / "out"), whole)
    assert GPTJTokenizer.from_pretrained(tmp_path / "out").encode("The fox") == tokenizer.encode("The fox")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    for name in ("config.json", "manifest.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "out" / name).unlink()
    resumed = GPTJForCausalLM.from_pretrained(folder)
    trainer = trainer_of(resumed, tokenizer, tmp_path / "out", max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert same(GPTJForCausalLM.from_pretrained(tmp_path / "out"), whole)
    with pytest.raises(WriteError, match="Say overwrite"):
        trainer.save_model()
    resumed.save_pretrained(tmp_path / "out", overwrite=True)
    assert same(GPTJForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4"), resumed)
