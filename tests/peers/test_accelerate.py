"""Accelerate's loop, unchanged, over our PyTorch model."""

import torch
from accelerate import Accelerator

from gptj.pt import GPTJForCausalLM


def test_a_loop_of_accelerate_trains_saves_and_opens(folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = GPTJForCausalLM.from_pretrained(folder)
    data = torch.utils.data.DataLoader(torch.randint(0, 280, (8, 12)), batch_size=4)
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(
        tmp_path / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    opened = GPTJForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in opened.state_dict().items())
