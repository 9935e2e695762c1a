"""Jobs of a GitHub workflow on a page of the documentation, as far as a shell can run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Step", "jobs_of_page"]


class Step(NamedTuple):
    """One step: a shell's lines, or an action with what it is given."""

    run: str | None
    uses: str | None
    always: bool
    given: dict[str, str]


def jobs_of_page(page: Path) -> dict[str, list[Step]]:
    """Each job's steps in the first YAML block of a page.

    Read by its indentation: keys at 2 spaces under `jobs:` are jobs, items at 6 are steps, `with:` has keys at 10.
    """
    [block] = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    _, _, jobs = block.partition("\njobs:\n")
    found: dict[str, list[Step]] = {}
    for name, body in re.findall(r"^  (\w+):\n((?:    .*\n)+)", jobs, re.M):
        _, _, steps = body.partition("    steps:\n")
        found[name] = [_step(text) for text in re.split(r"^      - ", steps, flags=re.M)[1:]]
    return found


def _step(text: str) -> Step:
    members = dict(re.findall(r"^(?:        )?(name|uses|if|run|with): ?(.*(?:\n          .*)*)", text, re.M))
    run = members.get("run")
    if run is not None and run.startswith("|\n"):
        run = "\n".join(line[10:] for line in run[2:].splitlines())
    given = dict(re.findall(r"^          ([\w-]+): (.*)", members.get("with", ""), re.M))
    return Step(run, members.get("uses"), members.get("if") == "always()", given)
