"""A folder that is whole or not there, whenever its writer is stopped."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


_PARTIAL, _REPLACED = ".partial", ".replaced"


@contextlib.contextmanager
def written_aside(destination: str | os.PathLike) -> Iterator[Path]:
    """An empty folder beside `destination` that takes its name when all went well, and else is removed.

    What stood there before goes when the new is in its place. A process that is killed leaves its folder behind, hidden, as
    `.NAME.….partial`; the next one to write there removes it, and puts back what was there if the other was killed just
    between taking it away and taking its place. A folder that a living process writes to is locked, and left alone; where
    the system has no such locks, leftovers stay.
    """
    destination = Path(destination).resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(destination)
    partial, lock = _locked_folder(destination)
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        replaced = partial.with_suffix(_REPLACED)
        if destination.exists():
            os.rename(destination, replaced)
        try:
            os.rename(partial, destination)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, destination)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(destination: Path) -> tuple[Path, int | None]:
    while True:
        made = tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=_PARTIAL, dir=destination.parent)
        lock = _lock(made, wait=True)
        if lock is None or os.path.isdir(
            made
        ):  # another process may have taken it for a leftover before it was locked
            return Path(made), lock


def _remove_leftovers(destination: Path) -> None:
    # Random parts of names have no dots, so that leftovers of `out.old` are not taken for those of `out`.
    name = re.compile(rf"\.{re.escape(destination.name)}\.[^.]+({re.escape(_PARTIAL)}|{re.escape(_REPLACED)})")
    hidden = [path for path in destination.parent.iterdir() if name.fullmatch(path.name)]
    alive = set()
    for partial in hidden:
        if partial.suffix != _PARTIAL:
            continue
        lock = _lock(partial, wait=False)
        if lock is None:
            alive.add(partial.stem)
            continue
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
    for replaced in hidden:
        if replaced.suffix != _REPLACED or replaced.stem in alive:
            continue
        if destination.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, destination)


def _lock(folder: str | os.PathLike, wait: bool) -> int | None:
    """A lock that the system lifts when the process ends, however it does; `None` if it cannot be had."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not on Windows
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
