"""The fast path of decoding in TensorFlow."""

from __future__ import annotations

from typing import Self

from gptj.prepared import check_quantize


class InferenceMixin:
    """What a model can do to decode faster."""

    def prepare_for_inference(self, *, quantize: str | None = None) -> Self:
        """The model itself, whose steps under `generate` are compiled as they are: there is nothing to pack.

        Args:
            quantize: None; no other precision than the parameters' is computed in.

        Raises:
            InputError: another `quantize`.
        """
        check_quantize(quantize, ())
        return self
