"""Run a function on many tasks, each in a process of its own with limits on time and memory.

Each process is a fork of this one, so that what is imported here costs it nothing, and whatever it does (run forever,
take all memory, crash in native code) is no more than a recorded failure of its own task.
"""

import contextlib
import faulthandler
import json
import os
import resource
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar


Task = TypeVar("Task")


@dataclass
class Ending:
    """How a task ended: with a result, or with the reason why there is none."""

    result: Any = None
    failure: str | None = None


@dataclass
class _Worker:
    task: Any
    pid: int
    output: int
    errors: BinaryIO
    deadline: float
    received: bytes = b""


def run_in_processes(
    function: Callable[[Task], Any],
    tasks: Iterable[Task],
    num_workers: int,
    timeout: float,
    memory: int | None = None,
) -> Iterator[tuple[Task, Ending]]:
    """Call `function` on each task and yield each task with its ending, as they come.

    Args:
        function: Gives something that JSON can hold. What it prints is not shown.
        num_workers: How many processes at a time.
        timeout: Seconds after which a task is killed.
        memory: Bytes of data that a process may hold; `None` for no limit.
    """
    waiting = list(reversed(list(tasks)))
    running: dict[int, _Worker] = {}
    selector = selectors.DefaultSelector()
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                worker = _start(function, waiting.pop(), timeout, memory)
                running[worker.output] = worker
                selector.register(worker.output, selectors.EVENT_READ)
            next_deadline = min(worker.deadline for worker in running.values())
            ended = []
            for key, _ in selector.select(max(0.0, next_deadline - time.monotonic())):
                worker = running[key.fd]
                chunk = os.read(worker.output, 1 << 16)
                worker.received += chunk
                if not chunk:
                    ended.append((worker, None))
            now = time.monotonic()
            late = [worker for worker in running.values() if now > worker.deadline]
            ended += [(worker, f"took longer than {timeout:g} s") for worker in late if (worker, None) not in ended]
            for worker, failure in ended:
                del running[worker.output]
                selector.unregister(worker.output)
                yield worker.task, _finish(worker, memory, failure)
    finally:
        for worker in running.values():
            _finish(worker, memory, "stopped")
        selector.close()


def _start(function: Callable, task: Any, timeout: float, memory: int | None) -> _Worker:
    read_end, write_end = os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - `_finish` closes it
    pid = os.fork()
    if pid == 0:
        # Nothing of the parent may run here afterwards: neither its cleaning up nor its handlers.
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(read_end)
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream, target in ((nothing, 0), (nothing, 1), (errors.fileno(), 2)):
                os.dup2(stream, target)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            faulthandler.disable()  # where it is on, it would write to the parent's stderr
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            output = json.dumps(function(task)).encode()
            with os.fdopen(write_end, "wb") as stream:
                stream.write(output)
            status = 0
        except BaseException as error:  # noqa: BLE001 - the last word of this process, read by the parent
            os.write(2, f"\n{type(error).__name__}: {' '.join(str(error).split())}\n".encode())
        finally:
            os._exit(status)
    os.close(write_end)
    return _Worker(task, pid, read_end, errors, time.monotonic() + timeout)


def _finish(worker: _Worker, memory: int | None, failure: str | None) -> Ending:
    """Wait for a process that has ended, or end it, and read what it left."""
    if failure is not None:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(worker.pid, signal.SIGKILL)
    _, status = os.waitpid(worker.pid, 0)
    os.close(worker.output)
    worker.errors.seek(0)
    last_words = worker.errors.read()[-2000:].decode(errors="replace").strip().splitlines()
    worker.errors.close()
    if failure is not None:
        return Ending(failure=failure)
    if status == 0:
        return Ending(result=json.loads(worker.received))
    last_word = last_words[-1] if last_words else "it said nothing"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Ending(failure=f"the process was killed by {name}: {last_word}")
    if memory is not None and last_word.startswith("MemoryError"):
        return Ending(failure=f"took more than {memory / 2**30:.3g} GiB of memory")
    return Ending(failure=last_word)
