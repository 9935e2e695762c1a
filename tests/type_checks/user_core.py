"""What a user writes who takes the classes from `gptj` itself: a checker takes PyTorch's. Checked, never run."""

from __future__ import annotations

from typing import assert_type

import torch

import gptj
from gptj import GenerationConfig, GPTJConfig, GPTJError, GPTJForCausalLM, GPTJTokenizer, backend
from gptj.outputs import CausalLMOutputWithPast

config = GPTJConfig(n_layer=2)
assert_type(config, GPTJConfig)
model = GPTJForCausalLM.from_pretrained("gpt-j-6b")
assert_type(model, GPTJForCausalLM)
assert_type(model([[1, 2]]), CausalLMOutputWithPast[torch.Tensor])
assert_type(model.generate([[1, 2]], GenerationConfig(max_new_tokens=4)), torch.Tensor)
assert_type(GPTJTokenizer.from_pretrained("gpt-j-6b").encode("text"), list[int])
assert_type(gptj.__version__, str)
backend("flax")
try:
    raise GPTJError("a problem")
except gptj.GPTJError as error:
    assert_type(error.hint, str | None)

gptj.GPTJTokeniser  # wrong: misspelt
gptj.GPTJForCasualLM  # wrong: misspelt
GPTJConfig(n_layers=2)  # wrong: misspelt
