"""Folders that are no model's, or hold two sets of weights that differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from gptj_conversion.convert import convert, describe
from lawful import good_folder
from weight_changes import WEIGHTS, arrays, as_format, renamed, sharded, store, with_more

from gptj.checkpoint import open_checkpoint, plan_load
from gptj.command.opened_model import OpenedModel, Request
from malformed import Malformed

TITLE = "folders that are no model's"


def holding(*names: str) -> Callable[[Path], None]:
    """A folder with a config.json and files (or folders, with a slash) of these names."""

    def make(folder: Path) -> None:
        good_folder(folder / "in")
        (folder / "in" / WEIGHTS).unlink()
        for name in names:
            if name.endswith("/"):
                (folder / "in" / name).mkdir()
            else:
                (folder / "in" / name).write_bytes(b"x")

    return make


def changed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: change(good_folder(folder / "in")) and None


def through_convert(folder: Path) -> object:
    return convert(folder / "in", folder / "out", fingerprint=False)


def through_inspect(folder: Path) -> object:
    return describe(folder / "in")


def through_open(folder: Path) -> object:
    opened = open_checkpoint(folder / "in")
    return plan_load(opened, opened.config, "causal_lm")


def through_command(folder: Path) -> object:
    (folder / "in" / "config.json").unlink()
    return OpenedModel(Request(directory=folder / "in"), needs_tokenizer=False)


DOORS = {"convert": through_convert, "inspect": through_inspect, "open": through_open}
KINDS = {
    "a LoRA adapter": (("adapter_config.json", "adapter_model.safetensors"), "merge_and_unload"),
    "a LoRA adapter's .bin": (("adapter_config.json", "adapter_model.bin"), "merge_and_unload"),
    "DeepSpeed's states": (("zero_pp_rank_0_mp_rank_00_optim_states.pt",), "zero_to_fp32.py"),
    "DeepSpeed's folder": (("global_step12/", "latest"), "global_step12"),
    "FSDP's parts": (("__0_0.distcp", ".metadata"), "accelerate merge-weights"),
    "accelerate's FSDP folder": (("pytorch_model_fsdp_0/",), "pytorch_model_fsdp_0"),
    "Megatron": (("iter_0001000/", "latest_checkpointed_iteration.txt"), "Megatron"),
    "Megatron's ranks": (("mp_rank_00/",), "Megatron"),
    "GGUF": (("model.gguf",), "GGUF"),
    "ONNX": (("model.onnx",), "ONNX"),
    "CTranslate2": (("model.bin", "vocabulary.json"), "CTranslate2"),
    "SavedModel": (("saved_model.pb", "variables/"), "Keras"),
    ".keras": (("model.keras",), "Keras"),
    "orbax": (("_CHECKPOINT_METADATA", "d/"), "orbax"),
    "ocdbt": (("manifest.ocdbt",), "orbax"),
    "t5x": (("checkpoint_1000/",), "t5x"),
    "a trainer's state": (("optimizer.pt", "trainer_state.json"), "trainer"),
    "a trainer's output": (("checkpoint-500/",), "checkpoint-500"),
    "a run that was stopped": (("checkpoints/", "loss.csv"), "lie in checkpoints"),
    "a run's checkpoints": (("step-00000100/",), "of a run of training: step-00000100"),
    "a run's optimizer": (("optimizer.safetensors", "training.json"), "trainer's state"),
    "shards without an index": (("model-00001-of-00002.safetensors",), "model.safetensors.index.json"),
    "a Lightning file": (("last.ckpt",), "last.ckpt"),
    "another name": (("weights.safetensors",), "weights.safetensors"),
}


def stale_index(folder: Path) -> None:
    names = {f"x.{name}": "model-00001-of-00001.safetensors" for name in arrays(folder)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def other_bin(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4")


def single_and_other_shards(folder: Path) -> None:
    tensors = arrays(folder)
    sharded(folder)
    store(folder, tensors | {"lm_head.bias": tensors["lm_head.bias"][:5]})


def only(to: str) -> Callable[[Path], None]:
    return changed(as_format(to))


def two_models(folder: Path) -> None:
    tensors = arrays(folder)
    store(folder, {f"{lead}.{name}": array for lead in ("student", "teacher") for name, array in tensors.items()})


def copy_under(prefix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with_more({prefix: arrays(folder)["lm_head.bias"]})(folder)

    return make


def flax_names(folder: Path) -> None:
    foreign = Path(__file__).parents[2] / "data" / "foreign" / "flax_safetensors"
    shutil.rmtree(folder)
    shutil.copytree(foreign, folder)


def tf_names(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(Path(__file__).parents[2] / "data" / "foreign" / "tf_safetensors_sharded", folder)


CASES = [
    *(
        Malformed(f"{what}, through {door}", holding(*files), DOORS[door], names)
        for what, (files, names) in KINDS.items()
        for door in DOORS
    ),
    *(
        Malformed(f"{what}, through a command", holding(*KINDS[what][0]), through_command, KINDS[what][1])
        for what in ("Megatron", "a trainer's output", "a run that was stopped", "a run's checkpoints")
    ),
    *(
        Malformed(f"only a {to}, opened as a model", only(to), through_open, "gptj convert")
        for to in ("bin", "flax", "tf")
    ),
    Malformed("Flax's safetensors, opened as a model", changed(flax_names), through_open, "gptj convert"),
    Malformed("TensorFlow's shards, opened as a model", changed(tf_names), through_open, "gptj convert"),
    *(
        Malformed(f"{what}, through {door}", changed(change), DOORS[door], names)
        for what, change, names in (
            ("a stale index of other names", stale_index, "model.safetensors.index.json"),
            ("a file and shards that differ", single_and_other_shards, "model.safetensors.index.json"),
            ("two models in one file", two_models, "several models"),
            ("LoRA inside", copy_under("transformer.h.0.attn.q_proj.lora_A.default.weight"), "lora_A"),
            ("PEFT's base_layer", renamed(lambda n: n.replace("q_proj.", "q_proj.base_layer.")), "base_layer"),
            ("int8 of bitsandbytes", copy_under("transformer.h.0.attn.q_proj.SCB"), "quantized"),
            ("GPTQ", copy_under("transformer.h.0.attn.q_proj.qweight"), "quantized"),
            ("a tensor under no wrapper", copy_under("visual.proj.weight"), "visual.proj"),
        )
        for door in ("convert", "open")
    ),
    Malformed("a .bin beside it that is none", changed(other_bin), through_convert, "pytorch_model.bin"),
]
