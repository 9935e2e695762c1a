"""The table of tensors for those who import it; inside of gptj it is `gptj.config.schema`."""

from gptj.config.schema import BASE_PREFIX, HEADS, Head, TensorSpec, is_old_buffer, schema, schema_by_name

__all__ = ["BASE_PREFIX", "HEADS", "Head", "TensorSpec", "is_old_buffer", "schema", "schema_by_name"]
