"""Plain names for stored tensors: what wrappers put before a model's own names is taken off, once for every format.

DataParallel, torch.compile, FSDP, PEFT, Lightning and trl save a model's weights under names of their own. A prefix
changes nothing of the model, so it is read and said; a LoRA adapter and quantized weights are not the model's weights
and are refused by name; a value head beside a whole language model is left out and said.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from gptj.config.schema import BASE_PREFIX, HEADS, Head, is_old_buffer
from gptj.errors import SchemaError, shown, warn_of

__all__ = ["HEAD_WORDS", "Dialect", "PlainNames", "head_of", "infer_dialect", "plain_names", "plain_variable"]

Dialect = Literal["pt", "flax", "tf"]
"""The formats whose arrays have names: Hugging Face's own, and transformers' Flax and TensorFlow models'."""

# Modules that wrap another wherever they stand: DataParallel, torch.compile, DeepSpeed, FSDP, activation checkpointing.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"}
)
_LANDMARK = re.compile(
    rf"(?P<lead>(?:.+?\.)??)(?:{re.escape(BASE_PREFIX)})?(?:wte\.weight|ln_f\.weight|h\.\d{{1,6}}\.ln_1\.weight)"
)
# What trl and trlx train beside a language model: value heads, and the frozen layers of a reference model.
_OTHER_HEADS = re.compile(
    r"(v_head|v_heads|value_head|summary|ilql_heads|q_heads?|target_q_heads?|frozen_head|reward_head|rm_head"
    r"|critic_head)(_\w+)?"
)
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|prompt_encoder|ia3_l)(\.|$)")
_QUANTIZED = re.compile(
    r".*\.(SCB|weight_format|CB|absmax|quant_map|nested_absmax|nested_quant_map|qweight|qzeros|scales|g_idx"
    r"|quant_state\..*|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))"
)
_TF_MODEL = re.compile(r"tfgptj_[a-z_0-9]+/")
HEAD_WORDS: dict[str, Head] = {
    "lm_head": "causal_lm",
    "score": "sequence_classification",
    "qa_outputs": "question_answering",
}
"""The heads by the first part of their own rows' names."""


@dataclasses.dataclass(frozen=True)
class PlainNames:
    """The model's own names for stored ones.

    Attributes:
        plain: the plain name by the stored one; what was left out is not there.
        wrappers: prefixes and wrapping modules that were taken off.
        buffers: constant buffers of old transformers, by their stored names.
        other_heads: value heads and the like, by their stored names.
    """

    plain: Mapping[str, str]
    wrappers: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()

    @property
    def oddities(self) -> tuple[str, ...]:
        """Prefixes that were taken off and tensors that were left out, a sentence each."""
        said = []
        if self.wrappers:
            spelt = ", ".join(shown(wrapper) for wrapper in self.wrappers)
            said.append(f"the weights were saved through a wrapper: {spelt} is taken off their names")
        if self.other_heads:
            few = ", ".join(map(shown, self.other_heads[:4])) + (", ..." if len(self.other_heads) > 4 else "")
            said.append(f"{len(self.other_heads)} tensors of another head are left out: {few}")
        return tuple(said)

    def say(self, file: str | os.PathLike[str]) -> None:
        """Warn of the oddities; `file` is what the warnings name."""
        for oddity in self.oddities:
            warn_of(oddity, file=file)


def plain_names(names: Iterable[str], *, file: str | os.PathLike[str], dialect: Dialect) -> PlainNames:
    """The plain names of stored ones.

    Args:
        names: all that the files hold.
        file: what errors name.
        dialect: the framework's whose names they are; wrappers and other heads are PyTorch's alone.

    Raises:
        SchemaError: an unmerged adapter, quantized weights, or two models in one.

    >>> plain_names(["module.transformer.wte.weight", "module.lm_head.bias"], file="x").plain.values()
    dict_values(['transformer.wte.weight', 'lm_head.bias'])
    """
    stored = [*names]
    if dialect != "pt":
        return PlainNames({name: plain_variable(name) for name in stored})
    _refuse_adapters_and_quantized(stored, file)
    found: dict[str, None] = {}
    plain: dict[str, str] = {}
    for name in stored:
        *modules, last = name.split(".")
        found.update((module + ".", None) for module in modules if module in _WRAPPERS)
        plain[name] = ".".join([*(module for module in modules if module not in _WRAPPERS), last])
    leads = sorted({match["lead"] for name in plain.values() if (match := _LANDMARK.fullmatch(name))})
    leads = [lead for lead in leads if not _is_other_head(lead)]
    if len(leads) > 1:
        raise SchemaError(
            "holds several models",
            file=file,
            expected="the names of one model",
            found=", ".join(shown(lead + BASE_PREFIX) for lead in leads),
            hint="Save the one model's state_dict() by itself",
        )
    beside = [n for n in plain.values() if leads and not n.startswith(leads[0]) and not _is_other_head(n)]
    if leads and leads[0] and not beside:  # else it is no wrapper, but a misspelling or another model's name
        found[leads[0]] = None
        plain = {name: short.removeprefix(leads[0]) for name, short in plain.items()}
    buffers = [name for name, short in plain.items() if is_old_buffer(short)]
    other_heads = [name for name, short in plain.items() if _is_other_head(short)]
    left = {*buffers, *other_heads}
    return PlainNames(
        {name: short for name, short in plain.items() if name not in left},
        tuple(found),
        tuple(buffers),
        tuple(other_heads),
    )


def _is_other_head(name: str) -> bool:
    return _OTHER_HEADS.fullmatch(name.split(".")[0]) is not None


def _refuse_adapters_and_quantized(names: list[str], file: str | os.PathLike[str]) -> None:
    adapter = next((name for name in names if _ADAPTER.search(name)), None)
    if adapter is not None:
        raise SchemaError(
            "a PEFT (LoRA) adapter that is not merged into its model",
            file=file,
            where=shown(adapter),
            hint="Load it with PEFT, call merge_and_unload(), and save the model that this gives",
        )
    quantized = next((name for name in names if _QUANTIZED.fullmatch(name)), None)
    if quantized is not None:
        raise SchemaError(
            "quantized weights (bitsandbytes, GPTQ or AWQ)",
            file=file,
            where=shown(quantized),
            hint="Call dequantize() in the library that made them and save the model again, or take the original",
        )


def infer_dialect(metadata: Mapping[str, str], names: Iterable[str]) -> Dialect:
    """The framework whose names a safetensors file has: by its metadata, else by the names themselves.

    >>> infer_dialect({}, ["transformer.wte.embedding", "lm_head.kernel"])
    'flax'
    """
    said = metadata.get("format")
    if said in ("flax", "tf"):
        return "flax" if said == "flax" else "tf"
    names = [*names]
    if any("/" in name and name.endswith(":0") for name in names):
        return "tf"
    last = {name.rpartition(".")[2] for name in names}
    return "flax" if last & {"kernel", "embedding"} and "weight" not in last else "pt"


def plain_variable(name: str) -> str:
    """A TensorFlow variable's name without that of the model that it was saved from.

    >>> plain_variable("tfgptj_for_causal_lm/transformer/wte/weight:0")
    'transformer/wte/weight:0'
    """
    return _TF_MODEL.sub("", name, count=1) if _TF_MODEL.match(name) else name


def head_of(plain: Iterable[str], *, tied: bool) -> Head:
    """The head that stands on top of the blocks by plain names, in any dialect; "base" where there is none.

    A tied model stores no lm_head.weight: its names are a language model's where they have the prefix.
    """
    firsts = {re.split(r"[./]", name)[0] for name in plain}
    found = {HEAD_WORDS[first] for first in firsts if first in HEAD_WORDS}
    head: Head = next((head for head in HEADS if head in found), "base")
    return "causal_lm" if head == "base" and tied and BASE_PREFIX[:-1] in firsts else head
