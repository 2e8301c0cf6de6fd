"""Rows of JSON and JSON-lines files, one after the other, in bounded memory.

`datasets` reads such files too, but gives a column whose values have several types (LLaVA's `image`: a name, or a list of
them; a content: a string, or blocks) a type of its own, under which the answer "42" comes back as a number and, streamed, a
list as text. Here every value stays what it is in the file, and becomes a message before Arrow sees it.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any


_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def json_rows(files: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """`(file, number of the row from 1, row)` of files that are a list, or have one value a line.

    Raises:
        ValueError: a file is not JSON, with the place.
    """
    for name in files:
        with open(name, encoding="utf-8-sig") as file:
            start = file.read(_CHUNK).lstrip()[:1]
            file.seek(0)
            rows = _elements(file, name) if start == "[" else _lines(file, name)
            for number, row in enumerate(rows, 1):
                yield name, number, row


def file_versions(files: Sequence[str]) -> list[list]:
    """What tells a changed file from the one that was read before: `[size, time]` of each."""
    return [[os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in files]


def _lines(file, name: str) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Line {number} of {name} is not JSON: {error}. Expected one object a line, or one list of objects."
                ) from error


def _elements(file, name: str) -> Iterator[Any]:
    """The elements of one long list, without holding all of it."""
    decode = json.JSONDecoder().raw_decode
    text, at, number = file.read(_CHUNK).lstrip(), 1, 0
    while True:
        at = _BETWEEN.match(text, at).end()
        if text.startswith("]", at):
            return
        try:
            value, end = decode(text, at)
            # A number at the end of what was read may go on.
            if end == len(text):
                raise json.JSONDecodeError("it ends within the list", text, end)
        except json.JSONDecodeError as error:
            # As much again, so that a long element is not read over and over.
            more = file.read(max(_CHUNK, len(text) - at))
            if not more:
                raise ValueError(f"{name} is not JSON, in element {number + 1} of its list: {error}.") from error
            text, at = text[at:] + more, 0
            continue
        yield value
        number, at = number + 1, end
