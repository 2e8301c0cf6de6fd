"""Weights on disk: read one tensor at a time, written file by file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CompositionError


class ShardReader:
    """The tensors of a checkpoint's safetensors files. Nothing is read until `read` asks for it.

    One file is open at a time, and `close` may be called at any time: the pages of an open file that were read count as
    this process's memory.

    Raises:
        CompositionError: there are no such files in the folder, or files of its index are missing.
    """

    def __init__(self, folder: Path):
        index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in named if not (folder / name).is_file())
            if missing:
                raise CompositionError(f"{folder} lacks files that its index names: {', '.join(missing)}.")
        elif single.is_file():
            named = {SAFE_WEIGHTS_NAME}
        else:
            raise CompositionError(
                f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Weights in another format must "
                "be saved again with save_pretrained of transformers first."
            )
        self.paths = sorted(folder / name for name in named)
        sizes = [path.stat().st_size for path in self.paths]
        self.largest_file, self.total_bytes, self.bytes_read = max(sizes), sum(sizes), 0
        #: Key -> number of the file that has it, shape, and dtype as safetensors calls it (`"BF16"`).
        self.file_of: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for number, path in enumerate(self.paths):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    header = file.get_slice(key)
                    self.file_of[key] = number
                    self.shapes[key], self.dtypes[key] = tuple(header.get_shape()), header.get_dtype()
        self._open: tuple[int, Any] | None = None

    def read(self, key: str) -> torch.Tensor:
        number = self.file_of[key]
        if self._open is None or self._open[0] != number:
            self.close()
            self._open = number, safe_open(self.paths[number], framework="pt", device="cpu").__enter__()
        tensor = self._open[1].get_tensor(key)
        self.bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would make it too large.

    Args:
        folder: Where to.
        max_bytes: Most bytes of one file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def write(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Take over tensors; whether a file was written for it."""
        written = len(self._files)
        for key, tensor in tensors.items():
            if self._held and self._held_bytes + tensor.nbytes > self.max_bytes:
                self._flush()
            # A view would be written, or held, with all that it is a part of.
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            self._held[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
            self._held_bytes += tensor.nbytes
        return len(self._files) > written

    def finish(self) -> list[Path]:
        """Write what is left, give the files their names and, if there are several, their index."""
        self._flush()
        number = len(self._files)
        stem, suffix = SAFE_WEIGHTS_NAME.split(".")
        weight_map, paths = {}, []
        for position, keys in enumerate(self._files, 1):
            name = SAFE_WEIGHTS_NAME if number == 1 else f"{stem}-{position:05d}-of-{number:05d}.{suffix}"
            os.replace(self._path(position), self.folder / name)
            weight_map.update(dict.fromkeys(keys, name))
            paths.append(self.folder / name)
        if number > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        return paths

    def _flush(self) -> None:
        if self._held:
            self._files.append(list(self._held))
            save_file(self._held, self._path(len(self._files)), metadata={"format": "pt"})
            self._total_bytes += self._held_bytes
            self._held, self._held_bytes = {}, 0

    def _path(self, position: int) -> Path:
        return self.folder / f"part-{position:05d}.tmp"
