"""Generation: one meaning, written once in NumPy, for all three backends.

Table of contents:

    GenerationConfig                   every field, its rule and its meaning       config
    generate, stream                   the front doors; a wing's method calls them loop
    Generates                          these two as methods of a model             mixin
    Conversation                       turns over one cache                        conversation
    GenerateOutput, TokenStep          their results                               output
    Decoder, Step, Columns             a wing's part                               decoder
    Extension, extend_together         several decoders in one pass                decoder
    HeldLogits, Selected               logits that a device keeps, and their best  held
    known_tokens_only                  no id beyond a tokenizer's                  known
    uniforms, draw                     randomness as data                          sampling
                                       changes of the logits, and their order      processors
                                       those of few tokens, without the row        changes
                                       a token without its scores                  choice, candidates
    search_beams                       beam search, beam sampling, diverse groups  beams
    contrastive_steps                  contrastive search                          contrastive
    assisted_steps                     assistant models and prompt lookup          assisted
                                       prompts that are more than token ids        called
                                       one generation in progress                  session
                                       when a row ends                             stopping

Everything after a step's logits is this package, on the host. So the strategies cannot differ between frameworks: it
is the same code on the same bits. A row is 200 kB for GPT-J-6B; where it lies on a device, the device selects its best.
"""

from __future__ import annotations

from gptj.generation.config import GenerationConfig
from gptj.generation.conversation import Conversation
from gptj.generation.decoder import Columns, Decoder, DecoderFactory, Extension, Step, extend_together
from gptj.generation.held import PARTS, HeldLogits, Selected
from gptj.generation.known import known_tokens_only
from gptj.generation.loop import Streamer, generate, stream
from gptj.generation.mixin import Generates, inside_a_graph
from gptj.generation.output import GenerateOutput, TokenStep
from gptj.generation.sampling import draw, uniforms

__all__ = [
    "PARTS",
    "Columns",
    "Conversation",
    "Decoder",
    "DecoderFactory",
    "Extension",
    "GenerateOutput",
    "Generates",
    "GenerationConfig",
    "HeldLogits",
    "Selected",
    "Step",
    "Streamer",
    "TokenStep",
    "draw",
    "extend_together",
    "generate",
    "inside_a_graph",
    "known_tokens_only",
    "stream",
    "uniforms",
]
