"""Any kind of picture that people pass, to one RGB `PIL.Image`, or an error that says what to do."""

import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import load_image


# Pillow's modes with more than 8 bits a channel. Reducing them needs a choice (a window) that is the caller's.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def to_rgb_picture(image: Any) -> Image.Image:
    """One picture as 8-bit RGB.

    Args:
        image: `PIL.Image` of any 8-bit mode; a path, URL, base64 string or bytes; `{"bytes", "path"}`, of which
            one may be `None` (`datasets.Image(decode=False)`); an array or tensor, uint8 in 0-255 or floating point in
            0-1, shaped `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3 or 4
            channels.

    Greyscale, palette and CMYK pictures are converted; transparent ones are laid on white; a camera's orientation tag
    is applied.

    Raises:
        ValueError: no pixels, more than 8 bits a channel, or a file that is truncated or not a picture.
        TypeError: something that is no picture.
    """
    if isinstance(image, Mapping) and (image.get("bytes") is not None or image.get("path")):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    name = str(image) if isinstance(image, (str, os.PathLike)) and len(str(image)) < 300 else "the picture"
    try:
        picture = _open(image)
        if 0 in picture.size:
            raise ValueError(f"{name} has no pixels: its size is {picture.width}x{picture.height}. Leave it out.")
        picture.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that Pillow can read: {error}.") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{name} cannot be decoded ({error}). The file is damaged or cut short: fetch it again."
        ) from error
    if picture.mode in _DEEP_MODES:
        raise ValueError(
            f"{name} has more than 8 bits a channel (Pillow mode {picture.mode!r}). Choose the window of values that "
            "matters and reduce it first, for example: a = np.asarray(image).astype(float); "
            "Image.fromarray(np.uint8(255 * np.clip((a - low) / (high - low), 0, 1)))."
        )
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray)):
        return Image.open(BytesIO(image))
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
        return Image.open(image)
    if isinstance(image, str):
        return load_image(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(
        f"A picture must be a PIL.Image, a path, a URL, bytes, an array or a tensor, not {type(image).__name__}."
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(
            f"An array of shape {array.shape} is not one picture. Pass (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels, and several pictures as a list."
        )
    if array.size == 0:
        raise ValueError(f"The picture has no pixels: its shape is {array.shape}. Leave it out.")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                "A floating-point picture must have finite values from 0 to 1. Scale it first, or pass uint8."
            )
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"A picture of {array.dtype} has more than 8 bits a channel, or is signed. Choose the window of values "
            "that matters and pass uint8: np.uint8(255 * np.clip((a - low) / (high - low), 0, 1))."
        )
    return Image.fromarray(array)
