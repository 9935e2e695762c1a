"""The outputs of a call for those who import them; inside of gptj they are in `gptj.calls.outputs`."""

from gptj.calls.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "KVCache",
    "ModelOutput",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutputWithPast",
]
