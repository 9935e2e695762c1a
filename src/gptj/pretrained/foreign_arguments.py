"""Arguments of transformers' `from_pretrained` that say nothing here, or cannot be had: one table for all three wings.

Some say what is so anyway and are accepted with that value. The others get the reason and the way to go. None is
ignored: a value that would have changed something is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptj.errors import InputError, shown

__all__ = ["FOREIGN_ARGUMENTS", "ForeignArgument", "place_of", "take_foreign_arguments"]


@dataclasses.dataclass(frozen=True)
class ForeignArgument:
    """One argument.

    Attributes:
        so_anyway: the values that change nothing; None is always one.
        reason: why others are refused.
        hint: what to do.
    """

    so_anyway: tuple[Any, ...]
    reason: str
    hint: str


_CONVERT = "Convert the folder first: gptj convert SRC DST, then open DST"
_QUANTIZE = 'In PyTorch, pass inference=True, quantize="int8"'
_ONE_DEVICE = 'Pass device_map="auto", "cpu" or "cuda"; for several devices, mesh= and strategy='
_PARALLEL = 'Pass mesh= and strategy="tp"'

FOREIGN_ARGUMENTS: dict[str, ForeignArgument] = {
    "from_pt": ForeignArgument((False,), "one folder serves all three backends", _CONVERT),
    "from_tf": ForeignArgument((False,), "one folder serves all three backends", _CONVERT),
    "from_flax": ForeignArgument((False,), "one folder serves all three backends", _CONVERT),
    "use_safetensors": ForeignArgument((True,), "models are read from safetensors alone", _CONVERT),
    "weights_only": ForeignArgument((True,), "no pickle is ever run", _CONVERT),
    "gguf_file": ForeignArgument((), "GGUF is not read", "Take the safetensors or the .bin that it was made of"),
    "trust_remote_code": ForeignArgument((False,), "no code of a repository is ever run", "Leave it out"),
    "code_revision": ForeignArgument((), "no code of a repository is ever run", "Pass revision="),
    "low_cpu_mem_usage": ForeignArgument((True, False), "loading holds one tensor twice at most", "Leave it out"),
    "_fast_init": ForeignArgument((True, False), "nothing is initialised to be overwritten", "Leave it out"),
    "load_in_8bit": ForeignArgument((False,), "bitsandbytes is not used", _QUANTIZE),
    "load_in_4bit": ForeignArgument((False,), "bitsandbytes is not used", _QUANTIZE),
    "quantization_config": ForeignArgument((), "other libraries' quantization is not used", _QUANTIZE),
    "max_memory": ForeignArgument((), "a model is not spread by the room that there is", _ONE_DEVICE),
    "offload_folder": ForeignArgument((), "nothing is offloaded: the weights file itself is mapped", _ONE_DEVICE),
    "offload_state_dict": ForeignArgument((False,), "nothing is offloaded: the weights file is mapped", _ONE_DEVICE),
    "offload_buffers": ForeignArgument((False,), "nothing is offloaded: the weights file is mapped", _ONE_DEVICE),
    "offload_index": ForeignArgument((), "nothing is offloaded: the weights file itself is mapped", _ONE_DEVICE),
    "tp_plan": ForeignArgument((), "a model is cut by a mesh and a strategy", _PARALLEL),
    "tp_size": ForeignArgument((1,), "a model is cut by a mesh and a strategy", _PARALLEL),
    "device_mesh": ForeignArgument((), "a model is cut by a mesh and a strategy", _PARALLEL),
    "use_auth_token": ForeignArgument((False,), "it is the hub client's older name of token", "Pass token="),
    "resume_download": ForeignArgument((True, False), "the hub client always resumes", "Leave it out"),
    "proxies": ForeignArgument(({},), "the hub client reads them from the environment", "Set HTTPS_PROXY"),
    "mirror": ForeignArgument((), "the hub client reads it from the environment", "Set HF_ENDPOINT"),
    "state_dict": ForeignArgument(
        (), "the weights are the folder's", "Make GPTJForCausalLM(config), then in PyTorch model.load_state_dict(...)"
    ),
    "key_mapping": ForeignArgument((), "tensors have their names in the file", _CONVERT),
    "generation_config": ForeignArgument((), "it is the folder's", "Set model.generation_config afterwards"),
    "use_kernels": ForeignArgument((False,), "no kernels are fetched from the hub", "Leave it out"),
    "use_flash_attention_2": ForeignArgument(
        (False,), "flash-attn is not used", 'In PyTorch, pass attn_implementation="sdpa"'
    ),
    "attn_implementation": ForeignArgument(
        ("eager",), "the choice of attention is PyTorch's alone", 'Leave it out, or say "eager"'
    ),
    "return_unused_kwargs": ForeignArgument((False,), "an argument that is not used is refused", "Leave it out"),
    "use_fast": ForeignArgument((True, False), "there is one tokenizer, and it is opened apart", "Leave it out"),
    "torchscript": ForeignArgument(
        (False,), "no TorchScript is made", "Open the model without it; gptj export DIR OUT --to torch-export"
    ),
    "input_shape": ForeignArgument(((1, 1),), "no parameter's shape depends on it", "Leave it out"),
    "adapter_kwargs": ForeignArgument((), "an adapter is loaded by a call of its own", "model.load_adapter(folder)"),
}


def take_foreign_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not in the table; those in it said what is so anyway.

    Raises:
        InputError: one asks for something else; it says why and what to do.
    """
    for name, foreign in FOREIGN_ARGUMENTS.items():
        value = arguments.get(name)
        if value is None or any(type(value) is type(one) and value == one for one in foreign.so_anyway):
            continue
        raise InputError(
            f"not supported: {foreign.reason}",
            where=name,
            expected=" or ".join(map(repr, (*foreign.so_anyway, None))),
            found=shown(value),
            hint=foreign.hint,
        )
    return {name: value for name, value in arguments.items() if name not in FOREIGN_ARGUMENTS}


def place_of(device_map: Any) -> str | None:
    """The one device that a device_map means: None (the framework's default), "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: it spreads a model over several, or is no device.
    """
    if device_map is None:
        return None
    value = device_map
    if isinstance(value, Mapping):
        places = {str(place) for place in value.values()}
        if len(places) != 1:
            raise InputError(
                "a model lies on one device",
                where="device_map",
                expected='{"": device}',
                found=", ".join(sorted(places)) or "an empty map",
                hint=_ONE_DEVICE,
            )
        value = next(iter(value.values()))
    name = f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    kind, _, number = name.partition(":")
    if name == "auto" or (kind in ("cpu", "cuda", "gpu") and (not number or number.isdecimal())):
        return name.replace("gpu", "cuda")
    raise InputError(
        "no such place",
        where="device_map",
        expected='"auto", "cpu", "cuda", "cuda:N" or {"": device}',
        found=shown(device_map),
        hint=_ONE_DEVICE,
    )
