"""Traces that are none, or that say of themselves what their arrays contradict, and mappings of their names."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gptj.parity.differences import compare_traces
from gptj.parity.revealing import revealing_config
from gptj.parity.tap_names import TapNames
from gptj.parity.trace import TraceFacts, open_trace
from malformed import Malformed

TITLE = "traces"

Arrays = dict[str, np.ndarray[Any, Any]]
NAME = "broken.safetensors"


def _config(**changes: Any) -> dict[str, Any]:
    members = revealing_config(n_positions=64).to_dict()
    return {**members, **changes}


def _arrays() -> Arrays:
    q = np.ones((2, 4, 5, 12), np.float32)
    return {
        "input_ids": np.ones((2, 5), np.int64),
        "attention_mask": np.ones((2, 5), np.int64),
        "embedding": np.ones((2, 5, 48), np.float32),
        "h.0.q": q,
        "h.0.visible": np.ones((2, 1, 5, 5), np.bool_),
        "h.0.weights": np.ones((2, 4, 5, 5), np.float32),
        "h.2.sum": np.ones((2, 5, 48), np.float32),
        "logits": np.ones((2, 5, 216), np.float32),
        "loss": np.ones((), np.float32),
    }


def _metadata() -> dict[str, str]:
    return TraceFacts("sample", "float32", revealing_config(n_positions=64)).as_metadata()


def spoilt(
    arrays: Callable[[Arrays], object] = lambda arrays: None,
    metadata: Callable[[dict[str, str]], object] = lambda metadata: None,
) -> Callable[[Path], None]:
    """Makes a trace whose arrays or metadata were changed."""

    def make(folder: Path) -> None:
        held, said = _arrays(), _metadata()
        arrays(held)
        metadata(said)
        save_file(held, folder / NAME, metadata=said)

    return make


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Makes a trace whose bytes were changed."""

    def make(folder: Path) -> None:
        spoilt()(folder)
        path = folder / NAME
        path.write_bytes(change(path.read_bytes()))

    return make


def header_of(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Makes a trace whose header was changed under its data."""

    def rewrite(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return bytes_of(rewrite)


def door(folder: Path) -> object:
    return open_trace(folder / NAME)


def compare(folder: Path) -> object:
    """Compare with a good trace; what is not finite must not pass."""
    save_file(_arrays(), folder / "good.safetensors", metadata=_metadata())
    found = compare_traces([open_trace(folder / "good.safetensors"), open_trace(folder / NAME)])
    assert not found.passed
    return found


def mapped(text: str) -> Callable[[Path], object]:
    """Opens a good trace with a mapping."""

    def opened(folder: Path) -> object:
        (folder / "names.toml").write_text(text)
        return open_trace(folder / NAME, TapNames.from_file(folder / "names.toml"))

    return opened


def _said(key: str, value: str | None) -> Callable[[Path], None]:
    def change(metadata: dict[str, str]) -> None:
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value

    return spoilt(metadata=change)


def _array(name: str, value: np.ndarray[Any, Any]) -> Callable[[Path], None]:
    return spoilt(lambda arrays: arrays.update({name: value}))


def _f(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


FACTS = [
    Malformed(f"{key}: {value!r}"[:60], _said(key, value), door, key)
    for key, values in {
        "trace": (None, "", "2", "01"),
        "source": (None, "", "  "),
        "dtype": (None, "float", "int8", "torch.float32", "FLOAT32"),
        "config": (None, "", "[]", "{", '{"n_layer": 1, "n_layer": 2}', "NaN", "\ud7ff"),
        "versions": ("[]", "3", '{"numpy": 2}', "{'numpy': '2'}", '{"numpy": null}'),
        "seed": ("-1", "1.0", "", "0x1", "1e3", "9" * 400, "\u0663"),
        "threads": ("two", "-0", "01"),
        "weights_sha256": ("abc", "G" * 64, "A" * 64, "0" * 63),
        "rotary_sha256": ("", "0" * 65),
    }.items()
    for value in values
]

CONFIGS = [
    Malformed(f"config: {field} is {value!r}", _said("config", json.dumps(_config(**{field: value}))), door, field)
    for field, value in (
        ("n_layer", 0), ("n_layer", "3"), ("n_head", 0), ("n_embd", -48), ("rotary_dim", 7), ("vocab_size", 1.5),
        ("activation_function", "gelu_old"), ("layer_norm_epsilon", "small"), ("n_positions", None),
    )
]  # fmt: skip

SHAPES = [
    Malformed(f"{name} of shape {list(value.shape)}", _array(name, value), door, name)
    for name, value in (
        ("embedding", _f(2, 5, 47)), ("embedding", _f(2, 6, 48)), ("embedding", _f(3, 5, 48)), ("embedding", _f(5, 48)),
        ("embedding", _f(2, 5, 48, 1)), ("h.0.q", _f(2, 5, 4, 12)), ("h.0.q", _f(2, 4, 5, 48)), ("h.0.q", _f(2, 5, 48)),
        ("h.0.weights", _f(2, 4, 5, 6)), ("h.0.weights", _f(2, 3, 5, 5)), ("h.0.weights", _f(1, 4, 5, 5)),
        ("h.0.visible", np.ones((2, 4, 5, 5), np.bool_)), ("h.0.visible", np.ones((2, 5, 5), np.bool_)),
        ("logits", _f(2, 5, 215)), ("logits", _f(2, 216)), ("loss", _f(1)), ("loss", _f(2, 5)),
        ("input_ids", np.ones((2, 6), np.int64)), ("input_ids", np.ones(10, np.int64)),
        ("attention_mask", np.ones((2, 4), np.int64)), ("position_ids", np.ones((3, 5), np.int64)),
        ("labels", np.ones((2, 4), np.int64)),
    )
]  # fmt: skip

DTYPES = [
    Malformed(f"{name} as {dtype}", _array(name, np.ones(shape, dtype)), door, name)
    for name, shape, dtype in (
        ("embedding", (2, 5, 48), "int32"), ("embedding", (2, 5, 48), "bool"), ("embedding", (2, 5, 48), "uint8"),
        ("h.0.visible", (2, 1, 5, 5), "float32"), ("h.0.visible", (2, 1, 5, 5), "int8"), ("loss", (), "int64"),
        ("input_ids", (2, 5), "float32"), ("attention_mask", (2, 5), "float64"), ("labels", (2, 5), "uint64"),
    )
]  # fmt: skip

NAMES = [
    Malformed(f"a tensor called {name[:30]!r}", _array(name, _f(2, 5, 48)), door, named)
    for name, named in (
        ("h.3.sum", "h.3.sum"), ("h.00.sum", "h.00.sum"), ("h.-1.sum", "h.-1.sum"), ("h.0.sums", "h.0.sums"),
        ("sum", "sum"), ("h.sum", "h.sum"), ("h..sum", "h..sum"), ("h.0.h.1.sum", "h.0.h.1.sum"),
        ("H.0.sum", "H.0.sum"),
        ("h.0.embedding", "embedding"), ("transformer.h.0.sum", "transformer.h.0.sum"), ("h.0.sum ", "h.0.sum"),
        ("h." + "9" * 400 + ".sum", "h.999"), ("token_type_ids", "token_type_ids"),
    )
]  # fmt: skip

VALUES = [
    Malformed(f"{what} in {name}", _array(name, value), compare, name)
    for what, name, value in (
        ("a token beyond the vocabulary", "input_ids", np.full((2, 5), 216)),
        ("a negative token", "input_ids", np.full((2, 5), -1)),
        ("a mask of 2", "attention_mask", np.full((2, 5), 2)),
        ("a position beyond the config's", "position_ids", np.full((2, 5), 64)),
        ("a negative position", "position_ids", np.full((2, 5), -1)),
        ("a label of -99", "labels", np.full((2, 5), -99)),
        ("other tokens", "input_ids", np.full((2, 5), 3)),
        ("another mask", "attention_mask", np.zeros((2, 5), np.int64)),
    )
]

BYTES = [
    Malformed("an empty file", bytes_of(lambda data: b""), door, NAME),
    Malformed("half a file", bytes_of(lambda data: data[: len(data) // 2]), door, NAME),
    Malformed("a byte too few", bytes_of(lambda data: data[:-1]), door, NAME),
    Malformed("a byte too many", bytes_of(lambda data: data + b"\0"), door, NAME),
    Malformed("the header cut", bytes_of(lambda data: data[:100]), door, NAME),
    Malformed("a header of 2^63 bytes", bytes_of(lambda data: struct.pack("<Q", 2**63) + data[8:]), door, NAME),
    Malformed("a zip", bytes_of(lambda data: b"PK\3\4" + data), door, NAME),
    Malformed("no metadata", header_of(lambda header: header.pop("__metadata__")), door, "__metadata__"),
    Malformed(
        "numbers in the metadata", header_of(lambda header: header["__metadata__"].update(seed=3)), door, "__metadata__"
    ),
    Malformed("overlapping taps", header_of(lambda head: head["logits"].update(data_offsets=[0, 8640])), door, NAME),
    Malformed("a shape of 2^40", header_of(lambda header: header["logits"].update(shape=[2**40])), door, "logits"),
    Malformed("no tap", spoilt(lambda arrays: [arrays.pop(key) for key in [*arrays] if "_" not in key]), door, "tap"),
    Malformed("no token", spoilt(lambda arrays: (arrays.clear(), arrays.update(ln_f=_f(2, 0, 48)))), door, "axis t"),
    Malformed("no row", spoilt(lambda arrays: (arrays.clear(), arrays.update(ln_f=_f(0, 5, 48)))), door, "axis b"),
    Malformed(
        "more tokens than positions",
        spoilt(lambda arrays: (arrays.clear(), arrays.update(ln_f=_f(1, 65, 48)))), door, "positions",
    ),
    Malformed(
        "fewer keys than queries",
        spoilt(lambda arrays: (arrays.clear(), arrays.update({"h.0.weights": _f(1, 4, 5, 3)}))), door, "keys",
    ),
    Malformed("a folder", lambda folder: (folder / NAME).mkdir(), door, NAME),
    Malformed("nothing", lambda folder: None, door, NAME),
    Malformed("an unknown key", _said("mood", "good"), door, "mood", "said"),
]  # fmt: skip

MAPPINGS = [
    Malformed(f"a mapping: {text!r}"[:70], spoilt(), mapped(text), named)
    for text, named in (
        ("[[tap]]\nfrom = 'logits'\nto = 'ln_f'", "logits"),
        ("[[tap]]\nfrom = 'embedding'\nto = 'ln_f'\naxes = '(b m) t'", "embedding"),
        ("[[tap]]\nfrom = 'h.{block}.sum'\nto = 'h.{block}.q'\naxes = 'b t (h d)'\n"
         "[[tap]]\nfrom='h.2.sum'\nto='ln_f'", "h.2.sum"),
        ("[[tap]]\nfrom = 'embedding'\nto = 'logits'\naxes = 'b t v'", "logits"),
        ("ignore = ['']", "ignore"),
        ("ignore = [3]", "ignore"),
        ("[tap]\nfrom = 'a'", "tap"),
        ("[[tap]]\nfrom = 3\nto = 'ln_f'", "from"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxes = ''", "axes"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxes = 'b t ()'", "axes"),
        ("a = 1\na = 2", "names.toml"),
        ("a = " + "9" * 5000, "names.toml"),
        ("a = " + "[" * 50_000, "names.toml"),
        ("a = 2026-02-31", "names.toml"),
    )
]  # fmt: skip


def _texts() -> Arrays:
    ids = np.ones((2, 3), np.int64)
    top = np.stack([np.full((2, 3), 2.0), np.full((2, 3), 1.0)], -1).astype(np.float32)
    names = {"prompt_ids": ids, "prompt_mask": ids, "token_ids": ids, "top_ids": np.ones((2, 3, 2), np.int64)}
    return {f"generated.{name}": values for name, values in (names | {"top_logits": top}).items()}


def _with_texts(**changes: np.ndarray[Any, Any] | None) -> Callable[[Path], None]:
    def change(arrays: Arrays) -> None:
        arrays.update(_texts())
        for name, values in changes.items():
            del arrays[f"generated.{name}"]
            if values is not None:
                arrays[f"generated.{name}"] = values

    return spoilt(change)


def compare_texts(folder: Path) -> object:
    """Compare with a trace of good texts."""
    save_file(_arrays() | _texts(), folder / "good.safetensors", metadata=_metadata())
    return compare_traces([open_trace(folder / "good.safetensors"), open_trace(folder / NAME)])


EXTRAS = [
    *(Malformed(f"texts without {name}", _with_texts(**{name: None}), door, name)
      for name in ("prompt_ids", "prompt_mask", "token_ids", "top_ids", "top_logits")),
    *(Malformed(f"texts with {name} of shape {list(shape)}", _with_texts(**{name: np.ones(shape, dtype)}), door, named)
      for name, shape, dtype, named in (
          ("prompt_mask", (2, 4), "int64", "prompt_mask"), ("token_ids", (3, 3), "int64", "token_ids"),
          ("token_ids", (2, 0), "int64", "token_ids"), ("token_ids", (2, 3, 1), "int64", "token_ids"),
          ("top_ids", (2, 3, 1), "int64", "top_ids"), ("top_ids", (2, 3, 3), "int64", "top_ids"),
          ("top_ids", (2, 4, 2), "int64", "top_ids"), ("top_logits", (2, 3), "float32", "top_logits"),
          ("prompt_ids", (0, 3), "int64", "prompt_ids"))),
    *(Malformed(f"texts with {name} as {dtype}", _with_texts(**{name: _texts()[f"generated.{name}"].astype(dtype)}),
                door, name)
      for name, dtype in (("token_ids", "float32"), ("top_logits", "int64"), ("top_ids", "float64"))),
    *(Malformed(f"texts with {name} of {value}", _with_texts(**{name: np.full((2, 3), value)}), compare_texts, name)
      for name, value in (("token_ids", 216), ("token_ids", -1), ("prompt_ids", 216), ("prompt_mask", 2))),
    Malformed("texts of other prompts", _with_texts(prompt_ids=np.full((2, 3), 5)), compare_texts, "prompt_ids"),
    Malformed("texts whose second logit is the larger",
              _with_texts(top_logits=_texts()["generated.top_logits"][..., ::-1].copy()), compare_texts, "top_logits"),
    *(Malformed(f"a tensor called {name!r}"[:60], _array(name, _f(48)), door, name[:40])
      for name in ("generated.", "generated.tokens", "generated", "grad.", "grad", "grad.ln_f.weight", "grad.loss",
                   "grad.transformer.h.3.ln_1.weight", "grad.transformer.h.00.ln_1.weight", "Grad.lm_head.bias",
                   "sgd.transformer.ln_f.weight")),
    *(Malformed(f"a gradient of shape {list(shape)}", _array("grad.transformer.ln_f.weight", _f(*shape)), door, "ln_f")
      for shape in ((), (47,), (48, 1), (1, 48), (0,))),
    *(Malformed(f"a gradient as {dtype}", _array("grad.transformer.ln_f.weight", np.ones(48, dtype)), door, "ln_f")
      for dtype in ("int64", "bool", "uint8")),
]  # fmt: skip

CASES = [*EXTRAS, *FACTS, *CONFIGS, *SHAPES, *DTYPES, *NAMES, *VALUES, *BYTES, *MAPPINGS]
