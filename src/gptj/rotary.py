"""The rotary table for those who import it; inside of gptj it is `gptj.schema.rotary`."""

from gptj.schema.rotary import ROTARY_BASE, rotary_rows, rotary_table

__all__ = ["ROTARY_BASE", "rotary_rows", "rotary_table"]
