"""Give the tower an image processor that makes pictures of one size."""

import copy
import logging
import os
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from .errors import CompositionError
from .parts import PartSource, pretrained_name


logger = logging.getLogger(__name__)


def load_image_processor(
    image_processor: BaseImageProcessor | str | None,
    vision: PartSource,
    vision_config: PreTrainedConfig,
    image_size: int | tuple[int, int] | None,
    trust_remote_code: bool,
) -> tuple[BaseImageProcessor, tuple[int, int]]:
    """The image processor given, the tower's own, or a plain one; and the size `(height, width)` it makes.

    A processor that keeps a picture's proportions is set to resize to one size, since every picture must take the same
    number of tokens. `image_size` overrides the size.

    Raises:
        CompositionError: the processor cannot be brought to one size.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    processor = image_processor if isinstance(image_processor, BaseImageProcessor) else None
    source = image_processor if isinstance(image_processor, (str, os.PathLike)) else pretrained_name(vision)
    if processor is None and source is not None:
        processor = _load(source, required=image_processor is not None, trust_remote_code=trust_remote_code)
    if processor is None:
        return _plain_processor(size or _config_size(vision_config) or (224, 224))
    processor = copy.deepcopy(processor)
    measured = _output_size(processor)
    if measured is not None and size in (None, measured):
        return processor, measured
    wanted = size or _config_size(vision_config) or _processor_size(processor) or (224, 224)
    _fix_size(processor, wanted)
    measured = _output_size(processor)
    if measured != wanted:
        raise CompositionError(
            f"{type(processor).__name__} cannot be set to make pictures of {wanted[0]}x{wanted[1]} pixels. Pass "
            "image_processor=… with one that resizes to a fixed height and width, such as ViTImageProcessor."
        )
    if image_size is None:
        logger.warning(
            "%s keeps a picture's proportions, but every picture must take the same number of tokens: it is set to resize "
            "to %dx%d pixels (height x width). Pass image_size=… for another size.",
            type(processor).__name__,
            *wanted,
        )
    return processor, measured


def _load(source: str, required: bool, trust_remote_code: bool) -> BaseImageProcessor | None:
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if required:
            raise
        logger.warning(
            "No image processor could be loaded with the vision tower (%s). A plain one is used: resize, scale to "
            "0-1, normalise with mean and deviation 0.5. If the tower was trained with another, pass image_processor=….",
            str(error).splitlines()[0],
        )
        return None


def _plain_processor(size: tuple[int, int]) -> tuple[BaseImageProcessor, tuple[int, int]]:
    # Pillow's version of ViTImageProcessor; it is saved under that name, and either version loads it. Imported here
    # because transformers takes a while to load it.
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size[0], "width": size[1]}), size


def _config_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _processor_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """The size a processor states in one of transformers' forms; a square where only an edge is stated."""
    for key in ("crop_size", "size"):
        size = getattr(processor, key, None)
        if size is None:
            continue
        size = dict(size)
        if size.get("height") and size.get("width"):
            return size["height"], size["width"]
        edge = size.get("shortest_edge") or size.get("longest_edge")
        if edge:
            return edge, edge
    return None


def _fix_size(processor: BaseImageProcessor, size: tuple[int, int]) -> None:
    height_width = {"height": size[0], "width": size[1]}
    processor.size = height_width
    processor.do_resize = True
    for key in ("do_center_crop", "do_pad", "do_thumbnail", "do_align_long_axis"):
        if getattr(processor, key, None):
            setattr(processor, key, False)


def _output_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Height and width of what the processor makes of pictures of any proportions; `None` if they differ."""
    sizes: set[Any] = set()
    for height, width in ((61, 97), (160, 40), (300, 400)):
        picture = Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))
        try:
            shape = np.shape(processor(picture, return_tensors="np")["pixel_values"])
        except (ValueError, TypeError, KeyError):
            return None
        if len(shape) != 4 or shape[0] != 1:
            return None
        sizes.add(shape[-2:])
    return tuple(int(edge) for edge in sizes.pop()) if len(sizes) == 1 else None
