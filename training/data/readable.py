"""Pictures are opened when a sample is needed; those that cannot be are counted and named."""

import json
import os
import tempfile
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.utils import logging

from ...processing.pictures import to_rgb_picture


logger = logging.get_logger(__name__)

#: Pictures that are read before the share of unreadable ones is judged.
JUDGE_AFTER = 200
REPORT_NAME = "unreadable_pictures.jsonl"
#: Workers of a data loader that can count.
_WORKERS = 1024
#: Seconds that a server may take.
_URL_TIMEOUT = 30.0
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class UnreadablePicture(ValueError):
    """One picture cannot be opened."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class TooManyUnreadablePictures(RuntimeError):
    """More pictures cannot be opened than the run may skip."""


def read_picture(picture: Any, value_range: tuple[float, float] | None = None) -> Image.Image:
    """One picture as 8-bit RGB, decoded whole.

    Args:
        picture: As the collator takes it, or `{"bytes", "path"}`. Greyscale, palette, CMYK and transparent ones, and a
            camera's orientation, become what a viewer shows (`processing/pictures.py`).
        value_range: Of pictures with more than 8 bits a channel: what becomes black and what white. Without it they cannot
            be read: which part of 65,536 values matters, only their owner knows.

    Raises:
        UnreadablePicture: it is missing, cut short, no picture, larger than Pillow takes (a decompression bomb), or its
            server does not answer.
    """
    name = picture_name(picture)
    try:
        source = _source(picture)
        if value_range is not None:
            source = _windowed(source, value_range)
        with warnings.catch_warnings():
            # Pillow warns of what is suspicious and raises for what is dangerous.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return to_rgb_picture(source)
    except MemoryError:
        raise
    # Pillow's decoders raise all kinds for broken files: SyntaxError, struct.error, zlib.error, IndexError, …
    except Exception as error:
        raise UnreadablePicture(name, f"{type(error).__name__}: {error}") from error


def picture_name(picture: Any) -> str:
    """What a picture is called in a report."""
    if isinstance(picture, Mapping):
        if picture.get("path"):
            return str(picture["path"])
        picture = picture.get("bytes")
    if isinstance(picture, (str, os.PathLike)):
        return str(picture)[:300]
    return f"a picture of {len(picture):,} bytes" if isinstance(picture, bytes) else type(picture).__name__


class UnreadableLog:
    """What could not be read, over all workers of a data loader.

    Args:
        report: File to which each picture is written once: `{"picture", "reason"}` a line. Default: a temporary one.
        max_unreadable: Share of all pictures read that may be unreadable.
        judge_after: Pictures that must have been read before a run fails for it.
    """

    def __init__(
        self, report: str | os.PathLike | None = None, max_unreadable: float = 0.01, judge_after: int = JUDGE_AFTER
    ):
        self.max_unreadable, self.judge_after = max_unreadable, judge_after
        if report is None:
            # Made when there is something to write.
            report = os.path.join(tempfile.gettempdir(), f"anyvlm-{uuid.uuid4().hex}", REPORT_NAME)
        self.report = os.path.abspath(report)
        # Each worker has its own row, which the main process sees: nothing is locked.
        self._counts = torch.zeros(_WORKERS + 1, 2, dtype=torch.int64).share_memory_()
        self._named: set[str] | None = None

    def count(self) -> None:
        """One more picture was read, or tried to."""
        self._counts[_worker(), 0] += 1

    def add(self, error: UnreadablePicture) -> None:
        """One of them could not be.

        Raises:
            TooManyUnreadablePictures: it was one too many.
        """
        self._counts[_worker(), 1] += 1
        if self._named is None:
            self._named = {line["picture"] for line in self.pictures()}
        if error.name not in self._named:
            self._named.add(error.name)
            logger.warning(f"A picture cannot be read; another sample takes its place. {error}")
            os.makedirs(os.path.dirname(self.report), exist_ok=True)
            # A short line at the end of a file is written whole, whoever else writes.
            with open(self.report, "a", encoding="utf-8") as file:
                line = {"picture": error.name, "reason": error.reason[:500]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.num_read >= self.judge_after and self.num_unreadable > self.max_unreadable * self.num_read:
            raise TooManyUnreadablePictures(self.summary_text())

    @property
    def num_read(self) -> int:
        return int(self._counts[:, 0].sum())

    @property
    def num_unreadable(self) -> int:
        return int(self._counts[:, 1].sum())

    def pictures(self) -> list[dict[str, str]]:
        """The unreadable ones, each once, with the reason; of earlier runs with this report too."""
        if not os.path.isfile(self.report):
            return []
        with open(self.report, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
        return list({line["picture"]: line for line in lines}.values())

    def summary(self) -> dict[str, Any]:
        """`{"read", "unreadable", "pictures"}`: how often, and which (the first ten) with the file that has all."""
        return {
            "read": self.num_read,
            "unreadable": self.num_unreadable,
            "pictures": [line["picture"] for line in self.pictures()[:10]],
            "report": self.report if self.num_unreadable else None,
        }

    def summary_text(self) -> str:
        listed = "".join(f"\n- {line['picture']}: {line['reason']}" for line in self.pictures()[:5])
        share = self.num_unreadable / max(self.num_read, 1)
        return (
            f"{self.num_unreadable:,} of {self.num_read:,} pictures ({share:.1%}) could not be read; allowed are "
            f"{self.max_unreadable:.1%} (max_unreadable). The first:{listed}\nAll of them are in {self.report}."
        )


def _worker() -> int:
    info = torch.utils.data.get_worker_info()
    return 0 if info is None else info.id % _WORKERS + 1


def _source(picture: Any) -> Any:
    if isinstance(picture, Mapping):
        picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    # Said here: a name that is no file could be base64, and the error would be about that.
    is_name = isinstance(picture, (str, os.PathLike)) and "://" not in str(picture)[:12]
    if is_name and not str(picture).startswith("data:") and not os.path.isfile(picture):
        raise FileNotFoundError("there is no such file")
    if isinstance(picture, str) and picture.startswith(("http://", "https://")):
        # A server that never answers must not hold up a training.
        return load_image(picture, timeout=_URL_TIMEOUT)
    return picture


def _windowed(source: Any, value_range: tuple[float, float]) -> Any:
    """A picture of more than 8 bits a channel as one of 8; any other as it was."""
    if isinstance(source, (bytes, bytearray)):
        from io import BytesIO

        opened = Image.open(BytesIO(source))
    elif isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        opened = Image.open(source)
    elif isinstance(source, Image.Image):
        opened = source
    else:
        return source
    if opened.mode not in _DEEP_MODES:
        return source
    low, high = value_range
    values = (np.asarray(opened).astype(np.float64) - low) / (high - low)
    return Image.fromarray(np.uint8(np.round(255 * np.clip(values, 0, 1))))
