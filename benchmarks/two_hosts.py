"""A model over two hosts: two network namespaces of this machine, with a wire between them, and what must hold there.

    sudo python -m benchmarks.two_hosts [--engines pt flax tf] [--each 1 2]      # Linux, iproute2, root

Each host has a network, a name, process numbers and an /etc/hosts of its own, in which its own name means 127.0.1.1
(Debian's way, which no other host reaches) and the other's its address on the wire; files are shared, but for a folder
that only the second lacks. For each engine and number of processes on each host: logits against the whole model,
tokens, shares, bytes read, a training step, a checkpoint, as the tests have them on one host; then the commands, whose
words must be those of one process: generate (greedy, drawn), score, finetune. Then what must be refused with one line,
and a killed process. Each line of the output is a row of docs/scale.md; the status is 1 where one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rank_kills import TRAINS
from gptj import GPTJConfig
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config.schema import schema
from gptj.finetune.curve import read_curve
from gptj.parity.revealing import revealing_fill

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
CONFIG = GPTJConfig(vocab_size=96, n_positions=32, n_embd=64, n_layer=3, n_head=4, rotary_dim=8,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
LOGITS, RELATIVE = 2e-5, 1e-5
SETTINGS = ("--steps", "4", "--batch", "4", "--lr", "0.01", "--pad", "--seed", "3", "--save-every", "2")
ENDS_S = 60


@dataclasses.dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        number: 0 or 1; the first is where processes meet.
        folder: where its /etc/hosts and what its processes say are.
    """

    number: int
    folder: Path

    @property
    def name(self) -> str:
        return f"host-{'ab'[self.number]}"

    @property
    def namespace(self) -> str:
        return f"gptj-{os.getpid()}-{self.name}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    def start(self, words: Sequence[Any], **variables: Any) -> tuple[subprocess.Popen[bytes], Path]:
        """The command on this host, and the file that has what it says."""
        bind = 'mount --bind "$1" /etc/hosts; mount --bind /dev/null /etc/resolv.conf; '
        hide = 'mount -t tmpfs none "$2"; ' if self.number else ""
        prepare = f'hostname "$0"; {bind}{hide}shift 2; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", prepare,
                  self.name, self.folder / f"hosts-{self.number}",
                  self.folder / "of-the-first"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_ENABLE_X64": "0", "TF_CPP_MIN_LOG_LEVEL": "3",
                       "PYTHONWARNINGS": "ignore", "GPTJ_JOIN_SECONDS": "90", "PYTHONPATH": python_path()}  # fmt: skip
        environment |= {name: str(value) for name, value in variables.items()}
        handle, place = tempfile.mkstemp(dir=self.folder, prefix=f"said-{self.number}-")
        command = ["ip", "netns", "exec", self.namespace, *inside, *words]
        with os.fdopen(handle, "w") as said:
            process = subprocess.Popen([*map(str, command)], stdout=said, stderr=said, env=environment, cwd=ROOT)
        return process, Path(place)


def python_path() -> str:
    return os.pathsep.join(str(ROOT / part) for part in ("src", "conversion", "tests/support"))


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a wire between them, and nothing of them in the end."""
    hosts = Host(0, folder), Host(1, folder)
    (folder / "of-the-first").mkdir()
    for host in hosts:
        other = hosts[1 - host.number]
        names = f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n"
        (folder / f"hosts-{host.number}").write_text(names)
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        ip("link", "add", "gptj-a", "netns", hosts[0].namespace, "type", "veth", "peer", "name", "gptj-b", "netns",
           hosts[1].namespace)  # fmt: skip
        for host in hosts:
            link = f"gptj-{'ab'[host.number]}"
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", link)
            for one in ("lo", link):
                ip("-n", host.namespace, "link", "set", one, "up")
        yield hosts
    finally:
        for host in hosts:
            for pid in ip("netns", "pids", host.namespace, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", host.namespace, check=False)


def ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).stdout


@dataclasses.dataclass
class Said:
    """What the processes of a command ended with, and said; `took` seconds passed."""

    statuses: list[int]
    texts: list[str]
    took: float

    @property
    def lines(self) -> list[str]:
        """The errors of our own."""
        return [line[line.index("gptj: ") :] for text in self.texts for line in text.splitlines() if "gptj: " in line]

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON that one of them printed."""
        found = [line for text in self.texts for line in text.splitlines() if line.startswith("{")]
        if any(self.statuses) or not found:
            raise RuntimeError(f"{self.statuses}: {self.texts[0][-1500:]} {self.texts[1][-1500:]}")
        facts: dict[str, Any] = json.loads(found[-1])
        return facts


class Runner:
    """Commands on both hosts, each process started as an engine's own launcher would."""

    def __init__(self, hosts: tuple[Host, Host], each: int) -> None:
        self.hosts, self.each, self.port = hosts, each, 29500

    def __call__(self, launcher: str, *words: Any, while_running: Callable[[Any], None] = lambda running: None) -> Said:
        self.port += 20
        running = [*getattr(self, launcher)([str(word) for word in words])]
        begun = time.monotonic()
        while_running(running)
        statuses = []
        for process, _ in running:
            try:
                statuses.append(process.wait(timeout=300))
            except subprocess.TimeoutExpired:
                statuses.append(-1)
        return Said(statuses, [place.read_text(errors="replace") for _, place in running], time.monotonic() - begun)

    def torchrun(self, words: list[str]) -> Iterator[Any]:
        """PyTorch's launcher on each host, which meet at the first."""
        for host in self.hosts:
            yield host.start([*self.torchrun_words(), *words])

    def torchrun_words(self) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={self.each}",
                "--rdzv-backend=c10d", f"--rdzv-endpoint={self.hosts[0].name}:{self.port}"]  # fmt: skip

    def jax(self, words: list[str]) -> Iterator[Any]:
        """A process at a time, with jax' variables."""
        shared = {"JAX_COORDINATOR_ADDRESS": f"{self.hosts[0].address}:{self.port}",
                  "JAX_NUM_PROCESSES": 2 * self.each}  # fmt: skip
        for n in range(2 * self.each):
            yield self.hosts[n // self.each].start([sys.executable, *words], **shared, JAX_PROCESS_ID=n)

    def dtensor(self, words: list[str]) -> Iterator[Any]:
        """A process at a time, with DTensor's variables."""
        places = [self.hosts[n // self.each].address for n in range(2 * self.each)]
        jobs = ",".join(f"{place}:{self.port + n}" for n, place in enumerate(places))
        for n in range(2 * self.each):
            yield self.hosts[n // self.each].start(
                [sys.executable, *words], DTENSOR_JOBS=jobs, DTENSOR_NUM_CLIENTS=2 * self.each, DTENSOR_CLIENT_ID=n
            )


class Table:
    """Rows as they are found, and whether all hold."""

    def __init__(self) -> None:
        self.holds = True

    def row(self, what: str, found: Callable[[], tuple[bool, str]]) -> None:
        try:
            good, words = found()
        except Exception as error:
            good, words = False, f"{type(error).__name__}: {error}"
        self.holds &= good
        print(f"| {what} | {words} |{'' if good else ' FAILS'}", flush=True)


# ---- the engines


LAUNCHERS = {"pt": ("torchrun",), "flax": ("jax", "torchrun"), "tf": ("dtensor",)}
MESHES = {
    ("pt", 1): ("tp:1:2", "fsdp:2:1", "dp:2:1"),
    ("pt", 2): ("tp:1:4", "tp_fsdp:2:2"),
    ("flax", 1): ("tp:1:2", "tp_fsdp:1:2"),
    ("flax", 2): ("tp:1:4", "tp_fsdp:2:2"),
    ("tf", 1): ("tp:1:2",),
    ("tf", 2): ("tp:1:4",),
}


def check_engine(table: Table, run: Runner, engine: str, place: Path) -> None:
    """A row for each mesh."""
    from adapter_samples import write_sample_adapter

    meshes = MESHES[engine, run.each]
    saved = place / f"saved-{engine}-{run.each}"
    saved.mkdir()
    write_sample_adapter(saved / "adapter", "all", config=CONFIG)
    mode = ("cut",) if engine == "tf" else ()
    launcher = LAUNCHERS[engine][0]
    words = (SUPPORT / f"parallel_{engine}.py", *mode, place / "model", saved, *meshes)
    facts: dict[str, Any] = {}

    def found(mesh: str) -> tuple[bool, str]:
        if not facts:
            facts.update(run(launcher, *words).facts)
        return judge(facts[mesh])

    for mesh in meshes:
        table.row(f"{engine}, 2 x {run.each}, {mesh}", lambda mesh=mesh: found(mesh))
    if engine == "pt":
        table.row(f"pt, 2 x {run.each}, checkpoint, loaded by one process", lambda: reload(place, saved, facts))


def judge(facts: dict[str, Any]) -> tuple[bool, str]:
    """Whether the facts of a mesh are what must hold, and they in words."""
    good, words = [], []
    if "difference" in facts:
        good.append(facts["difference"] <= LOGITS)
        words.append(f"logits within {facts['difference']:.1e}")
    if "tokens" in facts:
        good.append(all(facts["tokens"]))
        words.append("tokens equal" if good[-1] else f"tokens {facts['tokens']}")
    if isinstance(facts.get("loss"), list):
        pairs = [facts[name] for name in ("loss", "norm") if name in facts]
        off = max(abs(mine - expected) / abs(expected) for mine, expected in pairs)
        good += [off <= RELATIVE, facts["gradients"] <= RELATIVE]
        words.append(f"loss, norm within {off:.1e}, gradients {facts['gradients']:.1e}")
    if "table" in facts:
        good.append(facts["held"] == facts["table"] and facts["read"] == 4 * sum(facts["held"]))
        share = sum(facts["held"]) / sum(row.size for row in schema(CONFIG))
        words.append(f"share {share:.4f}, its bytes read" if good[-1] else f"read {facts['read']}")
    if "restored" in facts:
        good.append(facts["restored"])
        words.append("checkpoint restored to the bit" if good[-1] else "checkpoint NOT restored")
    return all(good), ", ".join(words)


def reload(place: Path, saved: Path, facts: dict[str, Any]) -> tuple[bool, str]:
    """Whether one process reads the bits that both hosts wrote."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
             SUPPORT / "parallel_pt.py", place / "model", saved, "fsdp:1:1"]  # fmt: skip
    made = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment(), cwd=ROOT)
    loaded = json.loads(made.stdout.splitlines()[-1])["fsdp:1:1"]["loaded"]
    wrote = {f"step {mesh.replace(':', ' ')}": its["saved"] for mesh, its in facts.items() if "saved" in its}
    same = {name: loaded.get(name) == digest for name, digest in wrote.items()}
    return bool(same) and all(same.values()), f"{', '.join(same)}: {'the same bits' if all(same.values()) else same}"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1", "JAX_ENABLE_X64": "0"}  # fmt: skip


# ---- the commands


def check_commands(table: Table, run: Runner, launcher: str, engine: str, place: Path) -> None:
    """Rows for generate, score and finetune, each beside one process."""
    name = f"{engine}, 2 x {run.each}, {launcher}"
    asked = ("generate", place / "text-model", "once upon", "--max-new-tokens", "8", "--seed", "5")
    ways: dict[str, tuple[Any, ...]] = {"greedy": asked, "drawn": (*asked, "--temperature", "0.9")}
    ways["score"] = ("score", place / "text-model", place / "texts", "--json")

    def found(how: str) -> tuple[bool, str]:
        words = (*ways[how], "--backend", engine)
        said, expected = run(launcher, "-m", "gptj", *words, "--strategy", "tp"), alone(*words)
        return same_score(said, expected) if how == "score" else same_words(said, expected)

    table.row(f"{name}, generate, greedy", lambda: found("greedy"))
    table.row(f"{name}, generate, drawn", lambda: found("drawn"))
    table.row(f"{name}, score", lambda: found("score"))
    table.row(f"{name}, finetune", lambda: same_training(run, launcher, engine, place))


def alone(*words: Any) -> str:
    """What one process says."""
    command = [sys.executable, "-m", "gptj", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=True).stdout


def same_words(said: Said, expected: str) -> tuple[bool, str]:
    good = not any(said.statuses) and sum(expected.strip() in text for text in said.texts) == 1
    return good, f"the words of one process, once, {said.took:.0f} s" if good else f"{said.statuses} {said.texts}"


def same_score(said: Said, expected: str) -> tuple[bool, str]:
    whole = json.loads(expected)
    texts = [text for text in said.texts if "{" in text]
    mine = json.loads(texts[0][texts[0].index("{") : texts[0].rindex("}") + 1]) if texts else {"documents": []}
    pairs = zip(mine["documents"], whole["documents"], strict=True)
    off = max(abs(a["log_likelihood"] - b["log_likelihood"]) / abs(b["log_likelihood"]) for a, b in pairs)
    return len(texts) == 1 and off <= RELATIVE, f"log-likelihoods within {off:.1e}, {said.took:.0f} s"


def same_training(run: Runner, launcher: str, engine: str, place: Path) -> tuple[bool, str]:
    """A run of four updates, which is then resumed by one process that finds nothing left, beside one process' own."""
    whole, out = place / f"tuned-{engine}", place / f"tuned-{engine}-{launcher}-{run.each}"
    words = ("finetune", place / "text-model", place / "data.jsonl")
    if not whole.exists():
        alone(*words, whole, *SETTINGS, "--backend", engine)
    mesh = ("tp_fsdp", "--dp", "2", "--tp", "2") if run.each == 2 and engine != "tf" else (TRAINS[engine],)
    said = run(launcher, "-m", "gptj", *words, out, *SETTINGS, "--backend", engine, "--strategy", *mesh)
    if any(said.statuses):
        return False, f"{said.statuses} {said.texts}"
    mine, expected = (read_curve(folder / "loss.csv") for folder in (out, whole))
    off = max(abs(a.loss - b.loss) / b.loss for a, b in zip(mine, expected, strict=True))
    a, b = open_checkpoint(out), open_checkpoint(whole)
    worst = max(float(np.abs(a.read(name) - b.read(name)).max()) for name in b.tensors)
    steps = [path.name for path in sorted((out / "checkpoints").glob("step-*"))]
    good = off <= RELATIVE and worst < 1e-4 and bool(steps)
    return good, f"losses within {off:.1e}, weights {worst:.1e}, checkpoints {len(steps)}, {said.took:.0f} s"


# ---- what must be refused, and what dies


def check_faults(table: Table, run: Runner, engine: str, place: Path) -> None:
    """Rows for files that one host lacks or has otherwise, and for a process that is killed."""
    launcher = LAUNCHERS[engine][0]
    private = run.hosts[0].folder / "of-the-first"
    cut = ("--backend", engine, "--strategy", "tp")
    asked = ("-m", "gptj", "generate", private / "model", "once", "--max-new-tokens", "4", *cut)
    shutil.copytree(place / "text-model", private / "model", dirs_exist_ok=True)
    table.row(f"{engine}, the model is on one host alone", lambda: refused(run(launcher, *asked), "no such"))
    words = ("-m", "gptj", "finetune", place / "text-model", place / "data.jsonl")
    options = (*SETTINGS, "--backend", engine, "--strategy", TRAINS[engine])
    table.row(
        f"{engine}, OUT is on one host alone",
        lambda: refused(run(launcher, *words, private / "out", *options), "does not see"),
    )
    shutil.rmtree(private / "out", ignore_errors=True)
    long = ("--steps", "2000", *SETTINGS[2:])
    table.row(
        f"{engine}, a process of the second host is killed",
        lambda: ended(run, launcher, (*words, place / f"killed-{engine}", *long, *options[len(SETTINGS) :])),
    )


def check_vanished(table: Table, run: Runner, engine: str, place: Path) -> None:
    """A row for the second host's wire, which is cut in mid-run: no process hears of it from the system."""
    words = ("-m", "gptj", "finetune", place / "text-model", place / "data.jsonl", place / f"vanished-{engine}")
    options = ("--steps", "100000", *SETTINGS[2:-1], "1", "--backend", engine, "--strategy", TRAINS[engine])
    table.row(f"{engine}, the second host vanishes", lambda: vanished(run, LAUNCHERS[engine][0], (*words, *options)))


def vanished(run: Runner, launcher: str, words: tuple[Any, ...]) -> tuple[bool, str]:
    """Take the wire from the second host once a checkpoint is there; how long either host's processes go on."""
    took: list[float] = []
    saved: list[bool] = []

    def cut(running: Any) -> None:
        saved.append(wait_for_checkpoint(Path(words[5])))
        ip("-n", run.hosts[1].namespace, "link", "set", "gptj-b", "down")
        begun = time.monotonic()
        while len(took) < 2 and time.monotonic() < begun + 3 * ENDS_S:
            time.sleep(0.1)
            alive = [b"finetune" in commands_of(host) for host in run.hosts]
            if len(took) < alive.count(False):
                took.extend([time.monotonic() - begun] * (alive.count(False) - len(took)))
        for host in run.hosts:
            kill_all(host)
        ip("-n", run.hosts[1].namespace, "link", "set", "gptj-b", "up")

    said = run(launcher, *words, while_running=cut)
    good = saved == [True] and len(took) == 2 and max(took) < ENDS_S
    good = good and len(said.lines) in (1, 2)  # one line on each host
    return good, f"processes ended after {' and '.join(f'{one:.1f} s' for one in took)}: `{'; '.join(said.lines)}`"


def wait_for_checkpoint(out: Path) -> bool:
    """Wait for a run's first checkpoint, and return whether it came."""
    limit = time.monotonic() + 120
    while not (found := [*out.glob("checkpoints/step-*")]) and time.monotonic() < limit:
        time.sleep(0.1)
    return bool(found)


def kill_all(host: Host) -> None:
    """Kill -9 what runs on a host."""
    for pid in ip("netns", "pids", host.namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def commands_of(host: Host) -> bytes:
    """The command lines of a host's Python processes that are no launchers."""
    found = []
    for pid in ip("netns", "pids", host.namespace).split():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return b"\n".join(one for one in found if b"torch.distributed.run" not in one)


def refused(said: Said, words: str) -> tuple[bool, str]:
    good = all(said.statuses) and len(said.lines) == 1 and words in said.lines[0] and said.took < ENDS_S
    return good, f"`{'; '.join(said.lines)}` after {said.took:.0f} s" + ("" if good else f" {said.texts}")


def ended(run: Runner, launcher: str, words: tuple[Any, ...]) -> tuple[bool, str]:
    """Kill what runs on the second host once a checkpoint is there."""
    killed = [0.0]
    saved: list[bool] = []

    def kill(running: Any) -> None:
        saved.append(wait_for_checkpoint(Path(words[5])))
        kill_all(run.hosts[1])
        killed[0] = time.monotonic()

    said = run(launcher, *words, while_running=kill)
    took = time.monotonic() - killed[0]
    good = saved == [True] and bool(said.statuses[0]) and took < ENDS_S and len(said.lines) <= 1
    words_said = "" if good else f" {said.statuses} {said.texts}"
    return good, f"the first host's ended after {took:.1f} s: `{'; '.join(said.lines)}`{words_said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["pt", "flax", "tf"], choices=LAUNCHERS)
    parser.add_argument("--each", nargs="+", type=int, default=[1, 2], choices=(1, 2), help="processes on each host")
    parser.add_argument("--only", nargs="+", default=["engine", "commands", "faults", "vanished"])
    asked = parser.parse_args()
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        sys.exit("two hosts are two network namespaces: this needs Linux, root, iproute2 and util-linux")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which leaves no host behind
    sys.path.insert(0, str(SUPPORT))
    from finetune_samples import lines_file, tuned_model

    table = Table()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        write_checkpoint(place / "model", CONFIG, revealing_fill(0))
        tuned_model(place / "text-model", n_head=4)
        lines_file(place)
        (place / "texts").write_text("the fox jumps\nline 3 of 9: the dog\n")
        with two_hosts(place) as hosts:
            for n, each in enumerate(asked.each):
                run = Runner(hosts, each)
                for engine in asked.engines:
                    if not n:
                        print(f"\n{engine}: {shlex.join(map(str, launch_line(run, engine)))}\n", flush=True)
                    if "engine" in asked.only:
                        check_engine(table, run, engine, place)
                    if "commands" in asked.only:
                        for launcher in LAUNCHERS[engine]:
                            check_commands(table, run, launcher, engine, place)
                    if "vanished" in asked.only and not n:
                        check_vanished(table, run, engine, place)
                    if "faults" in asked.only and not n:
                        check_faults(table, run, engine, place)
    sys.exit(not table.holds)


def launch_line(run: Runner, engine: str) -> list[str]:
    return run.torchrun_words() if engine == "pt" else [*LAUNCHERS[engine]]


if __name__ == "__main__":
    main()
