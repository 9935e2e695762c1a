"""The plan of a load: a stored tensor for each row of the schema, chosen before any data is read.

Everything that is wrong is found first and reported at once. What may differ without harm is a short list, and
all of it is said in the plan: the `transformer.` prefix (a bare model and a model with a head spell the same rows
differently), the constant buffers of old transformers, a head that the file has and the model has not, and a
head that the model has and the file has not.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptj.config import GPTJConfig
from gptj.config.schema import BASE_PREFIX, HEADS, Head, TensorSpec, schema_by_name
from gptj.errors import ConfigError, SchemaError, shown, warn_of
from gptj.reading.safetensors_file import MOST_TENSORS, WEIGHT_DTYPES, StoredTensor
from gptj.reading.weight_files import convert_hint, list_some
from gptj.reading.weight_names import PlainNames, infer_dialect

if TYPE_CHECKING:
    from gptj.reading.folder import Checkpoint

__all__ = ["LM_HEAD_BIAS", "LoadPlan", "Mismatch", "describe_left", "plan_causal_lm", "plan_load", "warn_of_zero_bias"]

LM_HEAD_BIAS = "lm_head.bias"
_TIED = "lm_head.weight"
_ZEROS = "is missing; zeros are taken for it"
_MOST_GUESSES = 500  # names that a misspelt one is compared with; each comparison takes some 50 us


class Mismatch(NamedTuple):
    """A row whose stored shape is another, and which is to be initialised instead."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """The tensors that a model takes from a checkpoint.

    Attributes:
        tensors: by the canonical name of the model's head, in schema order; read with `StoredTensor.name`.
        missing: rows of the model's own head that the file has not; they are to be initialised, and said.
        unexpected: rows of other heads in the file, left alone.
        mismatched: rows to be initialised because their shape is another (`ignore_mismatched_sizes`).
        dropped: constant buffers of old transformers, other heads, and a tied lm_head.weight equal to wte.weight.
        zeros: rows that the file lacks and that are zeros then: a language model's lm_head.bias.
        names: of all stored tensors.
    """

    tensors: dict[str, StoredTensor]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    dropped: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    names: PlainNames = dataclasses.field(default_factory=lambda: PlainNames({}))


@dataclasses.dataclass
class _Findings:
    """Faults by kind, and the rows that were left aside."""

    unexpected: list[str] = dataclasses.field(default_factory=list)
    twice: list[str] = dataclasses.field(default_factory=list)
    dtypes: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[Mismatch] = dataclasses.field(default_factory=list)
    other_heads: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)


def plan_load(
    checkpoint: Checkpoint, config: GPTJConfig, head: Head, *, ignore_mismatched_sizes: bool = False
) -> LoadPlan:
    """The plan of where each row of a model of this config and head comes from.

    Args:
        checkpoint: what is there; only a tied model's lm_head.weight is read, to compare it with wte.weight.
        config, head: the model that is to be filled.
        ignore_mismatched_sizes: list misshapen rows in `mismatched` instead of refusing them.

    Raises:
        SchemaError: tensors are missing, unexpected, misshapen or of a wrong dtype; the message lists all.
        ConfigError: n_layer is absurd.
    """
    if config.n_layer * 10 > MOST_TENSORS:
        raise ConfigError("absurd", where="n_layer", expected=f"at most {MOST_TENSORS // 10}", found=config.n_layer)
    _refuse_other_dialects(checkpoint)
    rows = schema_by_name(config, head)
    findings = _Findings()
    names = checkpoint.names
    findings.dropped += [*names.buffers, *names.other_heads]
    found = _match(checkpoint, names, rows, config, head, findings)
    for name, tensor in found.items():
        _compare(tensor, rows[name], findings)
    missing = [name for name in rows if name not in found]
    zeros = (LM_HEAD_BIAS,) if missing == [LM_HEAD_BIAS] else ()
    missing = [name for name in missing if name not in zeros]
    own = [name for name in rows if head != "base" and not name.startswith(BASE_PREFIX)]
    lacks_only_its_head = missing == own
    _raise_all(
        checkpoint, config, [] if lacks_only_its_head else missing, findings, ignore_shapes=ignore_mismatched_sizes
    )
    bad = {mismatch.name for mismatch in findings.mismatched}
    names.say(checkpoint.directory)
    if zeros:
        warn_of_zero_bias(checkpoint.directory)
    return LoadPlan(
        tensors={name: found[name] for name in rows if name in found and name not in bad},
        missing=tuple(missing),
        unexpected=tuple(findings.other_heads),
        mismatched=tuple(findings.mismatched),
        dropped=tuple(findings.dropped),
        zeros=zeros,
        names=names,
    )


def plan_causal_lm(checkpoint: Checkpoint) -> LoadPlan:
    """The plan of a whole language model of the checkpoint's own config, for whoever wants no head of random values.

    Raises:
        SchemaError: the head is not there, as in a classifier's folder; and what `plan_load` raises.
    """
    plan = plan_load(checkpoint, checkpoint.config, "causal_lm")
    if plan.missing:
        hint = "In Python, GPTJForCausalLM.from_pretrained starts a head from random values, to be trained"
        found = f"no {' and no '.join(plan.missing)}"
        raise SchemaError("not a whole causal language model", file=checkpoint.directory, found=found, hint=hint)
    return plan


def warn_of_zero_bias(directory: Path) -> None:
    """Say that a language model without lm_head.bias gets one of zeros, as transformers gives it."""
    warn_of(_ZEROS, file=directory, where=LM_HEAD_BIAS)


def describe_left(names: PlainNames, dropped: Iterable[str], zeros: Iterable[str]) -> list[str]:
    """Tensors that a reader leaves out or adds, a sentence each, in the words of the warnings where there are some."""
    left = [f"{shown(name)} is left out" for name in dropped if name not in names.other_heads]
    return [*left, *names.oddities, *(f"{name}: {_ZEROS}" for name in zeros)]


def _refuse_other_dialects(checkpoint: Checkpoint) -> None:
    """Say that the folder's safetensors are of transformers' TensorFlow or Flax models."""
    dialect = infer_dialect(checkpoint.metadata, checkpoint.tensors)
    if dialect != "pt":
        framework = {"tf": "TensorFlow", "flax": "Flax"}[dialect]
        raise SchemaError(
            f"safetensors with the names and the layout of transformers' {framework} models",
            file=checkpoint.directory,
            expected="PyTorch's names",
            found=shown(next(iter(checkpoint.tensors), "")),
            hint=convert_hint(checkpoint.directory),
        )


def _match(
    checkpoint: Checkpoint,
    names: PlainNames,
    rows: Mapping[str, TensorSpec],
    config: GPTJConfig,
    head: Head,
    findings: _Findings,
) -> dict[str, StoredTensor]:
    """The stored tensors by the rows that they belong to; all others go to the findings."""
    found: dict[str, StoredTensor] = {}
    heads = {name for other in HEADS for name in schema_by_name(_untie(config), other) if other != "base"}
    other_heads = {name for name in heads if not name.startswith(BASE_PREFIX)} - rows.keys()
    prefix = "" if head == "base" else BASE_PREFIX
    for stored, plain in names.plain.items():
        tensor = checkpoint.tensors[stored]
        base_name = prefix + plain.removeprefix(BASE_PREFIX)
        name = base_name if base_name in rows else plain
        if name in rows:
            if name in found:
                findings.twice.append(f"{found[name].name} and {stored}")
            found[name] = tensor
        elif name == _TIED and head == "causal_lm" and config.tie_word_embeddings:
            _require_tied(checkpoint, names, tensor)
            findings.dropped.append(stored)
        elif name in other_heads:
            findings.other_heads.append(stored)
        else:
            findings.unexpected.append(stored)
    return found


def _untie(config: GPTJConfig) -> GPTJConfig:
    return config.replace(tie_word_embeddings=False, n_layer=1)


def _require_tied(checkpoint: Checkpoint, names: PlainNames, stored: StoredTensor) -> None:
    """Make sure that the file's lm_head.weight is wte.weight, bit for bit."""
    spelt = (BASE_PREFIX + "wte.weight", "wte.weight")
    embedding = next((checkpoint.tensors[name] for name, plain in names.plain.items() if plain in spelt), None)
    if embedding is None:
        return  # which is itself an error, and reported as such
    same_kind = (embedding.dtype, embedding.shape) == (stored.dtype, stored.shape)
    if not same_kind or not all(a == b for a, b in _paired_blocks(checkpoint, embedding, stored)):
        raise SchemaError(
            "differs from the token embedding, although the config ties them",
            file=stored.file,
            where=stored.name,
            expected=f"the bits of {embedding.name} ({embedding.dtype} {embedding.shape})",
            found=f"{stored.dtype} {stored.shape}" if not same_kind else "other values",
            hint="Set tie_word_embeddings to false to keep both",
        )


def _paired_blocks(
    checkpoint: Checkpoint, one: StoredTensor, other: StoredTensor
) -> Iterator[tuple[memoryview, memoryview]]:
    files = {file.path: file for file in checkpoint.files}
    return zip(files[one.file].blocks(one), files[other.file].blocks(other), strict=True)


def _compare(tensor: StoredTensor, row: TensorSpec, findings: _Findings) -> None:
    """Note a shape that is not the row's, and a dtype that no weight has."""
    if tensor.dtype not in WEIGHT_DTYPES:
        findings.dtypes.append(f"{row.name} is {tensor.dtype}")
    if tensor.shape != row.shape:
        findings.mismatched.append(Mismatch(row.name, tensor.shape, row.shape))


def _raise_all(
    checkpoint: Checkpoint,
    config: GPTJConfig,
    missing: list[str],
    findings: _Findings,
    *,
    ignore_shapes: bool,
) -> None:
    """One SchemaError that lists everything that is wrong, if anything is."""
    shapes = [] if ignore_shapes else [_misshapen(mismatch) for mismatch in findings.mismatched]
    kinds = {
        "missing": missing,
        "unexpected": [_with_guess(name, missing, n) for n, name in enumerate(findings.unexpected)],
        "there twice": findings.twice,
        "misshapen": shapes,
        f"of a dtype other than {', '.join(WEIGHT_DTYPES)}": findings.dtypes,
    }
    problems = [f"{len(items)} {kind}: {list_some(items)}" for kind, items in kinds.items() if items]
    if problems:
        hints = _config_hints(checkpoint, config)
        raise SchemaError(
            f"the tensors do not fit the model: {'; '.join(problems)}",
            file=checkpoint.directory,
            hint="; ".join(hints) if hints else None,
        )


def _misshapen(mismatch: Mismatch) -> str:
    text = f"{mismatch.name} expected {mismatch.expected}, found {mismatch.found}"
    if len(mismatch.found) == 2 and mismatch.found == mismatch.expected[::-1]:
        text += " (looks transposed: from a Flax/TF layout?)"
    return text


def _with_guess(name: str, missing: list[str], number: int) -> str:
    """The name, and the missing row that it may be a misspelling of."""
    close = difflib.get_close_matches(name, missing[:_MOST_GUESSES], n=1, cutoff=0.8) if number < 10 else []
    return f"{shown(name)} (did you mean {close[0]}?)" if close else shown(name)


def _config_hints(checkpoint: Checkpoint, config: GPTJConfig) -> list[str]:
    """The fields of the config that the file's names and shapes contradict."""
    names = checkpoint.names.plain
    shapes = {plain.removeprefix(BASE_PREFIX): checkpoint.tensors[name].shape for name, plain in names.items()}
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"h\.(\d{1,9})\.", name))}
    said = [("n_layer", config.n_layer, len(blocks))] if blocks else []
    embedding, inner = shapes.get("wte.weight", ()), shapes.get("h.0.mlp.fc_in.weight", ())
    if len(embedding) == 2:
        said += [("vocab_size", config.vocab_size, embedding[0]), ("n_embd", config.n_embd, embedding[1])]
    if len(inner) == 2:
        said += [("n_inner", config.inner_width, inner[0])]
    return [f"The config says {field} = {ours}, the file {theirs}" for field, ours, theirs in said if ours != theirs]
