"""Pictures without labels, from wherever they are, one batch at a time."""

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from ..processing.pictures import to_rgb_picture


logger = logging.getLogger(__name__)

#: More unreadable pictures than this share of all is an error.
MAX_UNREADABLE = 0.1
#: Sides of crops against those of the picture. Few values, so that few sizes occur: where features lie in a picture is
#: measured once for each size.
_CROPS = (1.0, 0.9, 0.8)


class Pictures:
    """Pictures of a source, in a fixed order, as often as they are wanted; never more than one batch in memory.

    Args:
        source: A folder (with its sub-folders), a sequence of paths and pictures, or anything that can be gone through more
            than once and gives pictures or rows with an `image` (a `datasets.Dataset`). Pictures may be all that
            `processing/pictures.py` takes, but for addresses in the net.
        limit: At most so many pictures: a random sample where the source has a length and can be indexed, else the first.
        seed: For the sample.
        num_variants: How often each picture is given: as it is, and otherwise changed by `variants`.

    Attributes:
        unreadable: How many pictures could not be read the last time.

    Raises:
        TypeError: the source is none of these, or an iterator, which can be gone through only once.
        ValueError: a folder without pictures, an empty sequence, or a number that makes no sense.
        FileNotFoundError: no such folder.
    """

    def __init__(self, source: Any, *, limit: int | None = None, seed: int = 0, num_variants: int = 1):
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        if num_variants < 1:
            raise ValueError(f"num_variants must be at least 1, got {num_variants}.")
        self.source = _files(source) if isinstance(source, (str, os.PathLike)) else _checked(source)
        self.seed, self.limit, self.num_variants = seed, limit, num_variants
        self.unreadable = 0
        try:
            self.num_pictures: int | None = len(self.source)
        except TypeError:
            self.num_pictures = None
        if self.num_pictures == 0:
            raise ValueError("There are no pictures: the source is empty.")
        # Data sets of torch have an end only by their length.
        self._order: Sequence[int] | None = None
        if self.num_pictures is not None and hasattr(self.source, "__getitem__"):
            self._order = range(self.num_pictures)
            if limit is not None and limit < self.num_pictures:
                self._order = sorted(random.Random(seed).sample(self._order, limit))
        if limit is not None and self.num_pictures is not None:
            self.num_pictures = min(self.num_pictures, limit)

    def items(self) -> Iterator[Any]:
        """What the source has, unread: paths, pictures or rows; those of the sample."""
        if self._order is not None:
            for index in self._order:
                yield self.source[index]
            return
        for index, item in enumerate(self.source):
            if index == self.limit:
                return
            yield item

    def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
        """The number of each picture in its order, and the picture in RGB; variants have the number of their picture.

        Raises:
            ValueError: no picture, or fewer than nine tenths of them, can be read.
        """
        self.unreadable, seen, first_reason = 0, 0, None
        for index, item in enumerate(self.items()):
            seen += 1
            try:
                picture = _read(item)
            except (ValueError, TypeError, OSError, Image.DecompressionBombError) as error:
                self.unreadable += 1
                first_reason = first_reason or str(error)
                if self.num_pictures is not None and self.unreadable > MAX_UNREADABLE * self.num_pictures:
                    raise ValueError(self._unreadable_message(seen, first_reason)) from error
                continue
            for variant in variants(picture, self.num_variants, seed=self.seed + index):
                yield index, variant
        if seen == 0:
            raise ValueError("There are no pictures: the source is empty.")
        if self.unreadable > MAX_UNREADABLE * seen:
            raise ValueError(self._unreadable_message(seen, first_reason))
        if self.unreadable:
            logger.warning(
                "%d of %d pictures cannot be read and are left out: %s", self.unreadable, seen, first_reason
            )

    def batches(self, size: int) -> Iterator[list[tuple[int, Image.Image]]]:
        """As when gone through, `size` at a time."""
        batch = []
        for entry in self:
            batch.append(entry)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _unreadable_message(self, seen: int, reason: str | None) -> str:
        return (
            f"{self.unreadable} of the first {seen} pictures cannot be read, the first of them because: {reason} "
            "Nothing is done with so many missing: look at the source, or leave these pictures out."
        )


def variants(picture: Image.Image, count: int, seed: int = 0, flips: bool = False) -> Iterator[Image.Image]:
    """The picture as it is, and `count - 1` times slightly changed: a part of it, lighter or darker.

    Args:
        seed: Equal pictures and seeds give equal variants.
        flips: Also mirror every second one. Off: text and sides have a meaning.
    """
    yield picture
    chance = random.Random(seed)
    for index in range(1, count):
        share = chance.choice(_CROPS)
        width, height = (max(1, round(side * share)) for side in picture.size)
        left, top = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
        changed = picture.crop((left, top, left + width, top + height))
        changed = ImageEnhance.Brightness(changed).enhance(chance.uniform(0.8, 1.2))
        yield ImageOps.mirror(changed) if flips and index % 2 else changed


def _files(folder: str | os.PathLike) -> list[Path]:
    """Every file in a folder and below whose name ends like that of a picture, in the order of their names."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is one file. Pass the folder that it is in, or a list of files.")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = [
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in endings and not name.startswith(".")
    ]
    if not found:
        raise ValueError(f"The folder {str(folder)!r} has no pictures, nor have the folders in it.")
    return sorted(found)


def _checked(source: Any) -> Any:
    kinds = "Pass a folder, a list of paths or pictures, or a dataset whose rows have an 'image'."
    one_picture = isinstance(source, (Image.Image, Mapping, bytes))
    if one_picture or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise TypeError(f"{type(source).__name__} is no source of pictures. {kinds}")
    if isinstance(source, Iterator):
        raise TypeError(
            f"{type(source).__name__} can be gone through only once, but the pictures may be needed again. {kinds}"
        )
    return source


def _read(item: Any) -> Image.Image:
    if isinstance(item, Mapping):
        if "image" not in item:
            raise KeyError(
                f"The rows of the source have no 'image', but {', '.join(map(repr, item))}. Rename the column of pictures "
                "to 'image'."
            )
        item = item["image"]
        if isinstance(item, Mapping):  # of a dataset that does not decode
            item = item.get("bytes") or item.get("path")
    if item is None:
        raise ValueError("a row has no picture.")
    if isinstance(item, str) and not os.path.isfile(item):
        raise FileNotFoundError(f"There is no file {item[:200]!r}.")
    return to_rgb_picture(item)
