"""Who is measured: a library in a framework, in a dtype, with the weights in the form that it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

FRAMEWORKS = ("pt", "tf", "flax")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of those who are measured.

    Attributes:
        name: on the command line and in the tables: library, framework, dtype where it is not float32.
        engine: the class in engines.py that drives it.
        family: the framework, or the library that is its own framework.
        dtype: of the weights as a token reads them.
        copy: which copy of the weights it opens; see folders.py.
        options: for the engine.
        trains: whether a training step is measured.
        before: whether it is the checkout that `--against` names, in place of this one.
    """

    name: str
    engine: str
    family: str
    dtype: str
    copy: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    trains: bool = False
    before: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith("gptj-") and not self.before

    @property
    def parallel(self) -> str:
        """What a training step's and a load's ratio is against: the same framework in transformers."""
        return f"transformers-{self.family}"


def contenders() -> dict[str, Contender]:
    """All of them by name: ours, the same of another checkout, the peers."""
    ours = _ours()
    earlier = [dataclasses.replace(contender, name=f"{contender.name}-before", before=True) for contender in ours]
    found = [*ours, *earlier, *_transformers(), *_ctranslate2(), *_openvino()]
    return {contender.name: contender for contender in found}


def _ours() -> list[Contender]:
    plain = [
        _wing(f"gptj-{family}", family, "float32", "folder", {"param_dtype": "float32"}, trains=True)
        for family in FRAMEWORKS
    ]
    fused = {"param_dtype": "float32", "attn_implementation": "sdpa"}
    plain.insert(1, _wing("gptj-pt-sdpa", "pt", "float32", "folder", fused, trains=True))
    plain.insert(2, _wing("gptj-pt-bfloat16", "pt", "bfloat16", "bfloat16", {"param_dtype": "bfloat16"}))
    prepared = [
        _wing(f"gptj-{family}-fast", family, "float32", "folder", {"inference": True, "param_dtype": "float32"})
        for family in FRAMEWORKS
    ]
    prepared += [
        _wing(
            f"gptj-{family}-fast-bfloat16",
            family,
            "bfloat16",
            "bfloat16",
            {"inference": True, "param_dtype": "bfloat16"},
        )
        for family in FRAMEWORKS
    ]
    # The other two wings have no quantised weights.
    for dtype in ("int8", "int4"):
        prepared.append(_wing(f"gptj-pt-fast-{dtype}", "pt", dtype, "folder", {"inference": True, "quantize": dtype}))
    return [*plain, *prepared]


def _wing(name: str, family: str, dtype: str, copy: str, load: dict[str, Any], *, trains: bool = False) -> Contender:
    return Contender(name, "Ours", family, dtype, copy, {"family": family, "load": load}, trains)


def _transformers() -> list[Contender]:
    return [
        Contender(
            "transformers-pt", "TransformersPyTorch", "pt", "float32", "folder", {"dtype": "float32"}, trains=True
        ),
        Contender(
            "transformers-pt-bfloat16", "TransformersPyTorch", "pt", "bfloat16", "bfloat16", {"dtype": "bfloat16"}
        ),
        Contender("transformers-tf", "TransformersTensorFlow", "tf", "float32", "tf", trains=True),
        Contender("transformers-flax", "TransformersFlax", "flax", "float32", "flax", trains=True),
    ]


def _ctranslate2() -> list[Contender]:
    return [
        Contender("ctranslate2" + suffix, "CTranslate2", "ctranslate2", dtype, copy, {"compute_type": dtype})
        for suffix, dtype, copy in (
            ("", "float32", "ctranslate2"),
            ("-bfloat16", "bfloat16", "ctranslate2-bfloat16"),
            ("-int8", "int8", "ctranslate2-int8"),
        )
    ]


def _openvino() -> list[Contender]:
    return [
        Contender("openvino", "OpenVINO", "openvino", "float32", "openvino", {"precision": "f32"}),
        Contender("openvino-int8", "OpenVINO", "openvino", "int8", "openvino-int8", {}),
    ]
