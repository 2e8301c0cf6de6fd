"""What was measured so far, one JSON line for each pair, so that a run that was stopped can go on."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import anyvlm


ROOT = Path(__file__).resolve().parents[1]

#: Code whose change makes earlier measurements worthless; not that which only runs them and writes the table.
MEASURED_CODE = (
    "configuration",
    "modeling",
    "processing",
    "composition",
    "compatibility/bare_language_model.py",
    "compatibility/combinations.py",
    "compatibility/composed_model.py",
    "compatibility/model_under_test.py",
    "compatibility/pair_checks.py",
    "compatibility/tiny_configs.py",
    "compatibility/tiny_text_settings.py",
    "compatibility/tiny_tokenizer.py",
    "compatibility/tiny_vision_settings.py",
)


def versions() -> dict[str, str]:
    return {
        "anyvlm": anyvlm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def source_hash(root: Path = ROOT, code: Iterable[str] = MEASURED_CODE) -> str:
    """A hash of the code that is measured and of that which measures."""
    digest = hashlib.sha256()
    for name in code:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Journal:
    """Results that are kept in a file while they come.

    Args:
        path: The file. Its first line says what it was measured with; one that was measured with something else is
            put aside, as `….old`, and a new one begun.
        key: What results hold for: versions, code, seed.
        fresh: Begin anew in any case.
    """

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool = False):
        self.path = path
        self.results: dict[tuple[str, ...], dict[str, Any]] = {}
        lines = _read_lines(path)
        if lines and (fresh or lines[0] != {"key": key}):
            path.replace(path.with_name(path.name + ".old"))
            lines = []
        for line in lines[1:]:
            self.results[_key(line)] = line
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written whole and renamed: what a killed run left half-written is gone.
        aside = path.with_name(path.name + ".part")
        aside.write_text(_to_lines([{"key": key}, *self.results.values()]), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, result: dict[str, Any]) -> None:
        self.results[_key(result)] = result
        self._file.write(_to_lines([result]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _key(result: dict[str, Any]) -> tuple[str, ...]:
    """The task that a result is of: vision type and language model type, and how they were joined if not as usual."""
    return (result["vision"], result["text"], *filter(None, [result.get("combination")]))


def _to_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, up to the first that is not whole."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
