"""Limits on time and memory, and processes that die: each costs its own task alone."""

import os
import signal
import sys
import time

import psutil
import pytest

from anyvlm.compatibility.worker_processes import run_in_processes


def endings(function, tasks, **kwargs):
    arguments = {"num_workers": 2, "timeout": 20.0, **kwargs}
    return dict(run_in_processes(function, tasks, **arguments))


def test_every_task_gets_its_own_result():
    found = endings(lambda task: {"square": task**2, "process": os.getpid()}, range(7))
    assert {task: ending.result["square"] for task, ending in found.items()} == {n: n**2 for n in range(7)}
    processes = {ending.result["process"] for ending in found.values()}
    assert len(processes) == 7
    assert os.getpid() not in processes


def test_long_results_come_whole():
    assert endings(lambda task: "x" * 1_000_000, [0])[0].result == "x" * 1_000_000


def test_a_task_that_takes_too_long_is_killed():
    start = time.monotonic()
    found = endings(lambda task: time.sleep(60 * task), [1, 0], timeout=0.5)
    assert time.monotonic() - start < 10
    assert found[1].failure == "took longer than 0.5 s"
    assert found[0].failure is None


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_killed_process_is_a_failure_with_the_signals_name(name):
    def die(task):
        if task == "dies":
            print("about to fall", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.Signals[name])
        return task

    found = endings(die, ["dies", "lives"])
    assert found["lives"].result == "lives"
    assert found["dies"].failure == f"the process was killed by {name}: about to fall"


def test_an_error_is_a_failure_with_its_message():
    def fail(task):
        raise ValueError("no such\nthing")

    assert endings(fail, [0])[0].failure == "ValueError: no such thing"


def test_what_json_cannot_hold_is_a_failure():
    assert "not JSON serializable" in endings(lambda task: object(), [0])[0].failure


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory that a process maps for its data")
def test_memory_is_limited():
    found = endings(lambda task: len(bytearray(task)), [1000, 16 * 2**30], memory=4 * 2**30)
    assert found[1000].result == 1000
    assert found[16 * 2**30].failure == "took more than 4 GiB of memory"


def test_what_is_left_is_killed_when_the_caller_stops():
    """A run that is interrupted leaves no process behind."""
    before = set(psutil.Process().children())  # those that other tests began and Python keeps, as its fork server
    tasks = run_in_processes(lambda task: time.sleep(task) or os.getpid(), [0, 300], num_workers=2, timeout=600)
    next(tasks)
    start = time.monotonic()
    tasks.close()
    assert time.monotonic() - start < 10
    assert set(psutil.Process().children()) <= before


def test_the_parents_output_is_its_own(capfd):
    endings(lambda task: print("from a worker"), [0])
    assert capfd.readouterr() == ("", "")
