"""One backend's answers, taken in a process of its own and written down: `python -m gptj.parity.record`.

One process holds one framework, so that neither the import order, nor a thread pool, nor an environment variable of
another framework can colour an answer. What comes out is a folder of two files, `record.npz` and `record.json`,
which say everything that was asked and answered, by which versions, under which environment; the judgement
(`gptj.parity.compare`) needs neither the framework nor the model's process again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gptj
from gptj.dtypes import PARAMETER_DTYPES
from gptj.errors import FormatError, GPTJError, MissingFileError
from gptj.json_file import read_json_object
from gptj.parity.probe import Probe, make_probe

__all__ = ["ANSWERS", "Record", "record_backend"]

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
"""What a record holds besides the probe."""

ARRAYS_FILE, FACTS_FILE = "record.npz", "record.json"
_PROBE_PREFIX = "probe."

_DISTRIBUTIONS = {
    "pt": ("torch",),
    "tf": ("tensorflow", "tensorflow-cpu", "keras"),
    "flax": ("jax", "jaxlib", "flax"),
}
_VARIABLES = ("CUDA_", "GPTJ_", "JAX_", "KERAS_", "MKL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTORCH_", "TF_", "XLA_")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What one backend answered.

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
        """Write the record's two files into `directory`, which is made if it is missing; the JSON last."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        asked = {_PROBE_PREFIX + name: value for name, value in self.probe.as_arrays().items()}
        np.savez(directory / ARRAYS_FILE, allow_pickle=False, **asked, **self.answers)
        facts = {"backend": self.backend, "dtype": self.dtype, **self.facts}
        (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Record:
        """The record in `directory`.

        Raises:
            MissingFileError, FormatError: there is none, or a part of it is missing.
        """
        directory = Path(directory)
        facts = read_json_object(directory / FACTS_FILE)
        path = directory / ARRAYS_FILE
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise MissingFileError("no such file", file=path) from None
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise FormatError(f"not a record's arrays: {error}", file=path) from None
        asked = {name.removeprefix(_PROBE_PREFIX): a for name, a in arrays.items() if name.startswith(_PROBE_PREFIX)}
        wanted = {field.name for field in dataclasses.fields(Probe)}
        missing = sorted((wanted - set(asked)) | (set(ANSWERS) - set(arrays)))
        missing += [name for name in ("backend", "dtype") if name not in facts]
        if missing:
            raise FormatError("a part of the record is missing", file=directory, found=f"no {', '.join(missing)}")
        answers = {name: arrays[name] for name in ANSWERS}
        backend, dtype = str(facts.pop("backend")), str(facts.pop("dtype"))
        return cls(backend, dtype, Probe.of({name: asked[name] for name in wanted}), answers, facts)


def record_backend(
    directory: str | os.PathLike[str],
    backend: str,
    *,
    dtype: str = "float32",
    probe: Probe | None = None,
    weights: str | None = None,
) -> Record:
    """The answers of one backend, computed in this process.

    Args:
        directory: a checkpoint.
        backend: "pt", "tf" or "flax".
        dtype: what the parameters are loaded as.
        probe: what to ask; None makes one of the model's config.
        weights: which weights file, where the directory holds several sets.

    Raises:
        BackendError: there is no such backend, or its framework is not installed.
        GPTJError: the checkpoint, the probe or the model's call breaks a rule.
    """
    started = time.monotonic()
    wing = gptj.backend(backend)
    model = wing.GPTJForCausalLM.from_pretrained(directory, dtype=dtype, weights=weights)
    probe = make_probe(model.config) if probe is None else probe
    probe.check(model.config)
    answers = _model_calls(wing, model, probe) | {"cached_logits": _cached_logits(wing, model, probe)}
    for name, options in (("greedy", {"do_sample": False}), ("sampled", _SAMPLING | {"seed": probe.seed})):
        made = model.generate(
            probe.prompt_ids, attention_mask=probe.prompt_mask, max_new_tokens=probe.new_tokens, **options
        )
        answers[name] = np.asarray(wing.to_numpy(getattr(made, "sequences", made)), np.int64)
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
        "logits": _widened(wing, batch.logits),
        "loss": _widened(wing, batch.loss),
        "hidden_states": np.stack([_widened(wing, h) for h in batch.hidden_states]),
        "attentions": np.stack([_widened(wing, a) for a in batch.attentions]),
        "far_logits": _widened(wing, far.logits),
        "plain_logits": _widened(wing, plain.logits),
    }


def _cached_logits(wing: ModuleType, model: Any, probe: Probe) -> NDArray[Any]:
    """The batch's logits once more, by a prefill of `probe.prefill` tokens and then one token a call."""
    t = probe.input_ids.shape[1]
    past, parts = None, []
    for start, stop in [(0, probe.prefill), *((n, n + 1) for n in range(probe.prefill, t))]:
        output = model(
            probe.input_ids[:, start:stop],
            past_key_values=past,
            attention_mask=probe.attention_mask[:, :stop],
            position_ids=probe.position_ids[:, start:stop],
            use_cache=True,
        )
        past = output.past_key_values
        parts.append(_widened(wing, output.logits))
    return np.concatenate(parts, axis=1)


def _widened(wing: ModuleType, value: Any) -> NDArray[Any]:
    """A wing's array in NumPy, 16-bit numbers as float32: an .npz knows no bfloat16."""
    array = np.asarray(wing.to_numpy(value))
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _facts(backend: str) -> dict[str, Any]:
    """Who computed: versions, the variables that change a framework's arithmetic or threads, the machine."""
    versions = {"gptj": gptj.__version__, "python": platform.python_version()}
    for name in ("numpy", "ml_dtypes", *_DISTRIBUTIONS[backend]):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return {
        "versions": versions,
        "environment": variables,
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Save what `record_backend` gives. Returns 0, or 2 after an error, whose message is the last line of stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m gptj.parity.record", description="Write down what one backend answers."
    )
    parser.add_argument("directory", help="a checkpoint")
    parser.add_argument("--backend", required=True, choices=("pt", "tf", "flax"))
    parser.add_argument("--dtype", default="float32", choices=PARAMETER_DTYPES)
    parser.add_argument("--probe", help="an .npz of what to ask; without it, one is made of the model's config")
    parser.add_argument("--weights", help="which weights file, where there are several sets")
    parser.add_argument("--out", required=True, help="the folder for record.npz and record.json")
    options = parser.parse_args(arguments)
    try:
        probe = None if options.probe is None else Probe.load(options.probe)
        chosen = {"dtype": options.dtype, "weights": options.weights}
        record_backend(options.directory, options.backend, probe=probe, **chosen).save(options.out)
    except GPTJError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
