"""What the rows of a source are, seen from its columns, and the sample each of them becomes."""

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .conversations import BadRow, blocks, text_of, to_conversation
from .source_settings import Source


#: The usual name of a column first.
_NAMES = {
    "messages": ("messages", "conversations"),
    "images": ("images", "image"),
    "caption": ("caption", "captions", "text"),
    "label": ("label",),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "text": ("text",),
}
#: Columns that a format needs, the most telling first.
_NEEDS = {
    "messages": ("messages",),
    "questions": ("question", "answer"),
    "classes": ("images", "label"),
    "captions": ("images", "caption"),
    "text": ("text",),
}
#: What a caption is an answer to: LLaVA's questions for brief descriptions.
CAPTION_QUESTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
)
CLASS_QUESTIONS = ("What is in the picture?",)


@dataclass
class Rows:
    """What the rows of a source are.

    Args:
        format: One of `FORMATS`; LLaVA's rows are `messages`.
        columns: What is where, by the names that `Source` has for columns.
        class_names: Of a column of numbers, in their order.
        folder: What names of pictures are relative to; `None` if they are as they should be.
    """

    format: str
    columns: dict[str, str]
    class_names: Sequence[str] | None = None
    folder: str | None = None

    @property
    def used(self) -> set[str]:
        """Columns that end in the sample; all others are kept."""
        names = ("text",) if self.format == "text" else ("messages", "images")
        return {self.columns[name] for name in names if name in self.columns}


def recognise(available: Sequence[str], source: Source, folder: str | None, class_names=None) -> Rows:
    """What the rows are.

    Args:
        available: Columns of the source.
        source: Its settings: what they name is believed.
        folder: Where its files are.
        class_names: Of the column of classes, if that has numbers.

    Raises:
        ValueError: the columns are none of the known formats, or not those that the settings name.
    """
    columns = {}
    for role, usual in _NAMES.items():
        named = getattr(source, role)
        if named is not None and named not in available and role != "images":
            raise ValueError(
                f"{source.path}: there is no column {named!r} for `{role}`. Columns are: {', '.join(available)}."
            )
        found = named if named in available else next((name for name in usual if name in available), None)
        if found is not None:
            columns[role] = found
    asked = "messages" if source.format == "llava" else source.format
    for kind in [asked] if asked else _NEEDS:
        if all(role in columns for role in _NEEDS[kind]):
            return Rows(kind, columns, class_names, source.image_folder or folder)
    wanted = "; ".join(f"{kind}: {' and '.join(_NEEDS[kind])}" for kind in ([asked] if asked else _NEEDS))
    raise ValueError(
        f"{source.path}: its columns ({', '.join(available) or 'none'}) are not those of a known format ({wanted}). Say "
        "which column is what, for example `messages: dialogue`, `images: picture`, `caption: description`."
    )


def sample_of(row: Mapping[str, Any], rows: Rows, source: Source, seed: int) -> dict[str, Any]:
    """`{"messages", "images"}` of a row; plain text has no messages, but `text`, as the collator takes it.

    Raises:
        BadRow: with what is wrong.
    """
    columns = rows.columns
    if rows.format == "text":
        text = row.get(columns["text"])
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"the column {columns['text']!r} (text) is empty")
        return {"messages": None, "images": [], "text": text}
    images = row.get(columns["images"]) if "images" in columns else None
    if rows.format == "messages":
        videos = row.get("videos")
        turns = row.get(columns["messages"])
        messages, pictures = to_conversation(turns, images, len(videos) if videos else 0, source.needs_answers)
    else:
        question, answer = _question_and_answer(row, rows, source, seed)
        given = [] if images is None else images if isinstance(images, list) else [images]
        if not given and rows.format in ("captions", "classes"):
            raise BadRow("there is no picture")
        turns = [
            {"role": "user", "content": blocks(question, *["image"] * len(given))},
            {"role": "assistant", "content": blocks(answer)},
        ]
        messages, pictures = to_conversation(turns, given)
    return {"messages": messages, "images": [_placed(picture, rows.folder) for picture in pictures]}


def _question_and_answer(row: Mapping[str, Any], rows: Rows, source: Source, seed: int) -> tuple[str, str]:
    role = {"captions": "caption", "classes": "label", "questions": "answer"}[rows.format]
    given = row.get(rows.columns[role])
    # Of several captions or answers one, the same whenever and wherever the row is read.
    if isinstance(given, (list, tuple)):
        given = _pick([entry for entry in given if entry], seed, "answer", str(given))
    if isinstance(given, Mapping):
        given = given.get("answer", given.get("text"))
    if given is None or given == "":
        raise BadRow(f"the column {rows.columns[role]!r} ({role}) is empty")
    if rows.format == "questions":
        question = row.get(rows.columns["question"])
        if not question:
            raise BadRow(f"the column {rows.columns['question']!r} (question) is empty")
        return text_of(question), text_of(given)
    if rows.format == "classes":
        name = rows.class_names[given] if rows.class_names and isinstance(given, int) else text_of(given)
        answer = source.classes.get(name, name.replace("_", " "))
    else:
        answer = text_of(given)
    defaults = {"captions": CAPTION_QUESTIONS, "classes": CLASS_QUESTIONS}[rows.format]
    return _pick(source.questions or defaults, seed, "question", _identity(row, rows), answer), answer


def _identity(row: Mapping[str, Any], rows: Rows) -> str:
    """What tells a row from others wherever it stands: the name of its picture, if it has one."""
    picture = row.get(rows.columns.get("images", ""))
    picture = picture[0] if isinstance(picture, list) and picture else picture
    return os.path.basename(str(picture.get("path"))) if isinstance(picture, Mapping) else str(picture)


def _pick(choices: Sequence, seed: int, *what: str) -> Any:
    """One of them by the words alone: not by a place in the data, which shuffling, mixing and workers change."""
    return choices[zlib.crc32("\n".join([str(seed), *what]).encode()) % len(choices)] if choices else None


def _placed(picture: dict[str, Any], folder: str | None) -> dict[str, Any]:
    path = picture["path"]
    if folder is None or path is None or picture["bytes"] is not None or "://" in path or path.startswith("data:"):
        return picture
    return {"bytes": None, "path": os.path.join(folder, path)}
