"""Run the kinds of malformed inputs; see the package's own docstring."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "documents"))  # pytest has it there already

from page_parts import ROOT, Part, markdown_table

from gptj.errors import GPTJError
from malformed import GOOD, Malformed, Outcome, cases, kinds, title

TABLE = Part("docs/faults.md", "malformed", "python -m malformed")

LONGEST_S = 60
"""A refusal takes milliseconds, a command with its imports a second or two; what takes a minute would never end."""

MOST_BYTES = 1_000_000_000
"""More than any of these small inputs may cost over the imports."""


def outcome(case: Malformed, folder: Path) -> tuple[Outcome, str]:
    """What comes of a case, and what was said."""
    case.make(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            case.door(folder)
    except GPTJError as error:
        came, said = ("refused" if case.names in str(error) else "unnamed"), str(error)
    except AssertionError as error:
        came, said = "wrong", repr(error)
    except MemoryError as error:
        came, said = "memory", repr(error)
    except BaseException as error:
        came, said = "traceback", repr(error)
    else:
        said = "; ".join(str(warning.message) for warning in heard)
        came = "said" if case.names in said else "unnamed" if said else "silent"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MOST_BYTES:
        came, said = "memory", f"{grown:,} bytes; {said}"
    if came not in ("said", "silent") and [
        path for path in folder.iterdir() if path.name == "out" or "stage" in path.name
    ]:
        came = "left"
    if came in GOOD and came != case.outcome:
        came = "silent" if came == "said" else "unnamed"
    return came, said


def run_from(kind: str, first: int) -> None:
    """Run the cases of a kind from number `first` on, and print a line of JSON before and after each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, case in enumerate(cases(kind)[first:], first):
        print(json.dumps({"begun": number}), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            came, said = outcome(case, Path(folder))
            faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"number": number, "came": came, "said": said}), flush=True)


def run(kind: str) -> list[tuple[Malformed, Outcome, str]]:
    """Every case of a kind with what came of it."""
    results: list[tuple[Malformed, Outcome, str]] = []
    listed = cases(kind)
    while len(results) < len(listed):
        command = [sys.executable, "-m", "malformed", "--from", str(len(results)), kind]
        path = os.pathsep.join(
            [*(str(ROOT / "tests" / name) for name in ("conversion", "support", ".")), os.environ.get("PYTHONPATH", "")]
        )
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        results += [(listed[line["number"]], line["came"], line["said"]) for line in lines if "came" in line]
        if not lines:
            raise RuntimeError(done.stderr)
        if "begun" in lines[-1]:
            died = "hang" if "Timeout" in done.stderr else "traceback"
            results.append((listed[len(results)], died, done.stderr[-500:]))
    return results


def table() -> str:
    """Each kind with how many cases came to what."""
    columns = ["kind", "cases", "refused by name", "read and said", "silent", "wrong", "traceback", "hang or memory"]
    total: Counter[str] = Counter()
    rows = []
    for kind in kinds():
        counts = Counter(came for _, came, _ in run(kind))
        total += counts
        rows.append(_row(title(kind), counts))
    return markdown_table(columns, [*rows, _row("all", total)])


def _row(name: str, counts: Counter[str]) -> list[str]:
    silent, stuck = counts["silent"] + counts["unnamed"] + counts["left"], counts["hang"] + counts["memory"]
    numbers = (counts.total(), counts["refused"], counts["said"], silent, counts["wrong"], counts["traceback"], stuck)
    return [name, *map(str, numbers)]


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--from"]:
        run_from(arguments[2], int(arguments[1]))
    elif arguments and arguments[0] != "--write":
        for kind in arguments:
            for case, came, said in run(kind):
                print(f"{came:9}  {case.what}: {said[:300]}")
    else:
        text = table()
        print(text)
        if arguments:
            TABLE.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
