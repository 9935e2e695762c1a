"""PEFT's LoRA with its default targets, unchanged, over our PyTorch model."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from gptj.pretrained import FreshWeightsWarning
from gptj.pt import GPTJForCausalLM, GPTJForSequenceClassification

IDS = torch.tensor([[5, 9, 200, 31, 7, 64]])


def adapted(folder, **options):
    torch.manual_seed(0)
    model = GPTJForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))


def train(model, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adapters_are_trained_and_nothing_else(folder):
    model = adapted(folder)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name and (".q_proj." in name or ".v_proj." in name) for name in names)
    losses = train(model)
    assert losses[-1] < losses[0]


def test_all_linear_means_the_blocks_and_not_the_head(folder):
    model = adapted(folder, target_modules="all-linear")
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_adapters_train_with_recomputed_blocks(folder):
    model = adapted(folder)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert model.base_model.model.is_gradient_checkpointing
    losses = train(model)
    assert losses[-1] < losses[0]


def test_text_is_generated_and_merging_changes_nothing_of_it(folder, tmp_path):
    model = adapted(folder)
    train(model)
    made = model.generate(input_ids=IDS, max_new_tokens=8)
    logits = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(GPTJForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(again.eval()(IDS).logits, logits)
    merged = model.merge_and_unload()
    assert isinstance(merged, GPTJForCausalLM)
    assert torch.equal(merged.generate(IDS, max_new_tokens=8), made)
    merged.save_pretrained(tmp_path / "merged")
    opened = GPTJForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(opened(IDS).logits, logits, atol=2e-5)


def test_a_classifier_is_adapted_too(folder):
    with pytest.warns(FreshWeightsWarning, match=r"score\.weight"):
        model = GPTJForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4))
    assert isinstance(adapted, peft.PeftModelForSequenceClassification)
    loss = adapted(input_ids=IDS, labels=torch.tensor([2])).loss
    loss.backward()
    assert any(p.grad is not None for p in adapted.parameters())
