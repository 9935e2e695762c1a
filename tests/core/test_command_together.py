"""How a command's processes end: in their order, with one line, and without Python's own end."""

from __future__ import annotations

import atexit
import subprocess
import sys
import types
import warnings

import pytest

from gptj.command import together
from gptj.errors import InputError
from gptj.sharding import Mesh, Processes, leave_in_order

SCRIPT = """
import atexit, sys, types
import gptj.command.together as together
from gptj.sharding import Keys, Processes

class Late:
    def __del__(self):
        print("Python ended")

talk = types.ModuleType("gptj.fake.processes")
talk.join_processes = lambda: Processes(int(sys.argv[1]), 2)
talk.make_keys = lambda: Keys(lambda name, text: None, lambda name: "", lambda name: None)
talk.leave_processes = lambda: 1 / 0 if sys.argv[1] == "1" else print("left")
sys.modules["gptj.fake.processes"] = talk
together.choose_backend = lambda name: "fake"
atexit.register(print, "put in order")
late = Late()
with together.joined(None):
    print("written")
"""


@pytest.mark.parametrize(("rank", "said"), ((0, "written\nleft\nput in order\n"), (1, "put in order\n")))
def test_a_process_that_is_done_ends_before_threads_lose_pythons_lock(rank, said):
    """Even where another is gone by then, and with what was registered for the end done."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(rank)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_one_process_of_a_host_says_that_another_ended_where_the_first_is_gone(monkeypatch):
    kept: list[tuple[object, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *words: kept.append(words))
    monkeypatch.setenv("MASTER_ADDR", "host-of-a-test")
    assert [together._is_first_here() for _ in range(3)] == [True, False, False]
    for launcher in ("MASTER_ADDR", "DTENSOR_JOBS", "JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID"):
        monkeypatch.setenv(launcher, "another-run")
        assert together._is_first_here()
    for work, *_ in kept:
        if getattr(work, "__name__", "") == "close":
            work()


@pytest.mark.parametrize(
    ("name", "said", "several"),
    [
        ("WORLD_SIZE", "2", True),
        ("JAX_NUM_PROCESSES", "4", True),
        ("DTENSOR_NUM_CLIENTS", "1", False),
        ("WORLD_SIZE", "x", False),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_said_or_refused(monkeypatch, name, said, several):
    request = types.SimpleNamespace(strategy=None)
    monkeypatch.setenv(name, said)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with together.together(request) as agreed:
            assert agreed is request
    assert [f"{said} processes were started" in str(one.message) for one in caught] == [True] * several
    if several:
        with pytest.raises(
            InputError, match=f"--strategy: each process would train .*found none, and {said} processes"
        ):
            together.require_strategy()
    else:
        together.require_strategy()


def test_the_options_name_a_mesh_of_all_devices_or_are_refused_by_their_names():
    def fitting(strategy, dp, tp):
        return together.fitting_mesh(strategy, dp, tp, 8, Processes(0, 8))

    assert [fitting("tp_fsdp", *axes) for axes in ((2, None), (None, 4))] == [Mesh(dp=2, tp=4)] * 2
    assert (fitting("tp", None, None), fitting("fsdp", None, None)) == (Mesh(tp=8), Mesh(dp=8))
    with pytest.raises(InputError, match=r"--dp and --tp: .*whose product is 8"):
        fitting("tp_fsdp", None, None)
    with pytest.raises(InputError, match=r"mesh: .*expected 8, found 6"):
        fitting("tp_fsdp", 2, 3)


def test_the_first_process_is_the_last_to_leave(monkeypatch):
    left = iter((0, 1, 2))
    leave_in_order(Processes(0, 3), lambda more: next(left))
    assert next(left, None) is None
    counted: list[int] = []
    leave_in_order(Processes(2, 3), lambda more: counted.append(more) or 1)
    assert counted == [1]
    monkeypatch.setenv("GPTJ_JOIN_SECONDS", "1")
    leave_in_order(Processes(0, 2), lambda more: 0)  # which waits no longer for one that is no more
