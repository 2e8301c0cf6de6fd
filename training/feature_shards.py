"""Tensors by key in a folder of safetensors files, read without loading more than is asked for."""

import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


_SUFFIX = ".safetensors"

#: Key of a file's own metadata, under which is said what goes with each of its tensors.
_FACTS = "facts"


class FeatureShards:
    """A folder of files, each with many tensors and, as JSON in its header, what goes with each.

    There is no index beside the files: their headers are it. A file is written aside and renamed, so that it is whole or not
    there, whenever a process is stopped, and several processes may write at once. Files are mapped into memory, and only so
    many of them at a time; a copy in another process (a worker of a `DataLoader`) opens its own.

    Args:
        directory: Made when something is written.
        max_open: Files that are mapped at a time.
    """

    def __init__(self, directory: str | os.PathLike, max_open: int = 64):
        self.directory = Path(directory)
        self.max_open = max_open
        self._files: list[str] = []
        self._file_of: dict[str, int] | None = None
        self._open: OrderedDict[int, tuple[Any, dict]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self._index())

    def __iter__(self) -> Iterator[str]:
        return iter(self._index())

    def __contains__(self, key: str) -> bool:
        return key in self._index()

    def __getitem__(self, key: str) -> tuple[torch.Tensor, Any]:
        """The tensor, which is read when it is used, and what goes with it."""
        file, facts = self._opened(self._index()[key])
        return file.get_tensor(key), facts[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self._paths())

    def write(self, entries: Mapping[str, tuple[torch.Tensor, Any]]) -> Path:
        """One more file with these tensors, and what goes with each (anything that JSON can say)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"features-{uuid.uuid4().hex}{_SUFFIX}"
        aside = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(
                {key: tensor.contiguous() for key, (tensor, _) in entries.items()},
                aside,
                metadata={_FACTS: json.dumps({key: facts for key, (_, facts) in entries.items()})},
            )
            with aside.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        self.refresh()
        return path

    def refresh(self) -> None:
        """See what was written by others since."""
        index = {} if self._file_of is None else self._file_of
        known = set(self._files)
        for path in self._paths():
            if path.name not in known:
                self._files.append(path.name)
                with self._mapped(path) as file:
                    index.update(dict.fromkeys(file.keys(), len(self._files) - 1))
        self._file_of = index

    def clear(self) -> None:
        """Remove all files, and what killed processes left of any."""
        self._open.clear()
        self._files, self._file_of = [], None
        for path in (*self._paths(), *self.directory.glob("features-*.partial")):
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob(f"features-*{_SUFFIX}"))

    def _index(self) -> dict[str, int]:
        if self._file_of is None:
            self.refresh()
        return self._file_of

    def _opened(self, number: int) -> tuple[Any, dict]:
        if number not in self._open:
            file = self._mapped(self.directory / self._files[number])
            self._open[number] = file, json.loads(file.metadata()[_FACTS])
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    @staticmethod
    def _mapped(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it: what it held is computed again.") from error
