"""The rounds: every contender takes its turn, A B C A B C, while the others are stopped.

Each is a process of its own that keeps its model from turn to turn. What the machine does besides, and how warm it is,
so meets all alike. Before each turn comes the machine's own, at what bounds it: reading memory, or multiplying. A
contender that fails drops out with its reason; the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import measures
from benchmarks.speed.contenders import Contender
from benchmarks.speed.folders import ROOT, Folders, forget_pages
from benchmarks.speed.machine import Others
from benchmarks.speed.results import Results
from benchmarks.speed.shapes import Shape

QUIET = {"HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
ENVIRONMENTS = {
    "Ours": {},
    "TransformersPyTorch": {"USE_TORCH": "1", "USE_TF": "0", "USE_FLAX": "0"},
    "TransformersTensorFlow": {"USE_TF": "1", "USE_TORCH": "0", "USE_FLAX": "0", "TF_USE_LEGACY_KERAS": "1"},
    "TransformersFlax": {"USE_FLAX": "1", "USE_TORCH": "0", "USE_TF": "0"},
}
"""Each library imports its own framework and no other, as where only that one is installed."""


class DroppedOutError(Exception):
    """A contender could not do what it was asked; the message is its reason."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the contest is run.

    Attributes:
        threads: for everybody.
        repeats: turns a measure.
        most_steps: decoded tokens a turn at most.
        target_s: what a turn of decoding should take at most, where it can.
        cold: whether the weights' pages are dropped before each start.
        alone: whether a contender's process ends with its turn, where two models do not fit in memory.
        against: the `src` of the checkout that contenders of before are taken from.
        disturbed: the share of the machine above which a turn is taken again, since others computed meanwhile.
        most_s: after which no turn is begun any more; what was measured till then counts.
        patience_s: how long an answer may take.
        limits: options of the limits' engine: `megabytes` that are read, size of the `matrix`.
    """

    threads: int
    repeats: int = 3
    most_steps: int = 32
    target_s: float = 3.0
    cold: bool = False
    alone: bool = False
    against: Path | None = None
    disturbed: float = 0.1
    most_s: float = math.inf
    patience_s: float = 900.0
    limits: dict[str, int] = dataclasses.field(default_factory=dict)


class Worker:
    """A contender's process; stopped except while it answers.

    Args:
        python: the interpreter that has the library.
        engine, folder, options, threads: see engines.py.
        source: where it takes gptj from, if not from where this process does.
    """

    def __init__(
        self,
        python: Path,
        engine: str,
        folder: Path,
        options: dict[str, Any],
        rules: Rules,
        source: Path | None = None,
    ) -> None:
        order = {"engine": engine, "folder": str(folder), "options": options, "threads": rules.threads}
        self.patience_s = rules.patience_s
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        threads = str(rules.threads)
        path = {"PYTHONPATH": str(source)} if source else {}
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.speed.worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **QUIET, **ENVIRONMENTS.get(engine, {}), **path, "OMP_NUM_THREADS": threads},
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer.

        Raises:
            DroppedOutError: there is none, or it is an error.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                if not selector.select(self.patience_s):
                    raise DroppedOutError(f"{what}: no answer within {self.patience_s:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DroppedOutError(f"{what}: the process ended with status {self.process.wait()}: {self._last_words()}")
        self.process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DroppedOutError(f"{what}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


class Contest:
    """One run: some contenders, some measures, one shape.

    Args:
        shape, folders: of the model.
        pythons: the interpreter by engine; this one where none is named.
        rules: how.
        results: where figures and failures go.
        say: told what is going on.
    """

    def __init__(
        self,
        shape: Shape,
        folders: Folders,
        pythons: dict[str, Path],
        rules: Rules,
        results: Results,
        say: Any = lambda line: None,
    ) -> None:
        self.shape, self.folders, self.pythons = shape, folders, pythons
        self.rules, self.results, self.say = rules, results, say
        self.kept: dict[str, Worker] = {}
        self.ends_at = math.inf

    def run(self, contenders: Iterable[Contender], wanted: Sequence[str]) -> None:
        """Measure all of `wanted`. The contenders' copies of the weights are made first."""
        running = [contender for contender in contenders if self._has_folder(contender)]
        if not wanted:
            return
        try:
            self.limits = self._limits()
            self.ends_at = time.monotonic() + self.rules.most_s
            for measure in wanted:
                self._measure(measure, [c for c in running if measure != "train" or c.trains])
        finally:
            for worker in self.kept.values():
                worker.close()
            self.kept.clear()

    def _has_folder(self, contender: Contender) -> bool:
        try:
            self.folders.find(contender.copy)
        except subprocess.CalledProcessError as error:
            words = (error.stderr or "").strip().splitlines()[-1:] or [str(error)]
            self._drop(contender, "copy", f"its copy of the weights could not be made: {words[0]}")
            return False
        return True

    def _limits(self) -> Worker:
        worker = Worker(Path(sys.executable), "Limits", Path(), self.rules.limits, self.rules)
        self.kept["limits"] = worker
        worker.ask("bring_in")
        worker.ask("load")
        return worker

    # ---- one measure

    def _measure(self, measure: str, contenders: list[Contender]) -> None:
        known: dict[str, dict[str, Any]] = {}
        values: dict[str, dict[str, list[float]]] = {}
        limits: dict[str, dict[str, list[float]]] = {}
        shares: dict[str, list[float]] = {}
        for turn in range(self.rules.repeats):
            for contender in contenders:
                name = contender.name
                if time.monotonic() > self.ends_at:
                    self.say(f"{self.shape.name} {measure} {turn + 1}/{self.rules.repeats} {name}: no time left")
                    continue
                if turn and name not in values:
                    continue  # it has dropped out
                self.say(f"{self.shape.name} {measure} {turn + 1}/{self.rules.repeats} {name}")
                taken, bounds = values.pop(name, {}), limits.setdefault(name, {})
                with self._dropping(contender, measure):
                    kinds = [measures.bound(measure, contender.dtype)]
                    for kind, rate in self.limits.ask("measure", kinds=kinds)["made"].items():
                        bounds.setdefault(kind, []).append(rate)
                    found, share = self._undisturbed(measure, contender, known)
                    shares.setdefault(name, []).append(share)
                    values[name] = {figure: [*taken.get(figure, ()), value] for figure, value in found.items()}
        for name, figures in values.items():
            medians = {kind: statistics.median(rates) for kind, rates in limits[name].items()}
            said = {"others": max(shares[name]), **known.get(name, {})}
            self.results.record(self.shape.name, name, measure, figures, medians, **said)

    def _undisturbed(
        self, measure: str, contender: Contender, known: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, float], float]:
        """A turn, and the share of the machine that others had; taken again, twice at most, where that was much."""
        tries = []
        while not tries or (tries[-1][1] > self.rules.disturbed and len(tries) < 3):
            others = Others(lambda: [worker.process.pid for worker in self.kept.values()])
            tries.append((self._turn(measure, contender, known), others.share()))
        return min(tries, key=lambda taken: taken[1])

    def _turn(self, measure: str, contender: Contender, known: dict[str, dict[str, Any]]) -> dict[str, float]:
        if measure == "start":
            with contextlib.closing(self._worker(contender)) as worker:
                return measures.start(worker.ask, self.shape)
        with self._loaded(contender) as worker:
            if contender.name not in known or self.rules.alone:
                known[contender.name] = measures.prepare(
                    measure,
                    worker.ask,
                    self.shape,
                    most_steps=self.rules.most_steps,
                    target_s=self.rules.target_s,
                )
            return measures.repeat(measure, worker.ask, self.shape, known[contender.name])

    # ---- processes

    @contextlib.contextmanager
    def _loaded(self, contender: Contender) -> Iterator[Worker]:
        """The contender's process, its model loaded and its first tokens written; kept, unless each is to be alone."""
        if contender.name in self.kept:
            yield self.kept[contender.name]
            return
        worker = self._worker(contender)
        self.kept[contender.name] = worker
        versions = worker.ask("bring_in")["made"]
        worker.ask("load")
        ids = measures.prompts(self.shape, 1, measures.PROMPT)
        made = worker.ask("generate", ids=ids, new=measures.CHECKED)["made"][0]
        self.results.introduce(self.shape.name, contender.name, versions, made)
        yield worker
        if self.rules.alone:
            self._let_go(contender)

    def _worker(self, contender: Contender) -> Worker:
        """A new process, which has imported nothing."""
        folder = self.folders.find(contender.copy)
        if self.rules.cold:
            forget_pages(folder)
        python = self.pythons.get(contender.engine, Path(sys.executable))
        source = self.rules.against if contender.before else None
        return Worker(python, contender.engine, folder, contender.options, self.rules, source)

    def _let_go(self, contender: Contender) -> None:
        if contender.name in self.kept:
            self.kept.pop(contender.name).close()

    @contextlib.contextmanager
    def _dropping(self, contender: Contender, measure: str) -> Iterator[None]:
        """Note the contender's failure, and let the others go on."""
        try:
            yield
        except DroppedOutError as error:
            self._drop(contender, measure, str(error))
            self._let_go(contender)

    def _drop(self, contender: Contender, measure: str, reason: str) -> None:
        self.results.fail(self.shape.name, contender.name, measure, reason)
        self.say(f"{contender.name} drops out of {measure}: {reason}")
