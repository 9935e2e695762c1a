"""`gptj export`: a model as a program of another tool, and the reason and the way where that is not for us to write."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from pathlib import Path
from typing import Any

import click

from gptj.command.options import (
    Command,
    DtypeChoice,
    ModelArgument,
    Names,
    PathArgument,
    revision_option,
    weights_option,
)
from gptj.command.waiting import waiting
from gptj.errors import InputError
from gptj.reading.weight_files import split_weights

__all__ = ["ELSEWHERE", "FORMATS", "export"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that is written here.

    Attributes:
        wing: the backend whose it is.
        writer: the function of its `export` module that takes a model and a folder.
        needs: modules beside the backend's own.
        extra: that brings them.
    """

    wing: str
    writer: str
    needs: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "onnx": Format("pt", "write_onnx", ("onnx", "onnxscript"), "onnx"),
    "savedmodel": Format("tf", "write_saved_model"),
    "torch-export": Format("pt", "write_torch_export"),
}

ELSEWHERE = {
    "ctranslate2": (
        "CTranslate2's own converter reads this folder as it is",
        "ct2-transformers-converter --model {DIR} --output_dir {OUT}",
    ),
    "vllm": ("vLLM opens this folder as it is", "vllm serve {DIR}"),
    "transformers": ("transformers opens this folder as it is", "AutoModelForCausalLM.from_pretrained('{DIR}')"),
    "safetensors": ("this folder is safetensors already", "gptj convert {DIR} {OUT} writes another dtype or shards"),
    "mesh": ("a TPU checkpoint is a weights format", "gptj convert {DIR} {OUT} --to mesh --shards 8"),
    "openvino": (
        "OpenVINO's converter reads ONNX",
        "gptj export {DIR} {OUT} --to onnx --dtype float32, then ovc {OUT}/model.onnx",
    ),
    "tensorrt": (
        "TensorRT reads ONNX",
        "gptj export {DIR} {OUT} --to onnx --dtype float16, then trtexec --onnx={OUT}/model.onnx --saveEngine=plan",
    ),
    "tflite": (
        "TensorFlow Lite's converter reads a SavedModel",
        "gptj export {DIR} {OUT} --to savedmodel --dtype float32, then "
        "tf.lite.TFLiteConverter.from_saved_model('{OUT}', signature_keys=['step'])",
    ),
    "gguf": ("llama.cpp runs no GPT-J", "gptj generate {DIR} --backend pt --quantize int8 is quick on a CPU"),
    "torchscript": ("torch.jit is deprecated in favour of torch.export", "gptj export {DIR} {OUT} --to torch-export"),
}
"""Formats that others write better: the reason, and the way."""

_CALLED = {
    "ct2": "ctranslate2", "saved_model": "savedmodel", "saved-model": "savedmodel", "tensorflow": "savedmodel",
    "keras": "savedmodel", "torch_export": "torch-export", "torch.export": "torch-export", "pt2": "torch-export",
    "litert": "tflite", "jit": "torchscript", "onnxruntime": "onnx", "trt": "tensorrt", "hf": "transformers",
    "llama.cpp": "gguf", "ggml": "gguf",
}  # fmt: skip


@click.command(cls=Command, short_help="Write a model as ONNX, SavedModel or torch.export's program.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("out", type=PathArgument, metavar="OUT")
@click.option(
    "--to", "target", type=Names((*FORMATS, *ELSEWHERE), called=_CALLED), required=True, metavar="FORMAT",
    help=f"{', '.join(FORMATS)}; of ctranslate2 and others it says the way.",
)  # fmt: skip
@click.option("--dtype", type=DtypeChoice, help="Of the weights. [default: as stored]")
@weights_option
@revision_option()
def export(directory: Path, out: Path, target: str, dtype: str | None, weights: str | None) -> None:
    """Write the model in DIR as a program of another tool's into a new folder OUT, its tokenizer beside it.

    The program is one step over a cache of any length, for any batch. Inputs are input_ids, attention_mask,
    position_ids and the cache's arrays; outputs are the logits and the cache with the new tokens in it.
    """
    from gptj.paths.hub import locate
    from gptj.reading.folder import open_checkpoint
    from gptj.reading.load_plan import plan_causal_lm

    require_model(directory, fetch=target in FORMATS)
    if target in ELSEWHERE:
        reason, way = ELSEWHERE[target]
        hint = way.format(DIR=shlex.quote(str(directory)), OUT=shlex.quote(str(out)))
        raise InputError(reason, where=f"--to {target}", hint=hint)
    directory, weights = split_weights(locate(directory), weights)
    plan_causal_lm(open_checkpoint(directory, weights=weights))
    write(directory, out, FORMATS[target], dtype=dtype, weights=weights)
    click.echo(f"{out}: written")


def require_model(directory: Path, *, fetch: bool) -> None:
    """Refuse a folder that is not there, and an adapter's, before anybody is told what to do with it.

    Args:
        directory: the folder, or a repository of the hub.
        fetch: whether a repository is fetched now; else it is taken for a model's.

    Raises:
        MissingFileError, FormatError, InputError: naming it.
    """
    from gptj.adapters.files import is_adapter
    from gptj.paths.hub import is_repository_id, locate
    from gptj.reading.folder import require_directory

    if not fetch and is_repository_id(directory):
        return
    place = locate(directory)
    require_directory(split_weights(place, None)[0])
    if is_adapter(place):
        hint = f"Merge it into its base first: gptj adapter merge BASE {shlex.quote(str(place))} OUT"
        raise InputError("a LoRA adapter without its base model", where=str(place), hint=hint)


def write(directory: Path, out: Path, form: Format, *, dtype: str | None, weights: str | None) -> None:
    """Write a model's program and its companions into a new folder, as a whole or not at all.

    Raises:
        BackendError: the format's framework, or a module that it needs, is not installed.
        WriteError: something stands at `out`, or the disk gave up.
    """
    from gptj.adapters.merge import read_companions
    from gptj.backends import backend, install_line
    from gptj.config import CONFIG_FILE
    from gptj.errors import BackendError, WriteError
    from gptj.paths import safe_path
    from gptj.paths.hub import locate
    from gptj.paths.json_file import read_small_file
    from gptj.writing.output_directory import OutputDirectory

    missing = [module for module in form.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise BackendError(f"{' and '.join(missing)} cannot be imported", hint=f"Run: {install_line('pt', form.extra)}")
    if out.is_dir() and any(out.iterdir()):
        raise WriteError("is not empty", file=out, expected="a new folder", hint="Name another, or empty it")
    directory = locate(directory)
    companions = {CONFIG_FILE: read_small_file(safe_path(directory, CONFIG_FILE)), **read_companions(directory)}
    module = backend(form.wing)
    options: dict[str, Any] = {"param_dtype": dtype, "weights": weights}
    with OutputDirectory(out) as output:
        with waiting(f"loading {directory}"):
            model = module.GPTJForCausalLM.from_pretrained(
                directory, **{name: value for name, value in options.items() if value is not None}
            )
        with waiting(f"writing {out}"):
            writer = getattr(importlib.import_module(f"gptj.{form.wing}.export"), form.writer)
            output.call(output.stage, writer, model, output.stage)
            output.sync_tree()
            for name, data in companions.items():
                output.write_file(name, data)
        output.commit()
