"""Reports written into files, each whole or not at all, and nothing replaced unasked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gptj.errors import InputError, WriteError, shown
from gptj.parity.findings import Findings
from gptj.writing.output_file import whole_file

__all__ = ["KINDS", "kind_of", "render", "require_free", "write_report"]

KINDS: Mapping[str, str] = {".html": "html", ".htm": "html", ".xml": "junit", ".md": "markdown", ".json": "json"}
"""The report that a file's ending asks for."""


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of report that a file's name asks for.

    Raises:
        InputError: it asks for none.
    """
    kind = KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError("not the suffix of a report", where=shown(path), expected=", ".join(KINDS))
    return kind


def require_free(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Make sure that nothing is at `path` that should not be replaced, before long work begins.

    Raises:
        WriteError: something is there, or its folder is not.
    """
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        raise WriteError("is there already", file=path, hint="Give --overwrite to replace it")
    if path.is_dir():
        raise WriteError("is a folder", file=path, expected="a file to write")
    if not path.parent.is_dir():
        raise WriteError("its folder is not there", file=path)


def render(kind: str, *findings: Findings) -> str:
    """A report: "html", "junit", "markdown", or "json", which is of one run."""
    if kind == "json":
        [found] = findings
        return found.to_json()
    if kind == "junit":
        from gptj.parity.reports.junit import render_junit

        return render_junit(*findings)
    if kind == "markdown":
        from gptj.parity.reports.markdown import render_markdown

        return render_markdown(*findings)
    from gptj.parity.reports.page import render_page

    return render_page(*findings)


def write_report(
    path: str | os.PathLike[str], *findings: Findings, kind: str | None = None, overwrite: bool = False
) -> list[Path]:
    """Write a report; each file takes its place when all of it is on the disk.

    Args:
        path: of the file.
        findings: one or several. JSON is of one run: of others, FILE-2.json and so on stand beside it.
        kind: of the report; None goes by the file's ending.
        overwrite: whether to replace what is there.

    Raises:
        InputError: the file's ending asks for no report.
        WriteError: something is there already, or it could not be written.

    Returns:
        The files.
    """
    kind, path = kind_of(path) if kind is None else kind, Path(path)
    files = {path: findings}
    if kind == "json":
        others = {path.with_name(f"{path.stem}-{n}{path.suffix}"): (one,) for n, one in enumerate(findings[1:], 2)}
        files = {path: findings[:1], **others}
    for file in files:
        require_free(file, overwrite=overwrite)
    for file, some in files.items():
        data = render(kind, *some).encode("utf-8")
        with whole_file(file) as write:
            write(data)
    return [*files]
