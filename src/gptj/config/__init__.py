"""GPTJConfig: what a GPT-J is, before any framework: its fields, their rules, its file."""

from gptj.config.gptj_config import ACTIVATIONS, BUILT_IN, CONFIG_FILE, GPTJConfig, is_field

__all__ = ["ACTIVATIONS", "BUILT_IN", "CONFIG_FILE", "GPTJConfig", "is_field"]
