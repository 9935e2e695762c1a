"""What came of it: figures with all their repeats, failures with their reasons, in one JSON file that runs add to.

    {"machine": {...}, "shapes": {"M": {"gptj-pt": {
        "versions": {"torch": "2.13.0"}, "made": [17, 4, ...], "failures": {"train": "..."},
        "figures": {"decode1_s": {"values": [0.071, 0.070, 0.072], "limits": {"read": 4.2e10, "float32": 1.9e11},
                                  "run": "2026-11-26T00:40:00", "steps": 32, "others": 0.01}}}}}}

`steps` are the decoded tokens that were timed, `others` is the share of the machine that others took meanwhile.
A measure may be taken in several runs, some contenders each. A figure remembers its run, since a ratio is worth
something only within one.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

FORMAT = 1


class Results:
    """Figures by shape and contender.

    Args:
        run: what this run calls itself: its date.
        data: the file's contents; None begins anew.
    """

    def __init__(self, run: str, data: dict[str, Any] | None = None) -> None:
        self.run = run
        self.data = data or {"format": FORMAT, "machine": {}, "shapes": {}}
        if self.data.get("format") != FORMAT:
            raise ValueError(f"expected results of format {FORMAT}, found {self.data.get('format')!r}")

    @classmethod
    def opened(cls, path: Path | None, run: str) -> Results:
        """Those of a file, to be added to, or new ones where there is none."""
        return cls(run, json.loads(path.read_text()) if path is not None and path.exists() else None)

    def write(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.rename(path)

    # ---- writing

    def introduce(self, shape: str, contender: str, versions: dict[str, str], made: list[int]) -> None:
        """Note who it is and which greedy tokens it writes."""
        self._entry(shape, contender).update(versions=versions, made=made)

    def record(
        self,
        shape: str,
        contender: str,
        measure: str,
        figures: dict[str, list[float]],
        limits: dict[str, float],
        **said: Any,
    ) -> None:
        """Note what a measure gave: each figure's values turn by turn, the machine's limits meanwhile, and more."""
        entry = self._entry(shape, contender)
        for failed in (measure, "copy"):
            entry["failures"].pop(failed, None)
        common = {"limits": limits, "run": self.run, **said}
        entry["figures"].update({figure: {"values": values, **common} for figure, values in figures.items()})

    def fail(self, shape: str, contender: str, measure: str, reason: str) -> None:
        self._entry(shape, contender)["failures"][measure] = reason

    def _entry(self, shape: str, contender: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"versions": {}, "made": None, "figures": {}, "failures": {}}
        entry: dict[str, Any] = self.data["shapes"].setdefault(shape, {}).setdefault(contender, empty)
        return entry

    # ---- reading

    @property
    def shapes(self) -> list[str]:
        return list(self.data["shapes"])

    def contenders(self, shape: str) -> list[str]:
        return list(self.data["shapes"][shape])

    def failures(self, shape: str) -> list[tuple[str, str, str]]:
        """Contender, measure, reason."""
        entries = self.data["shapes"].get(shape, {}).items()
        return [(name, measure, why) for name, entry in entries for measure, why in entry["failures"].items()]

    def figure(self, shape: str, contender: str, figure: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.data["shapes"][shape].get(contender, {"figures": {}})["figures"].get(figure)
        return found

    def median(self, shape: str, contender: str, figure: str) -> float | None:
        found = self.figure(shape, contender, figure)
        return None if found is None else statistics.median(found["values"])

    def limits(self, shape: str, contender: str, figure: str) -> dict[str, float]:
        found = self.figure(shape, contender, figure)
        return {} if found is None else found["limits"]

    def ratio(self, shape: str, ours: str, peer: str, figures: tuple[str, ...]) -> tuple[float, bool] | None:
        """How many times the peer's time ours is less (the sum of several figures), and whether one run gave both."""
        pairs = [(self.figure(shape, ours, name), self.figure(shape, peer, name)) for name in figures]
        if any(a is None or b is None for a, b in pairs):
            return None
        times = [sum(statistics.median(side["values"]) for side in sides) for sides in zip(*pairs, strict=True)]
        return times[1] / times[0], all(a["run"] == b["run"] for a, b in pairs)

    def made(self, shape: str, contender: str) -> list[int] | None:
        """Its greedy tokens."""
        tokens: list[int] | None = self.data["shapes"][shape].get(contender, {}).get("made")
        return tokens

    def agreement(self, shape: str, contender: str, reference: str) -> tuple[int, int] | None:
        """How many greedy tokens are the reference's, before the first that is not, and of how many."""
        made, expected = self.made(shape, contender), self.made(shape, reference)
        if not made or not expected:
            return None
        same = next((n for n, (a, b) in enumerate(zip(made, expected, strict=True)) if a != b), len(made))
        return same, len(made)

    def others(self, shape: str) -> float:
        """The largest share of the machine that others took during any figure of a shape."""
        entries = self.data["shapes"][shape].values()
        return max(
            (figure.get("others", 0.0) for entry in entries for figure in entry["figures"].values()), default=0.0
        )

    def medians_of_limits(self, shape: str) -> dict[str, float]:
        """The machine's limits, over all figures of a shape."""
        found: dict[str, list[float]] = {}
        for entry in self.data["shapes"][shape].values():
            for figure in entry["figures"].values():
                for name, rate in figure["limits"].items():
                    found.setdefault(name, []).append(rate)
        return {name: statistics.median(rates) for name, rates in found.items()}
