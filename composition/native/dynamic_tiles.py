"""What InternVL, GOT-OCR 2, Aya Vision and Cohere2 Vision have in common: tiles in the arrangement that fits a picture best,
cut by the same kind of image processor (Chen et al. 2024)."""

import copy
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .colours import colours_of


def read_dynamic_tiles(fit: str) -> Callable[[PreTrainedConfig, ProcessorMixin], dict | None]:
    """A reader of views. All cut as GOT-OCR 2's image processor does; Cohere2 Vision chooses the arrangement by `"scale"`,
    the others by `"proportions"`, and their processors switch cutting on, whatever their image processor is set to."""

    def read_views(native: PreTrainedConfig, processor: ProcessorMixin) -> dict | None:
        settings = processor.image_processor
        cuts = settings.crop_to_patches if fit == "scale" else True
        if not cuts or settings.max_patches <= 1:
            return None
        tile = [settings.size["height"], settings.size["width"]]
        return {
            "type": "tiles",
            "layout": "dynamic",
            "fit": fit,
            "tile_size": tile,
            "view_size": tile,
            "min_tiles": settings.min_patches,
            "max_tiles": settings.max_patches,
        }

    return read_views


def dynamic_tiles(config: AnyVlmConfig, fit: str) -> list[tuple[bool, str]]:
    views = config.image_views or {"type": "resize"}
    if views["type"] == "resize":
        return []
    size = config.vision_tower_spec["image_size"]
    return [
        (views["type"] == "tiles" and views.get("layout") == "dynamic", "it cuts pictures into dynamic tiles"),
        (views.get("fit", "proportions") == fit, f"it chooses the arrangement of tiles by {fit}"),
        (views.get("thumbnail", True), "it adds the whole picture to the tiles"),
        (views.get("join", "concat") == "concat", "its tiles follow one another"),
        (list(views.get("tile_size", [])) == list(size), f"its tiles are of {size} pixels"),
    ]


def for_cut_views(image_processor) -> Any:
    """The image processor for views that are cut already."""
    image_processor = copy.deepcopy(image_processor)
    image_processor.crop_to_patches = False
    return image_processor


def for_whole_pictures(processor: AnyVlmProcessor, cuts: bool, class_name: str = "GotOcr2ImageProcessorPil") -> Any:
    """The image processor that cuts by itself, with the colours of ours; of the same class, if that one cuts."""
    ours, views = processor.image_processor, processor.image_views or {}
    height, width = processor.vision_tower_spec["image_size"]
    native_class = type(ours) if hasattr(ours, "crop_to_patches") else getattr(transformers, class_name)
    return native_class(
        size={"height": height, "width": width},
        min_patches=views.get("min_tiles", 1),
        max_patches=views.get("max_tiles", 1),
        crop_to_patches=cuts,
        **colours_of(ours),
    )
