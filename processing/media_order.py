"""Pictures and videos in the order in which they stand in the texts, as the model gets them."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image


def in_text_order(
    texts: list[str], placeholders: tuple[str, str], pictures: list | None, videos: list | None
) -> list[list]:
    """For each text, its pictures and videos in the order of their placeholders.

    Args:
        placeholders: What stands for a picture, and what for a video.
        pictures, videos: Flat lists for all texts, or lists with one list for each text.

    Raises:
        ValueError: a text has more or fewer placeholders than pictures or videos.
    """
    of_texts = [
        iter(_per_text(texts, placeholder, given or [], kind))
        for placeholder, given, kind in zip(placeholders, (pictures, videos), ("pictures", "videos"))
    ]
    ordered = []
    for text, *given in zip(texts, *of_texts):
        found = dict(zip(placeholders, map(iter, given)))
        pattern = "|".join(map(re.escape, placeholders))
        ordered.append([next(found[match.group()]) for match in re.finditer(pattern, text)])
    return ordered


def _per_text(texts: list[str], placeholder: str, given: list, kind: str) -> list[list]:
    counts = [text.count(placeholder) for text in texts]
    if given and isinstance(given[0], list):
        if len(given) != len(texts):
            raise ValueError(
                f"Got {len(texts)} texts but {len(given)} lists of {kind}. Pass one list per text, empty for a text without "
                f"{kind}."
            )
        for index, (count, items) in enumerate(zip(counts, given)):
            if count != len(items):
                raise ValueError(count_message(f"text {index} of the batch", placeholder, count, len(items), kind))
        return given
    if sum(counts) != len(given):
        raise ValueError(count_message("the text", placeholder, sum(counts), len(given), kind))
    items = iter(given)
    return [[next(items) for _ in range(count)] for count in counts]


def count_message(where: str, placeholder: str, count: int, number: int, kind: str) -> str:
    """That a placeholder stands `count` times for `number` pictures or videos."""
    return (
        f"In {where}, {placeholder!r} stands {count} times, but {number} {kind} were passed. Put it exactly once for each "
        f"{kind.removesuffix('s')}, where the {kind.removesuffix('s')} belongs, or let processor.apply_chat_template place "
        "it from messages."
    )


def read_videos(videos: Any, read: Callable[[Any], Any]) -> list:
    """Videos as people pass them, read, in a flat list, or in one list per text if any entry is `None` or holds videos.

    A list of pictures in memory is one video; a list of paths is several, as for transformers, unless it stands where
    only a video can stand: in the list of a text.
    """
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return [read(video) for video in videos]
    if _is_video(videos) or not isinstance(videos, (list, tuple)):
        return [read(videos)]
    if any(item is None or (isinstance(item, (list, tuple)) and not _is_video(item)) for item in videos):
        return [
            [] if item is None else read_videos(item, read) if _is_video(item) else [read(v) for v in item]
            for item in videos
        ]
    return [read(video) for video in videos]


def _is_video(value: Any) -> bool:
    if isinstance(value, (str, os.PathLike, bytes, bytearray, Mapping)):
        return True
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 4
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_picture(item) for item in value)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3))
