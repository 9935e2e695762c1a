"""One backend's answers, taken in a process of its own and written down: `python -m gptj.parity.record`.

One process holds one framework, so that neither the import order, nor a thread pool, nor an environment variable of
another framework can colour an answer. What comes out is a folder of two files, `record.npz` and `record.json`,
which say everything that was asked and answered, by which versions, under which environment; the judgement
(`gptj.parity.compare`) needs neither the framework nor the model's process again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gptj
from gptj.backends import BACKENDS
from gptj.config import GPTJConfig
from gptj.config.dtypes import PARAMETER_DTYPES
from gptj.errors import FormatError, InputError, LimitError, naming_file, shown
from gptj.parity.probe import Probe, make_probe
from gptj.parity.processes import end_of
from gptj.parity.trace_record import batch_of_probe, record_trace
from gptj.parity.versions import library_versions
from gptj.paths.json_file import read_json_object
from gptj.reading.npz import NpyArray, open_named_npz
from gptj.writing.file_system import make_folder
from gptj.writing.npz import write_npz
from gptj.writing.output_file import whole_file

__all__ = ["ANSWERS", "Record", "library_versions", "record_backend"]

ANSWERS = {
    "logits": "of the batch, (b, t, v)",
    "loss": "of the batch, a scalar",
    "hidden_states": "of the batch, (n_layer + 1, b, t, m)",
    "attentions": "of the batch, (n_layer, b, h, t, t)",
    "far_logits": "of the batch at its far positions",
    "plain_logits": "of the batch's ids without mask and positions",
    "cached_logits": "of the batch, computed as a prefill and single steps over the cache",
    "greedy": "prompts and their greedy continuation, (rows, n + new)",
    "sampled": "prompts and their continuation drawn with the seed, (rows, n + new)",
}
"""The arrays of a record besides those of the probe: name and meaning."""

ARRAYS_FILE, FACTS_FILE = "record.npz", "record.json"
LARGEST_RECORD_BYTES = 2**32
"""Of the answers, where no config says how large they are: 16 times those of the 6B model to the usual probe."""

_PROBE_PREFIX = "probe."
_TOKENS = ("greedy", "sampled")

_VARIABLES = ("CUDA_", "GPTJ_", "JAX_", "KERAS_", "MKL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTORCH_", "TF_", "XLA_")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One backend's answers to a probe.

    Attributes:
        backend: whose answers these are.
        dtype: of the model's parameters.
        probe: what was asked.
        answers: by the names of `ANSWERS`.
        facts: versions, environment variables, machine and seconds.
    """

    backend: str
    dtype: str
    probe: Probe
    answers: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the record's two files into `directory`, which is made if it is missing; the JSON last.

        Raises:
            InputError: an answer is no array of plain numbers, or JSON cannot say the facts.
            WriteError: a file could not be written; each is there whole or not at all.
        """
        directory = Path(directory)
        try:
            facts = json.dumps({"backend": self.backend, "dtype": self.dtype, **self.facts}, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"not JSON: {error}", where="facts") from None
        make_folder(directory)
        asked = {_PROBE_PREFIX + name: value for name, value in self.probe.as_arrays().items()}
        write_npz(directory / ARRAYS_FILE, {**asked, **self.answers})
        with whole_file(directory / FACTS_FILE) as write:
            write(f"{facts}\n".encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, config: GPTJConfig | None = None) -> Record:
        """The record in `directory`; no array is read before all shapes are known to fit each other.

        Args:
            directory: the folder of record.npz and record.json.
            config: of the model that was asked; the shapes must be those that it gives.

        Raises:
            MissingFileError, FormatError: there is none, or a part of it is missing or is not what a record has.
            LimitError, SchemaError, UnsafeFileError: see `gptj.reading.npz.open_named_npz`.
        """
        directory = Path(directory)
        facts = read_json_object(directory / FACTS_FILE)
        with naming_file(directory / FACTS_FILE):
            _check_facts(facts)
        names = [*(_PROBE_PREFIX + field.name for field in dataclasses.fields(Probe)), *ANSWERS]
        file, arrays = open_named_npz(directory / ARRAYS_FILE, names, noun="record")
        answered = {name: arrays[name] for name in ANSWERS}
        asked = {name.removeprefix(_PROBE_PREFIX): arrays[name] for name in names if name not in ANSWERS}
        with naming_file(file.path):
            probe = Probe.read(file, asked)
            _check_answers(answered, probe, config)
        answers = {name: file.read(array) for name, array in answered.items()}
        return cls(facts.pop("backend"), facts.pop("dtype"), probe, answers, facts)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Make sure that record.json says who answered, and nothing of another kind."""
    for name, known in (("backend", tuple(BACKENDS)), ("dtype", PARAMETER_DTYPES)):
        if name not in facts:
            raise FormatError("a part of the record is missing", where=name, found=f"no {name}")
        if facts[name] not in known:
            raise FormatError("is unknown", where=name, expected=f"one of {', '.join(known)}", found=shown(facts[name]))
    for name in ("versions", "environment"):
        texts = facts.get(name, {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise FormatError("breaks its rule", where=name, expected="an object of texts", found=shown(texts))


def _check_answers(answers: Mapping[str, NpyArray], probe: Probe, config: GPTJConfig | None) -> None:
    """Make sure that the answers have the dtypes and shapes that follow from the probe and the model.

    Without a config the model's sizes are those of the answers, which must then be the same in all of them.
    """
    for name, array in answers.items():
        kinds = ("int64", "int32") if name in _TOKENS else ("float32", "float64")
        if array.dtype.name not in kinds:
            raise FormatError("of another dtype", where=name, expected=" or ".join(kinds), found=array.dtype.name)
    shapes = {name: array.shape for name, array in answers.items()}
    (b, t), (rows, n) = probe.input_ids.shape, probe.prompt_ids.shape
    if config is None:

        def size(name: str, axis: int) -> int:
            return dict(enumerate(shapes[name])).get(axis, 0)

        layers, h = size("attentions", 0), size("attentions", 2)
        v, m = size("logits", 2), size("hidden_states", 3)
    else:
        layers, h, v, m = config.n_layer, config.n_head, config.vocab_size, config.n_embd
    expected: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("logits", "far_logits", "plain_logits", "cached_logits"), (b, t, v)),
        "loss": (),
        "hidden_states": (layers + 1, b, t, m),
        "attentions": (layers, b, h, t, t),
    }
    for name in _TOKENS:  # generation stops before the end where every row has chosen a token that ends it
        length = (*shapes[name], 0, 0)[1]
        expected[name] = (rows, min(max(length, n + 1), n + probe.new_tokens))
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise FormatError("of another shape", where=name, expected=shape, found=shapes[name])
    if config is None and sum(array.nbytes for array in answers.values()) > LARGEST_RECORD_BYTES:
        raise LimitError("too large a record", expected=f"at most {LARGEST_RECORD_BYTES} bytes", hint="Give the config")


def record_backend(
    directory: str | os.PathLike[str],
    backend: str,
    *,
    dtype: str = "float32",
    probe: Probe | None = None,
    weights: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Record:
    """The answers of one backend, computed in this process.

    Args:
        directory: a checkpoint.
        backend: "pt", "tf" or "flax".
        dtype: what the parameters are loaded as.
        probe: what to ask; None makes one of the model's config.
        weights: which weights file, where the directory holds several sets.
        trace: where to write the batch's trace too; None writes none.
        adapter: the folder of a LoRA adapter to put to work.

    Raises:
        BackendError: there is no such backend, or its framework is not installed.
        WriteError: the trace could not be written.
        GPTJError: the checkpoint, the probe or the model's call breaks a rule.
    """
    started = time.monotonic()
    wing = gptj.backend(backend)
    model = wing.GPTJForCausalLM.from_pretrained(directory, param_dtype=dtype, weights=weights)
    if adapter is not None:
        model.load_adapter(adapter)
    model.generation_config = None  # what a folder sets for its texts says nothing about the weights
    probe = make_probe(model.config) if probe is None else probe
    probe.check(model.config)
    answers = _model_calls(wing, model, probe) | {"cached_logits": _cached_logits(wing, model, probe)}
    for name, options in (("greedy", {"do_sample": False}), ("sampled", _SAMPLING | {"seed": probe.seed})):
        made = model.generate(
            probe.prompt_ids, attention_mask=probe.prompt_mask, max_new_tokens=probe.new_tokens, **options
        )
        answers[name] = np.asarray(wing.to_numpy(getattr(made, "sequences", made)), np.int64)
    if trace is not None:
        batch = batch_of_probe(probe)
        prompts = probe.prompt_ids, probe.prompt_mask
        record_trace(directory, backend, trace, dtype=dtype, batch=batch, seed=probe.seed, weights=weights, model=model,
                     generate=probe.new_tokens, prompts=prompts)  # fmt: skip
    facts = _facts(backend) | {"seconds": round(time.monotonic() - started, 3)}
    return Record(backend, dtype, probe, answers, facts)


_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""The whole distribution, so that what is drawn hangs on every logit."""


def _model_calls(wing: ModuleType, model: Any, probe: Probe) -> dict[str, NDArray[Any]]:
    """The answers of whole calls of the model."""
    batch = model(
        probe.input_ids,
        attention_mask=probe.attention_mask,
        position_ids=probe.position_ids,
        labels=probe.labels,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    far = model(
        probe.input_ids, attention_mask=probe.attention_mask, position_ids=probe.far_position_ids, use_cache=False
    )
    plain = model(probe.input_ids, use_cache=False)
    return {
        "logits": _to_storable(wing, batch.logits),
        "loss": _to_storable(wing, batch.loss),
        "hidden_states": np.stack([_to_storable(wing, h) for h in batch.hidden_states]),
        "attentions": np.stack([_to_storable(wing, a) for a in batch.attentions]),
        "far_logits": _to_storable(wing, far.logits),
        "plain_logits": _to_storable(wing, plain.logits),
    }


def _cached_logits(wing: ModuleType, model: Any, probe: Probe) -> NDArray[Any]:
    """The batch's logits once more, by a prefill of `probe.prefill` tokens and then one token a call.

    Over a cache of fixed capacity and with a mask as long, so that every step has one shape: a compiler makes two
    programs, not one a step.
    """
    rows, t = probe.input_ids.shape
    past, parts = model.init_cache(rows, t), []
    for start, stop in [(0, probe.prefill), *((n, n + 1) for n in range(probe.prefill, t))]:
        output = model(
            probe.input_ids[:, start:stop],
            past_key_values=past,
            attention_mask=probe.attention_mask,
            position_ids=probe.position_ids[:, start:stop],
            use_cache=True,
        )
        past = output.past_key_values
        parts.append(_to_storable(wing, output.logits))
    return np.concatenate(parts, axis=1)


def _to_storable(wing: ModuleType, value: Any) -> NDArray[Any]:
    """A wing's array in NumPy, 16-bit numbers as float32: an .npz knows no bfloat16."""
    array = np.asarray(wing.to_numpy(value))
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _facts(backend: str) -> dict[str, Any]:
    """Who computed: versions, the variables that change a framework's arithmetic or threads, the machine."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return {
        "versions": library_versions(backend),
        "environment": variables,
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Save what `record_backend` gives; see `gptj.parity.processes.end_of` for what is returned."""
    parser = argparse.ArgumentParser(
        prog="python -m gptj.parity.record", description="Write down what one backend answers."
    )
    parser.add_argument("directory", help="a checkpoint")
    parser.add_argument("--backend", required=True, choices=("pt", "tf", "flax"))
    parser.add_argument("--dtype", default="float32", choices=PARAMETER_DTYPES)
    parser.add_argument("--probe", help="an .npz of what to ask; without it, one is made of the model's config")
    parser.add_argument("--weights", help="which weights file, where there are several sets")
    parser.add_argument("--trace", help="where to write every value between embedding and loss")
    parser.add_argument("--adapter", help="the folder of a LoRA adapter")
    parser.add_argument("--out", required=True, help="the folder for record.npz and record.json")
    options = parser.parse_args(arguments)

    def record() -> None:
        probe = None if options.probe is None else Probe.load(options.probe)
        chosen = {name: getattr(options, name) for name in ("dtype", "weights", "adapter", "trace")}
        record_backend(options.directory, options.backend, probe=probe, **chosen).save(options.out)

    return end_of(record)


if __name__ == "__main__":
    sys.exit(main())
