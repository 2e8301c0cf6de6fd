"""One row of any known shape to `{"messages", "images"}`, or a sentence that says why not."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any


#: What a conversation calls its speakers -> the roles of chat templates. The first three are LLaVA's and ShareGPT's.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "user": "user", "assistant": "assistant"} | {
    "system": "system",
    "tool": "tool",
}
#: Where a turn has its role and its words: TRL's and OpenAI's names, then LLaVA's.
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
#: Keys of a block that hold the picture itself.
_PICTURE_KEYS = ("image", "url", "path")
_PLACES = {"<image>": "image", "<video>": "video"}
_IMAGE, _PLACE = re.compile("(<image>)"), re.compile("(<image>|<video>)")


class BadRow(ValueError):
    """Why a row cannot be used."""


def to_conversation(
    turns: Any, images: Any, num_videos: int = 0, needs_answer: bool = True
) -> tuple[list[dict], list[dict]]:
    """Messages as TRL has them, each content a list of `{"type", "text"}`, and pictures as `datasets.Image(decode=False)`.

    Args:
        turns: A list of `{"role", "content"}` or `{"from", "value"}` (LLaVA). A content is a string, in which `<image>` may
            stand, or a list of blocks; pictures may be in the blocks.
        images: What the row has beside them: nothing, one picture, or a list; each a path, a URL, bytes, or
            `{"bytes", "path"}`.
        num_videos: Of the row; they stay where they are.
        needs_answer: Whether there must be one.

    Returns:
        The messages, and `[{"bytes", "path"}]`, as many as there are blocks of type `image`. If nothing in the messages
        places a picture, they come before the first words of the user, as `AnyVlmDataCollator` does it.

    Raises:
        BadRow: with what is wrong.
    """
    if isinstance(turns, str):
        raise BadRow("the messages are a string, not a list of turns")
    if not isinstance(turns, Sequence) or not turns:
        raise BadRow("there are no messages")
    given = _as_list(images)
    inline: list[Any] = []
    messages = [_message(turn, inline, num_videos > 0) for turn in turns]
    if inline and given:
        raise BadRow("pictures are both in the messages and beside them")
    pictures = inline or given
    places = sum(block["type"] == "image" for message in messages for block in message["content"])
    if pictures and not places:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadRow("there are pictures, but no message of the user to put them in")
        first["content"] = [*({"type": "image", "text": None} for _ in pictures), *first["content"]]
    elif places != len(pictures):
        raise BadRow(f"the messages place {places} pictures, but the row has {len(pictures)}")
    if needs_answer and not any(
        message["role"] == "assistant" and any((block["text"] or "").strip() for block in message["content"])
        for message in messages
    ):
        raise BadRow("there is no answer: no message of the assistant (`gpt` in LLaVA's files) with words in it")
    return messages, [as_picture(picture) for picture in pictures]


def as_picture(picture: Any) -> dict[str, Any]:
    """As `datasets.Image(decode=False)` has it: `{"bytes": …, "path": …}`.

    Raises:
        BadRow: neither a path nor bytes.
    """
    if isinstance(picture, Mapping) and (picture.get("bytes") is not None or picture.get("path")):
        return {"bytes": picture.get("bytes"), "path": picture.get("path")}
    if isinstance(picture, (str, os.PathLike)) and str(picture):
        return {"bytes": None, "path": os.fspath(picture)}
    if isinstance(picture, (bytes, bytearray)):
        return {"bytes": bytes(picture), "path": None}
    raise BadRow(f"a picture is {_shown(picture)}, not a path, a URL or bytes")


def text_of(value: Any) -> str:
    """A text as it was in the file: `datasets` may read the answer `42` as a number."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def blocks(text: str, *types: str) -> list[dict[str, Any]]:
    """A content with blocks of `types` (`"image"`) before a text."""
    return [*({"type": name, "text": None} for name in types), {"type": "text", "text": text}]


def _message(turn: Any, inline: list, has_videos: bool) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRow(f"a message is {_shown(turn)}, not `{{'role': …, 'content': …}}`")
    role = next((turn[key] for key in _ROLE_KEYS if turn.get(key) is not None), None)
    content = next((turn[key] for key in _CONTENT_KEYS if turn.get(key) is not None), None)
    if role not in ROLES:
        raise BadRow(f"a message has the role {role!r}; known are {', '.join(ROLES)}")
    if content is None:
        raise BadRow(f"a message of the {role} has no content")
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return {"role": ROLES[role], "content": _split(text_of(content), has_videos)}
    return {"role": ROLES[role], "content": [_block(block, inline) for block in content]}


def _block(block: Any, inline: list) -> dict[str, Any]:
    if isinstance(block, str):
        return {"type": "text", "text": block}
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": text_of(block.get("text") or "")}
    if kind == "image_url":  # OpenAI's
        url = block.get("image_url")
        inline.append(url.get("url") if isinstance(url, Mapping) else url)
        return {"type": "image", "text": None}
    if kind == "image":
        inline.extend(block[key] for key in _PICTURE_KEYS if block.get(key) is not None)
        return {"type": "image", "text": None}
    if kind == "video":
        if any(block.get(key) is not None for key in ("video", "url", "path")):
            raise BadRow(
                "a video is in the messages; put it in a column `videos`, with {'type': 'video'} as its place"
            )
        return {"type": "video", "text": None}
    raise BadRow(f"a block of a content is {_shown(block)}; known types are text, image, image_url and video")


def _split(text: str, has_videos: bool) -> list[dict[str, Any]]:
    """A string with `<image>` in it as blocks; the words stay exactly as they are."""
    pieces = (_PLACE if has_videos else _IMAGE).split(text)
    found = [
        {"type": _PLACES[piece], "text": None} if piece in _PLACES else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
    return found or [{"type": "text", "text": ""}]


def _as_list(images: Any) -> list:
    if images is None:
        return []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    return [image for image in images if image is not None and image != ""]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}…"
