"""Small changes of pictures that leave what is said about them true.

Crops keep almost all of a picture, colours stay what they are called, and nothing is mirrored: answers speak of left and
right, and pictures hold letters. The kinds are those of SimCLR (Chen et al. 2020) and of AugMix's milder ones, at a fraction
of their strength; JPEG's noise is what pictures of other sources differ by.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Augmentation:
    """Changes a picture at random, by a key alone: the same key gives the same picture, in whichever process.

    Args:
        probability: Of a picture to be changed at all.
        crop: Most that is cut off, as a share of width and of height, over both sides.
        rotation: Most degrees, either way; corners take the mean colour of the border.
        brightness, contrast, saturation: Most change, as a share (0.2: factors from 0.8 to 1.2). Hue stays.
        blur: Largest radius of a blur, in percent of the shorter side: small letters stay readable; ...
        blur_probability: ... and how often.
        jpeg_quality: Lowest quality of JPEG's noise; ...
        jpeg_probability: ... and how often.
        horizontal_flip, vertical_flip: How often. 0, because texts say left and right and pictures hold letters.

    Raises:
        ValueError: a value outside of what it can be.
    """

    probability: float = 1.0
    crop: float = 0.1
    rotation: float = 5.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    blur: float = 0.5
    blur_probability: float = 0.2
    jpeg_quality: int = 60
    jpeg_probability: float = 0.2
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0

    #: What a cache of features asks.
    augments: ClassVar[bool] = True
    _HIGHEST: ClassVar[dict[str, float]] = {"rotation": 180, "blur": 20, "jpeg_quality": 100, "crop": 0.9}

    def __post_init__(self):
        for field in fields(self):
            value, highest = getattr(self, field.name), self._HIGHEST.get(field.name, 1)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
                raise ValueError(f"augmentation: {field.name} is from 0 to {highest:g}, not {value!r}.")
        if self.horizontal_flip or self.vertical_flip:
            logger.warning(
                "Pictures are mirrored (horizontal_flip, vertical_flip): texts that say left and right, up and down, or "
                "quote letters become false."
            )

    @classmethod
    def from_settings(cls, settings: "Augmentation | Mapping[str, Any] | bool | None") -> "Augmentation | None":
        """What a recipe says under `augmentation`: `true`, or some of the arguments.

        Raises:
            ValueError: an unknown name.
        """
        if isinstance(settings, cls) or settings is None or settings is False:
            return settings or None
        settings = {} if settings is True else settings
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known)) if isinstance(settings, Mapping) else [repr(settings)]
        if unknown:
            raise ValueError(
                f"augmentation: {', '.join(unknown)} is not known; it is true, or some of {', '.join(known)}."
            )
        return cls(**settings)

    def __call__(self, picture: Image.Image, key: Sequence[int]) -> Image.Image:
        """An RGB picture, changed.

        Args:
            key: Whole numbers, such as seed, epoch, index of the sample, number of the picture.
        """
        random = np.random.default_rng([int(number) for number in key])
        # All are drawn whatever is used: a setting that changes leaves the others' numbers.
        chance, left, top, width, height, angle, light, contrast, colour, blur, blurs, jpeg, jpegs, flip, turn = (
            random.random(15).tolist()
        )
        if chance >= self.probability:
            return picture
        picture = self._rotated(picture, (2 * angle - 1) * self.rotation)
        picture = self._cropped(picture, width * self.crop, height * self.crop, left, top)
        for enhance, amount, number in (
            (ImageEnhance.Brightness, self.brightness, light),
            (ImageEnhance.Contrast, self.contrast, contrast),
            (ImageEnhance.Color, self.saturation, colour),
        ):
            if amount:
                picture = enhance(picture).enhance(1 + (2 * number - 1) * amount)
        if blurs < self.blur_probability and self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(blur * self.blur / 100 * min(picture.size)))
        if jpegs < self.jpeg_probability:
            picture = _as_jpeg(picture, round(self.jpeg_quality + jpeg * (95 - self.jpeg_quality)))
        if flip < self.horizontal_flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if turn < self.vertical_flip:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return picture

    @staticmethod
    def _rotated(picture: Image.Image, angle: float) -> Image.Image:
        if not angle:
            return picture
        values = np.asarray(picture)
        border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]]).mean(0)
        fill = tuple(int(round(channel)) for channel in border)
        return picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill)

    @staticmethod
    def _cropped(picture: Image.Image, width: float, height: float, left: float, top: float) -> Image.Image:
        """Without these shares of width and height; the size stays."""
        cut_x, cut_y = width * picture.width, height * picture.height
        if not (cut_x or cut_y):
            return picture
        x, y = left * cut_x, top * cut_y
        box = (x, y, x + picture.width - cut_x, y + picture.height - cut_y)
        return picture.resize(picture.size, Image.Resampling.BICUBIC, box=box)


def augmentation_sheet(
    pictures: Sequence[Any],
    augmentation: Augmentation,
    path: str | os.PathLike,
    columns: int = 7,
    edge: int = 160,
    seed: int = 0,
) -> str:
    """A sheet to look at: in each row a picture as it is, and as training sees it in as many epochs as there are columns.

    Args:
        pictures: As the collator takes them; one that cannot be read is left out.
        path: Of the file to write, a PNG or JPEG.
        edge: Longest side of a picture in it, in pixels.

    Returns:
        `path`.
    """
    from .readable import UnreadablePicture, read_picture

    sheet, row = Image.new("RGB", (columns * (edge + 4), len(pictures) * (edge + 4)), "white"), 0
    for index, picture in enumerate(pictures):
        try:
            original = read_picture(picture)
        except UnreadablePicture:
            continue
        shown = [original] + [augmentation(original, (seed, epoch, index, 0)) for epoch in range(columns - 1)]
        for column, one in enumerate(shown):
            one = one.copy()
            one.thumbnail((edge, edge))
            sheet.paste(one, (column * (edge + 4) + 2, row * (edge + 4) + 2))
        row += 1
    if row == 0:
        raise ValueError("None of the pictures can be read, so there is nothing to show.")
    path = os.fspath(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    stem, suffix = os.path.splitext(path)
    sheet.crop((0, 0, sheet.width, row * (edge + 4))).save(f"{stem}.part{suffix}")
    os.replace(f"{stem}.part{suffix}", path)
    return path


def _as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
