"""The pytest plugin: `gptj_parity`, a fixture that compares the frameworks on a model.

    def test_the_frameworks_agree(gptj_parity):
        gptj_parity("model", backends=["pt", "flax"], dtype="bfloat16").raise_if_failed()

What was compared stands in a section of the terminal's summary, and with `--gptj-report FILE` in a file: holds,
differs, or not judged, where an error kept a comparison from being one. Who
asks for none of it pays for this module alone: it imports nothing but pytest, which is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gptj.parity.findings import Findings

__all__ = ["Parity", "gptj_parity"]

_SENT = "gptj_findings"
"""Under this key pytest-xdist's workers send their findings to who started them."""


class Parity:
    """The comparisons of one test session, and how to make one. Calling it compares the frameworks on a model.

    Args:
        backends: to compare where a call names none; None is all that are installed.
    """

    def __init__(self, backends: tuple[str, ...] | None) -> None:
        self.backends = backends
        self.found: list[Findings] = []
        self.unjudged: list[str] = []

    def __call__(
        self, directory: str | os.PathLike[str], other: str | os.PathLike[str] | None = None, *,
        backends: Sequence[str] | None = None, matrix: bool = False, ladder: bool = False, **options: Any,
    ) -> Findings:  # fmt: skip
        """The findings on the model in `directory`, each framework in a process of its own.

        Args:
            directory: a checkpoint of a causal language model.
            other: of another folder, whose model is compared with that one's in each framework.
            backends: their names; None is those of --gptj-backends, else all that are installed.
            matrix: whether each framework's ways to one answer are compared too: `gptj parity matrix`.
            ladder: whether each precision is measured too: `gptj parity ladder`.
            options: of `gptj.parity.run_parity`, with `other` of `gptj.parity.two_folders.compare_folders`: dtype ...

        Raises:
            InputError: the matrix or the ladder, which take one folder as it is, beside another folder, weights, an
                adapter or a probe.
            GPTJError: see these. That something differs is no error: see `Findings.raise_if_failed`.
        """
        from gptj.parity.gather import findings_of_folders, findings_of_report, join_findings
        from gptj.parity.run import run_parity
        from gptj.parity.two_folders import compare_folders

        __tracebackhide__ = True  # a failed test shows its own line and the error
        names = self.backends if backends is None else backends

        def judge() -> Findings:
            __tracebackhide__ = True
            more = [name for name, wanted in (("matrix", matrix), ("ladder", ladder)) if wanted]
            _refuse_beside(more, options | {"other": other})
            if other is None:
                found = findings_of_report(run_parity(directory, names, **options))
                return join_findings(found, *(_find(name, directory, names, options) for name in more))
            folders = compare_folders(directory, other, names, **options)
            return findings_of_folders(folders, os.fspath(directory), os.fspath(other))

        return self._keep(judge, directory)

    def compare(
        self, *traces: str | os.PathLike[str], reference: str | os.PathLike[str] | None = None,
        names: Sequence[str | os.PathLike[str]] = (),
    ) -> Findings:  # fmt: skip
        """The findings on traces that were recorded, by NumPy alone: `gptj parity compare`.

        Args:
            traces: two files or more.
            reference: the model's folder, whose weights tell of every operation whether an error was born there.
            names: TOML files, or shipped ones' names, that map other programs' names onto ours.

        Raises:
            GPTJError: a file is no trace, or they cannot be compared.
        """
        from gptj.parity.gather import compare_files

        __tracebackhide__ = True
        return self._keep(lambda: compare_files(traces, reference=reference, names=names), *traces)

    def _keep(self, judge: Callable[[], Findings], *places: str | os.PathLike[str]) -> Findings:
        """Keep what is found for the summary, or the error, which is no verdict."""
        from gptj.errors import GPTJError

        __tracebackhide__ = True
        try:
            found = judge()
        except GPTJError as error:
            named, said = ", ".join(os.fspath(place) for place in places), str(error)
            self.unjudged.append(said if said.startswith(named) else f"{named}: {said}")
            raise error.with_traceback(None) from None
        self.found.append(found)
        return found


def _refuse_beside(more: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse the matrix and the ladder, named in `more`, beside options that they do not have.

    Raises:
        InputError: naming the option.
    """
    from gptj.errors import InputError

    for option in ("other", "weights", "adapter", "probe"):
        if more and options.get(option) is not None:
            raise InputError(f"not beside {more[0]}, which takes one folder as it is", where=option, expected="None")


def _find(what: str, directory: str | os.PathLike[str], backends: Sequence[str] | None, options: dict[str, Any]) -> Any:
    """The findings of the "matrix", with a row for each file format, or of the "ladder", with the comparison's seed."""
    from gptj.backends import choose_backend, installed_backends

    names = installed_backends() if backends is None else tuple(map(choose_backend, backends))
    seed, progress = options.get("seed") or 0, options.get("progress")
    if what == "ladder":
        from gptj.parity.ladder import run_ladder

        return run_ladder(directory, names, seed=seed, progress=progress)
    from gptj_conversion.round_trip import run_matrix_through_formats

    from gptj.config.dtypes import dtype_name

    dtype = dtype_name(options.get("dtype", "float32"))
    dtype = dtype if dtype == "float64" else "float32"  # which 16 bits cannot be held to
    return run_matrix_through_formats(directory, names, dtype=dtype, seed=seed, progress=progress)


_parity = pytest.StashKey[Parity]()
_reports = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def gptj_parity(request: pytest.FixtureRequest) -> Parity:
    """Compares the frameworks on a model: gptj_parity(folder, backends=..., dtype=...).raise_if_failed()."""
    return request.config.stash[_parity]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, under a heading of their own."""
    group = parser.getgroup("gptj", "GPT-J in several frameworks")
    names = "what gptj_parity compares where a test names none: pt,tf,flax. Default: all installed"
    group.addoption("--gptj-backends", metavar="NAMES", help=names)
    report = "write all that was compared into FILE.html, .xml (JUnit), .md or .json, replacing it"
    group.addoption("--gptj-report", metavar="FILE", action="append", default=[], help=report)


def pytest_configure(config: pytest.Config) -> None:
    """Check the options, before any test runs."""
    backends, reports = config.getoption("--gptj-backends"), config.getoption("--gptj-report")
    names = None if backends is None else tuple(name.strip() for name in backends.split(","))
    config.stash[_parity] = Parity(names)
    config.stash[_reports] = []
    if names is not None or reports:
        _check_options(names or (), reports)


def _check_options(names: tuple[str, ...], reports: list[str]) -> None:
    from gptj.backends import BACKENDS
    from gptj.errors import InputError
    from gptj.parity.reports.output import kind_of

    if unknown := [name for name in names if name not in BACKENDS]:
        raise pytest.UsageError(f"--gptj-backends: no such backend: {unknown[0]!r}; there are {', '.join(BACKENDS)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise pytest.UsageError(f"--gptj-backends: names {twice[0]} twice")
    for path in reports:
        try:
            kind_of(path)
        except InputError as error:
            raise pytest.UsageError(f"--gptj-report: {error}") from None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker of pytest-xdist compared."""
    sent, unjudged = getattr(node, "workeroutput", {}).get(_SENT, ((), ()))
    parity = node.config.stash[_parity]
    parity.unjudged += unjudged
    if sent:
        from gptj.parity.findings import Findings

        parity.found += [Findings.from_json(text) for text in sent]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports; a worker of pytest-xdist sends what it has to who started it."""
    config = session.config
    found, reports = config.stash[_parity].found, config.getoption("--gptj-report")
    if hasattr(config, "workeroutput"):
        config.workeroutput[_SENT] = [one.to_json() for one in found], config.stash[_parity].unjudged
        return
    if not found:
        config.stash[_reports] += [f"not written: {path}: nothing was compared" for path in reports]
        return
    from gptj.errors import GPTJError
    from gptj.parity.reports.output import write_report

    for path in reports:
        try:
            files = write_report(path, *found, overwrite=True)
        except GPTJError as error:
            session.exitstatus = max(session.exitstatus, pytest.ExitCode.TESTS_FAILED)
            config.stash[_reports].append(f"not written: {error}")
        else:
            config.stash[_reports] += [f"written: {file}" for file in files]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line for each comparison and for each report."""
    found, reports, unjudged = config.stash[_parity].found, config.stash[_reports], config.stash[_parity].unjudged
    if not found and not reports and not unjudged:
        return
    from gptj.errors import harmless

    terminalreporter.section("gptj parity")
    for one in found:
        line = f"{one.verdict}: {one.folder}: {one.headline}" if one.folder else f"{one.verdict}: {one.headline}"
        terminalreporter.write_line(harmless(line), green=one.passed, red=not one.passed)
    for line in unjudged:
        terminalreporter.write_line(harmless(f"not judged: {line}"), red=True)
    for line in reports:
        terminalreporter.write_line(harmless(line))
