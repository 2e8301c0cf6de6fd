"""What image processors make of pixels, and those that make nothing else."""

from typing import Any

from transformers import SiglipImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor


#: Settings that every image processor has.
_COLOURS = ("resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")


def colours_of(image_processor: BaseImageProcessor) -> dict[str, Any]:
    """The settings by which an image processor turns pixels into numbers, for another one."""
    return {name: getattr(image_processor, name) for name in _COLOURS}


def for_views(image_processor: BaseImageProcessor, size: tuple[int, int]) -> SiglipImageProcessorPil:
    """A plain image processor in the place of one that cuts by itself: for views that are cut already."""
    return SiglipImageProcessorPil(size={"height": size[0], "width": size[1]}, **colours_of(image_processor))
