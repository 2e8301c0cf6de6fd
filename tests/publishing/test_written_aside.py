"""A folder that is whole or not there: after errors, after kills at any moment, beside other writers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyvlm.publishing import written_aside as module
from anyvlm.publishing.written_aside import written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(destination: Path, text: str) -> None:
    with written_aside(destination) as partial:
        (partial / "file").write_text(text)


def test_it_takes_its_place_and_that_of_what_was_there(tmp_path):
    write(tmp_path / "deep" / "out", "one")
    (tmp_path / "deep" / "out" / "other").write_text("other")
    write(tmp_path / "deep" / "out", "two")
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["file"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "two"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    write(tmp_path / "out", "one")
    with pytest.raises(error), written_aside(tmp_path / "out") as partial:
        (partial / "file").write_text("two")
        raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "one"


def test_permissions_are_those_of_any_new_folder(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "like").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "like").stat().st_mode


SLOW_WRITER = """
import sys, time
from anyvlm.publishing.written_aside import written_aside
with written_aside(sys.argv[1]) as partial:
    (partial / "file").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def slow_writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks on Windows")
def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path, slow_writer):
    write(tmp_path / "out", "other")
    hidden = [name for name in names(tmp_path) if name != "out"]
    assert len(hidden) == 1 and (tmp_path / hidden[0] / "file").read_text() == "half"
    slow_writer.send_signal(signal.SIGKILL)
    slow_writer.wait()
    write(tmp_path / "out", "third")
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks on Windows")
@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_killed_between_any_two_renames(tmp_path, monkeypatch, renamed):
    """What a kill leaves is made by ending without clean-up after so many renames; the next writer puts it right."""
    write(tmp_path / "out", "one")
    child = os.fork()
    if child == 0:
        left, rename = [renamed], os.rename

        def rename_and_die(*arguments):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            rename(*arguments)
            if left[0] == 1 and renamed == 3:
                os._exit(9)

        monkeypatch.setattr(module.os, "rename", rename_and_die)
        write(tmp_path / "out", "two")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(ValueError), written_aside(tmp_path / "out"):
        raise ValueError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == ("two" if renamed == 3 else "one")


def test_leftovers_of_others_are_left_alone(tmp_path):
    for name in (".out.old.abc.partial", ".outer.abc.partial", ".out.old.abc.replaced", "out.partial"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    write(tmp_path / "out", "one")
    assert names(tmp_path) == sorted([*before, "out"])


def test_two_writers_at_once_leave_one_whole_folder(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom anyvlm.publishing.written_aside import written_aside\n"
        "for number in range(50):\n"
        "    try:\n"
        "        with written_aside(sys.argv[1]) as partial:\n"
        "            for name in 'ab': (partial / name).write_text(sys.argv[2] + str(number))\n"
        "    except OSError: pass  # the other one took the place at the same moment\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), which]) for which in "xy"]
    deadline = time.monotonic() + 120
    while any(writer.poll() is None for writer in writers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    write(tmp_path / "other", "clean")
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()
