"""The models that are measured, and what one token and one prompt cost at the least.

A decoded token needs every weight once, except that of the embedding only its own row is read; a prompt needs two
operations for each weight and token. Both are lower bounds: caches, activations and attention weights come on top.
"""

from __future__ import annotations

import dataclasses

from gptj.config import GPTJConfig
from gptj.config.schema import schema

VOCABULARY = 50400

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
"""Of a matrix' element. Scales of quantised rows or groups are not counted: they are below 4 %."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        name: on the command line and in the tables.
        config: without dropout, so that all train the same, and without an end-of-text token, so that none stops.
        dtype: what its folder is stored in: the widest that is measured.
    """

    name: str
    config: GPTJConfig
    dtype: str = "float32"

    @property
    def weights_read(self) -> int:
        """How many numbers of the model a decoded token needs."""
        return sum(row.size for row in schema(self.config) if row.kind != "embedding")

    def bytes_a_token(self, dtype: str) -> float:
        """What is read for one decoded token, or for one token of each row of a batch."""
        return self.weights_read * WEIGHT_BYTES[dtype]

    def stored_bytes(self, dtype: str) -> float:
        """The size of the whole model in this dtype."""
        return sum(row.size for row in schema(self.config)) * WEIGHT_BYTES[dtype]

    def prefill_operations(self, tokens: int) -> float:
        """Multiplications and additions for one prompt, of which only the last token's logits are wanted."""
        return self._block_operations(tokens) + 2.0 * self.config.vocab_size * self.config.n_embd

    def training_operations(self, rows: int, tokens: int) -> float:
        """The same for a training step: forward once, and twice as much backward."""
        logits = 2.0 * self.config.vocab_size * self.config.n_embd * tokens
        return 3 * rows * (self._block_operations(tokens) + logits)

    def _block_operations(self, tokens: int) -> float:
        config = self.config
        kernels = sum(row.size for row in schema(config) if row.kind == "kernel" and "vocab" not in row.axes)
        attended = tokens * (tokens + 1) / 2  # pairs of a query and a key that it may see
        return 2.0 * kernels * tokens + 4.0 * attended * config.n_embd * config.n_layer


def shape_of(name: str, width: int, layers: int, heads: int, dtype: str = "float32", **changes: int) -> Shape:
    config = GPTJConfig(
        vocab_size=changes.get("vocabulary", VOCABULARY),
        n_positions=2048,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        rotary_dim=min(64, width // heads),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
    )
    return Shape(name, config, dtype)


SHAPES = {
    shape.name: shape
    for shape in (
        shape_of("tiny", 32, 2, 4, vocabulary=512),
        shape_of("S", 512, 6, 8),
        shape_of("M", 1536, 16, 16),
        shape_of("L", 4096, 28, 16, "bfloat16"),
    )
}
