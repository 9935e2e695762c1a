"""The findings of a comparison, as one JSON document: what every part of parity fills, and every report is made from.

The schema is `findings.schema.json`, beside this file: it alone says what a document must be. A number that is unknown
is None here and null there; infinity and NaN, which JSON has no numbers for, are the texts inf, -inf and nan there.
Standard library alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from gptj.errors import FormatError, ParityError, naming_file, shown, warn_of
from gptj.parity.json_schema import check_schema
from gptj.paths.json_file import parse_json_object, read_small_file

__all__ = [
    "PARTS",
    "Findings",
    "LadderRung",
    "MatrixRow",
    "MeasureFound",
    "PairFound",
    "PlantedMistake",
    "SmallestFound",
    "TapFound",
    "TextFound",
    "findings_schema",
]

VERSION = 1
LARGEST_FILE_BYTES = 256_000_000
"""Twenty pairs of traces of the 6B model are under 20 MB."""

Verdict = Literal["holds", "differs"]
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclasses.dataclass(frozen=True)
class MeasureFound:
    """One answer of a backend against another's, the oracle's, or its own by another way: a row of the matrix.

    Attributes:
        backend: whose.
        against: the other backend, "oracle", or in the matrix the two ways, "cached against whole"; `row` in its JSON.
        what: of which answer, see `gptj.parity.report.Measure`.
        difference, limit: the largest difference, and the largest that is right.
        holds: whether it is within its limit.
        where: the place of the largest difference.
    """

    backend: str
    against: str
    what: str
    difference: float | None
    limit: float | None
    holds: bool
    where: str = ""


MatrixRow = MeasureFound
"""The same, as the matrix has it."""


@dataclasses.dataclass(frozen=True)
class TapFound:
    """One intermediate value of two computations.

    Attributes:
        tap: its name, see `gptj.calls.taps`.
        difference: absolute, at the place where it is the largest share of its bound.
        bound: how much of it rounding explains.
        holds: whether rounding explains it.
        born: whether an error was born in this operation; False where it is what its inputs give, in both; None where
            that cannot be told.
        local, local_bound: the difference from the operation in float64, on the inputs that were recorded.
        where: row, head, token, channel.
        needs: what a trace lacks to compute it again, where `born` cannot be told.
    """

    tap: str
    difference: float | None
    bound: float | None
    holds: bool
    born: bool | None = None
    local: float | None = None
    local_bound: float | None = None
    where: str = ""
    needs: str | None = None

    @property
    def right(self) -> bool:
        """Whether the value is within its bound, and no error was born in it."""
        return self.holds and not self.born


@dataclasses.dataclass(frozen=True)
class PairFound:
    """Two computations, value by value, in the order of the computation.

    Attributes:
        a, b: their names; a is the more exact one.
        taps: the values that both have.
        dtype: what b computes in.
        headline: the result in a sentence.
        looks_like: a known mistake that explains the difference.
    """

    a: str
    b: str
    taps: tuple[TapFound, ...]
    dtype: str | None = None
    headline: str = ""
    looks_like: str | None = None

    @property
    def right(self) -> bool:
        """Whether every value is."""
        return all(tap.right for tap in self.taps)


@dataclasses.dataclass(frozen=True)
class TextFound:
    """The texts of two computations after one prompt.

    Attributes:
        a, b: their names.
        prompt: its number.
        tokens: how many were written.
        first_difference: the number of the first token that differs; None where none does.
        margin_a, margin_b: between the two best logits there.
        bound: the margin that rounding may turn.
        tie: whether rounding explains the first difference.
        errors: the largest difference of the logits at each token.
    """

    a: str
    b: str
    prompt: int
    tokens: int
    first_difference: int | None
    margin_a: float | None = None
    margin_b: float | None = None
    bound: float | None = None
    tie: bool | None = None
    errors: tuple[float | None, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the texts are the same, or a tie parted them."""
        return self.first_difference is None or bool(self.tie)


@dataclasses.dataclass(frozen=True)
class LadderRung:
    """A backend in one precision against float64.

    Attributes:
        backend, rung: whose, and in which precision.
        error: the largest of any logit.
        kl: the divergence of the next token's distribution, in nats.
        top1, greedy: the share of positions with the same best token, of greedy tokens that are the same.
        prompts: over how many.
    """

    backend: str
    rung: str
    error: float | None = None
    kl: float | None = None
    top1: float | None = None
    greedy: float | None = None
    prompts: int | None = None

    @property
    def right(self) -> bool:
        """Whether its error, where it is known, is a number."""
        return self.error is None or math.isfinite(self.error)


@dataclasses.dataclass(frozen=True)
class PlantedMistake:
    """A mistake that was put in on purpose: whether, and where, it was noticed; `expected` is the tap it changes."""

    backend: str
    mutant: str
    caught: bool
    headline: str = ""
    expected: str | None = None


@dataclasses.dataclass(frozen=True)
class SmallestFound:
    """The smallest relative change of one number (`of`, of the kind `what`) that a value, `tap`, would have shown."""

    backend: str
    dtype: str
    what: str
    change: float | None
    tap: str | None = None
    of: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Findings:
    """The whole document.

    Attributes:
        verdict: "differs" where anything does that rounding does not explain.
        headline: the result in one sentence.
        folder: the model's.
        config: its config.json.
        versions: of each backend's libraries.
        notes: what a reader should know, a sentence each.
        measures, pairs, texts, matrix, ladder, sensitivity, smallest: what was found, each empty where nobody looked.
    """

    verdict: Verdict
    headline: str
    folder: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measures: tuple[MeasureFound, ...] = ()
    pairs: tuple[PairFound, ...] = ()
    texts: tuple[TextFound, ...] = ()
    matrix: tuple[MeasureFound, ...] = ()
    ladder: tuple[LadderRung, ...] = ()
    sensitivity: tuple[PlantedMistake, ...] = ()
    smallest: tuple[SmallestFound, ...] = ()

    def __repr__(self) -> str:
        return f"Findings({self.verdict}: {self.headline})"

    @property
    def passed(self) -> bool:
        """Whether all holds."""
        return self.verdict == "holds"

    def wrong(self) -> Iterator[str]:
        """Sentences, one for each thing that does not hold."""
        for measure in self.measures:
            if not measure.holds:
                yield f"{measure.backend} and {measure.against} disagree on {measure.what}{_size(measure)}"
        for pair in self.pairs:
            first = next((tap for tap in pair.taps if not tap.right), None)
            if first is not None:
                yield pair.headline or f"{pair.b} and {pair.a} part at {first.tap}"
        for text in self.texts:
            if not text.right:
                yield (f"{text.a} and {text.b} part after prompt {text.prompt} at token {text.first_difference}, "
                       "which no tie explains")  # fmt: skip
        for row in self.matrix:
            if not row.holds:
                yield f"{row.backend}, {row.against}: {row.what}{_size(row)}"

    def raise_if_failed(self) -> None:
        """Return quietly where all holds.

        Raises:
            ParityError: with the headline, how much more is wrong, and the versions.
        """
        __tracebackhide__ = True  # a test that fails by it shows its own line
        if self.passed:
            return
        others = [sentence for sentence in self.wrong() if sentence != self.headline]
        some = "; ".join(others[:3]) + (f"; and {len(others) - 3} more" if len(others) > 3 else "")
        raise ParityError(self.headline, file=self.folder, hint=some or None)

    def extended(self, **parts: Iterable[Mapping[str, Any]]) -> Findings:
        """These findings and more, in the schema's shapes, by the names of its lists; the verdict follows.

        Args:
            parts: measures, pairs, texts, matrix, ladder, sensitivity, smallest. Numbers may be infinite or NaN.

        Raises:
            FormatError: one breaks the schema.

        >>> row = {"backend": "pt", "row": "cached against whole", "what": "logits", "difference": 1.0, "limit": 0.1}
        >>> Findings("holds", "all agree").extended(matrix=[row | {"holds": False}])
        Findings(differs: pt, cached against whole: logits: 1, of 0.1 allowed)
        """
        document = self.as_dict() | {"verdict": "differs"}
        for name, more in parts.items():
            document[name] = [*document.get(name, ()), *map(_plain, more)]
        found = Findings.from_dict(document)
        wrong = next(found.wrong(), None)
        if self.passed and wrong is not None:
            return dataclasses.replace(found, headline=wrong)
        return dataclasses.replace(found, verdict=self.verdict)

    def as_dict(self) -> dict[str, Any]:
        """The document as JSON takes it."""
        members = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        members["matrix"] = [_renamed(row, "against", "row") for row in members["matrix"]]
        return {"findings": VERSION, **members}

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, file: str | os.PathLike[str] = "findings") -> Findings:
        """The findings that a text spells.

        Args:
            text: JSON, in UTF-8 where it is bytes.
            file: what an error or a warning names.

        Raises:
            FormatError: it is no JSON, breaks the schema, or its verdict contradicts what it holds.
        """
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return cls.from_dict(parse_json_object(data, file=file), file=file)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Findings:
        """The findings in a file.

        Raises:
            MissingFileError, LimitError: see `gptj.paths.json_file.read_small_file`.
            FormatError: see `from_json`.
        """
        return cls.from_json(read_small_file(path, limit_bytes=LARGEST_FILE_BYTES), file=path)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> Findings:
        """The findings of a document that `json.loads` gave.

        Raises:
            FormatError: it breaks the schema, names a tap twice, or its verdict contradicts what it holds.
        """
        document = {**document}
        with naming_file(file):
            version = document.get("findings", VERSION)
            if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
                raise FormatError("of a later version", where="findings", expected=VERSION, found=shown(version),
                                  hint="Read it with a newer gptj")  # fmt: skip
            unknown: list[str] = []
            check_schema(document, findings_schema(), unknown=unknown.append)
            for place in unknown[:3]:
                warn_of("not known, and left out", file=file, where=place)
            if len(unknown) > 3:
                warn_of(f"{len(unknown) - 3} more members are not known, and left out", file=file)
            document["matrix"] = [_renamed(row, "row", "against") for row in document.get("matrix", ())]
            found = cls(
                document["verdict"], document["headline"], document.get("folder"), document.get("config", {}),
                document.get("versions", {}), tuple(document.get("notes", ())),
                **{name: tuple(_read(kind, one) for one in document.get(name, ())) for name, kind in PARTS.items()},
            )  # fmt: skip
            for number, pair in enumerate(found.pairs):
                names = [tap.tap for tap in pair.taps]
                if len({*names}) < len(names):
                    twice = next(name for name in names if names.count(name) > 1)
                    raise FormatError("a tap twice", where=f"pairs[{number}].taps", found=shown(twice))
            wrong = next(found.wrong(), None)
            if found.passed and wrong is not None:
                raise FormatError("contradicts what was found", where="verdict", expected="differs",
                                  found=f"holds, and {shown(wrong)}")  # fmt: skip
            return found


PARTS: dict[str, Any] = {
    "measures": MeasureFound, "pairs": PairFound, "texts": TextFound, "matrix": MeasureFound, "ladder": LadderRung,
    "sensitivity": PlantedMistake, "smallest": SmallestFound,
}  # fmt: skip
"""The lists of a document, by their members' kinds."""

_NUMBERS = frozenset(
    {"difference", "limit", "bound", "local", "local_bound", "margin_a", "margin_b", "error", "kl", "top1", "greedy"}
    | {"change"}
)
_COUNTS = frozenset({"prompt", "tokens", "first_difference", "prompts"})


def findings_schema() -> dict[str, Any]:
    """The JSON schema of the document."""
    schema: dict[str, Any] = json.loads(Path(__file__).with_name("findings.schema.json").read_text(encoding="utf-8"))
    return schema


def _read(kind: type[Any], members: Mapping[str, Any]) -> Any:
    """A part from its JSON, which follows the schema; members that the part does not have are left out."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name not in members:
            continue
        value = members[field.name]
        if field.name == "taps":
            value = tuple(_read(TapFound, tap) for tap in value)
        elif field.name == "errors":
            value = tuple(map(_number, value))
        elif field.name in _NUMBERS:
            value = _number(value)
        elif field.name in _COUNTS and value is not None:
            value = int(value)  # 3.0 is a whole number in JSON
        values[field.name] = value
    return kind(**values)


def _number(value: float | str | None) -> float | None:
    if value is None:
        return None
    return _NOT_FINITE[value] if isinstance(value, str) else float(value)


def _plain(value: Any) -> Any:
    """A part as JSON takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _renamed(members: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in members.items()}


def _size(found: MeasureFound) -> str:
    limit = "" if found.limit is None else f", of {found.limit:.2g} allowed"
    size = "" if found.difference is None else f": {found.difference:.2g}{limit}"
    return size + (f", at {found.where}" if found.where else "")
