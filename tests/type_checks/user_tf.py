"""What a user writes with `gptj.tf`, and what a type checker is to know of it. Checked, never run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_type

import tensorflow as tf  # type: ignore[import-untyped]

import gptj.tf as gptj
from gptj.generation import GenerateOutput, TokenStep
from gptj.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)

tokenizer = gptj.GPTJTokenizer.from_pretrained("gpt-j-6b")
assert_type(tokenizer, gptj.GPTJTokenizer)
model = gptj.GPTJForCausalLM.from_pretrained("gpt-j-6b")
assert_type(model, gptj.GPTJForCausalLM)
assert_type(model.config, gptj.GPTJConfig)
pair = gptj.GPTJForCausalLM.from_pretrained("gpt-j-6b", output_loading_info=True)
assert_type(pair, tuple[gptj.GPTJForCausalLM, dict[str, list[Any]]])

prompt = tokenizer("Hello, my dog is cute")
output = model(**prompt)
assert_type(output, CausalLMOutputWithPast[tf.Tensor])
assert_type(output.logits, tf.Tensor)
assert_type(output.past_key_values, KVCache[tf.Tensor] | None)
assert_type(output.loss, tf.Tensor | None)
assert_type(model(prompt["input_ids"], return_dict=False), tuple[Any, ...])
assert_type(gptj.GPTJModel.from_pretrained("x")(**prompt), BaseModelOutputWithPast[tf.Tensor])
labels = gptj.GPTJForSequenceClassification.from_pretrained("x", num_labels=3)
assert_type(labels(**prompt), SequenceClassifierOutputWithPast[tf.Tensor])
spans = gptj.GPTJForQuestionAnswering.from_pretrained("x")
assert_type(spans(**prompt), QuestionAnsweringModelOutput[tf.Tensor])
assert_type(spans(**prompt).start_logits, tf.Tensor)

ids = prompt["input_ids"]
tokens = model.generate(ids, max_new_tokens=20, do_sample=True, seed=1, eos_token_id=[1, 2])
assert_type(tokens, tf.Tensor)
assert_type(model.generate(**prompt, max_new_tokens=20, do_sample=True), tf.Tensor)
whole = model.generate(ids, max_new_tokens=20, return_dict_in_generate=True)
assert_type(whole, GenerateOutput[tf.Tensor])
assert_type(whole.sequences, tf.Tensor)
assert_type(model.stream(ids, max_new_tokens=2), Iterator[TokenStep])
assert_type(tokenizer.decode(tokens[0]), str)
assert_type(gptj.GenerationConfig(top_k=5).replace(top_p=0.5), gptj.GenerationConfig)

model.generate(ids, max_new_token=20)  # wrong: misspelt
model.generate(ids, max_new_tokens="20")  # wrong: text
model.stream(ids, tempereture=0.5)  # wrong: misspelt
model(ids, atention_mask=ids)  # wrong: misspelt
gptj.GPTJForCausalLM.from_pretrained("x", mmap="yes")  # wrong: text
model.score("text", tokeniser=tokenizer)  # wrong: misspelt
gptj.GenerationConfig().replace(top_q=0.5)  # wrong: misspelt
gptj.GPTJForCasualLM  # wrong: misspelt
output.logit  # wrong: misspelt
