"""The example that trained the demo's model: its command works, and its defaults are that model's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from gptj_conversion.convert import convert, open_source

from gptj import GPTJConfig, GPTJTokenizer
from gptj.command.demo.journey import SHAKESPEARE
from gptj.generation.config import GenerationConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_shakespeare.py"
TINY = "--vocab-size 264 --n-positions 16 --n-embd 16 --n-layer 1 --epochs 1 --batch-size 4"


def test_one_command_writes_a_folder_and_a_tpu_checkpoint_of_the_same_model(tmp_path):
    (tmp_path / "text").write_text("To be, or not to be, that is the question.\n\nROMEO:\nAy, me! she speaks.\n\n" * 40)
    folder, tpu = tmp_path / "folder", tmp_path / "tpu"
    command = [sys.executable, EXAMPLE, tmp_path / "text", folder, "--tpu", tpu, *TINY.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "best epoch in bfloat16" in done.stdout and "\nROMEO:" in done.stdout

    converted = convert(tpu, tmp_path / "converted")
    direct = convert(folder, tmp_path / "direct", dtype="bfloat16")
    for name in ("model.safetensors", "generation_config.json", *GPTJTokenizer.from_pretrained(folder).files()):
        assert (converted / name).read_bytes() == (direct / name).read_bytes(), name
    assert GPTJConfig.from_file(converted).eos_token_id == GenerationConfig.from_file(converted).eos_token_id == 263
    assert json.loads((folder / "training.json").read_text())["recipe"]["vocab_size"] == 264


def test_the_defaults_are_the_shipped_models():
    spec = importlib.util.spec_from_file_location("train_shakespeare", EXAMPLE)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shipped = open_source(SHAKESPEARE)
    made = module.Recipe().config(GPTJTokenizer.from_pretrained(SHAKESPEARE))
    assert made.architecture_sha256 == shipped.config.architecture_sha256
    assert (made.n_positions, made.eos_token_id) == (shipped.config.n_positions, shipped.config.eos_token_id)
    assert shipped.shards == module.TPU_SHARDS
    sampled = GenerationConfig.from_model_config(made).replace(**module.SAMPLING)
    assert GenerationConfig.from_file(SHAKESPEARE) == sampled
