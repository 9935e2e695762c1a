"""Counters, gauges and histograms, in the text that Prometheus reads."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Mapping

__all__ = ["Metrics"]

_HELP = {
    "gptj_requests_total": "Requests answered, by path and status.",
    "gptj_prompt_tokens_total": "Tokens of prompts, each prompt once for its n answers.",
    "gptj_prompt_tokens_reused_total": "Those of them that were not computed again.",
    "gptj_generated_tokens_total": "Tokens that were generated.",
    "gptj_cancelled_total": "Continuations whose client left.",
    "gptj_step_seconds": "Seconds of a step of all running rows.",
    "gptj_first_token_seconds": "Seconds from a request to its first token.",
    "gptj_request_seconds": "Seconds of a request for a completion.",
    "gptj_rows_running": "Continuations that have a row, or whose prompt is read, be it ahead of one.",
    "gptj_rows_most": "Rows at most.",
    "gptj_waiting": "Continuations that wait for a row.",
}

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counts of what happened; any thread may count.

    Args:
        gauges: by name the functions that tell what is now.
    """

    def __init__(self, gauges: Mapping[str, Callable[[], float]] | None = None) -> None:
        self.gauges = dict(gauges or {})
        self._lock = threading.Lock()
        self.clear()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count."""
        key = name, tuple(sorted(labels.items()))
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Count a value in a histogram."""
        with self._lock:
            counts = self._histograms[name]
            counts[bisect.bisect_left(_BOUNDS, value)] += 1
            counts[-1] += value

    def clear(self) -> None:
        """Begin anew, at 0: a rate knows the first count of what was there before it."""
        with self._lock:
            alone = [name for name in _HELP if name.endswith("_total") and name != "gptj_requests_total"]
            self._counters: dict[tuple[str, Labels], float] = {(name, ()): 0.0 for name in alone}
            self._histograms = {name: [0.0] * (len(_BOUNDS) + 2) for name in _HELP if name.endswith("_seconds")}

    def value(self, name: str, **labels: str) -> float:
        """The count so far."""
        return self._counters.get((name, tuple(sorted(labels.items()))), 0)

    def text(self) -> str:
        """All of it, in Prometheus' text format 0.0.4."""
        with self._lock:
            counters, histograms = dict(self._counters), {name: list(found) for name, found in self._histograms.items()}
        lines: list[str] = []
        for name in sorted({name for name, _ in counters}):
            lines += _head(name, "counter")
            lines += [
                f"{name}{_spelt(labels)} {_number(value)}"
                for (n, labels), value in sorted(counters.items())
                if n == name
            ]
        for name, gauge in sorted(self.gauges.items()):
            lines += [*_head(name, "gauge"), f"{name} {_number(gauge())}"]
        for name, (*counts, total) in sorted(histograms.items()):
            lines += _head(name, "histogram")
            seen = 0.0
            for bound, count in zip((*map("{:g}".format, _BOUNDS), "+Inf"), counts, strict=True):
                seen += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {_number(seen)}')
            lines += [f"{name}_sum {_number(total)}", f"{name}_count {_number(seen)}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    return [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} {kind}"]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _spelt(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
