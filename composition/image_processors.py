"""Give the tower an image processor: its own patches where it takes them, else pictures of one size."""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from ..configuration.image_tokens import image_grids
from ..modeling.picture_inputs import PICTURE_INPUTS, PictureInputs
from ..modeling.vision_towers import call_vision_tower, read_features
from ..processing.image_outputs import image_outputs
from .errors import CompositionError
from .parts import PartSource, pretrained_name
from .tower_inputs import patch_edge, picture_inputs


logger = logging.getLogger(__name__)


def load_image_processor(
    image_processor: BaseImageProcessor | str | None,
    vision: PartSource,
    vision_tower: nn.Module,
    image_size: int | tuple[int, int] | None,
    trust_remote_code: bool,
    plain: bool = False,
) -> tuple[BaseImageProcessor, tuple[int, int]]:
    """The image processor given, the tower's own, or a plain one; and the size `(height, width)` it makes.

    A tower that takes patches keeps a processor that makes them, and with it the pictures' own sizes and proportions;
    then the size is an example. For other towers every picture must take the same number of tokens, so a processor
    that keeps a picture's proportions is set to resize to one size. `image_size` sets one size for any tower, and `plain`
    asks for whole pictures of one size whatever the tower takes.

    Raises:
        CompositionError: the processor given cannot be brought to one size, or cannot be saved.
    """
    config = vision_tower.config
    stated = _timm_input(vision_tower)
    stated_size = stated.pop("size", None)
    row = PICTURE_INPUTS[picture_inputs(vision_tower)]
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    processor = image_processor if isinstance(image_processor, BaseImageProcessor) else None
    source = image_processor if isinstance(image_processor, (str, os.PathLike)) else pretrained_name(vision)
    if processor is None and source is not None:
        processor = _load(source, image_processor is not None, trust_remote_code, warn=not stated)
    if processor is not None and not _can_be_saved(processor):
        if image_processor is not None:
            raise CompositionError(
                f"{type(processor).__name__} cannot be saved and loaded with the model. Leave image_processor out, and one "
                "is made from what the tower states about its pictures; or pass one such as ViTImageProcessor."
            )
        processor = None
    if processor is None and size is None and row.from_processor and not plain:
        processor = _family_processor(config)
    default_size = size or stated_size or _default_size(config, row)
    if processor is None:
        return _plain_processor(default_size, {**stated, **_stated_settings(source)}), default_size
    processor = copy.deepcopy(processor)
    if row.from_processor and size is None and not plain and _makes_patches(processor, row):
        return processor, _example_size(default_size, config)
    measured = output_size(processor)
    if measured is not None and size in (None, measured):
        return processor, measured
    wanted = size or config_size(config) or _processor_size(processor) or default_size
    _fix_size(processor, wanted)
    measured = output_size(processor)
    if measured != wanted and image_processor is None:
        # The tower's own makes patches or clips; a plain one with its colours makes pictures, which the model takes too.
        processor = _plain_processor(wanted, _colours(processor))
        measured = wanted
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


def _load(source: str, required: bool, trust_remote_code: bool, warn: bool) -> BaseImageProcessor | None:
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if required:
            raise
        if not warn:
            return None
        logger.warning(
            "No image processor could be loaded with the vision tower (%s). A plain one is used: resize, scale to 0-1, "
            "normalise with the mean and deviation that its files state, or else 0.5. If the tower was trained with "
            "another, pass image_processor=….",
            str(error).strip().splitlines()[0],
        )
        return None


def _family_processor(config: PreTrainedConfig) -> BaseImageProcessor | None:
    """The image processor that transformers lists for the model family a tower's config belongs to, with the tower's
    patch sizes; `None` if there is none that works without torchvision where that is not installed."""
    package = type(config).__module__.split(".")[-2]
    backend = "torchvision" if is_torchvision_available() else "pil"
    for model_type, names in IMAGE_PROCESSOR_MAPPING_NAMES.items():
        name = names.get(backend) if isinstance(names, dict) else None
        if model_type_to_module_name(model_type) != package or name is None:
            continue
        processor_class = getattr(transformers, name)
        stated = {
            key: getattr(config, other)
            for key, other in _PATCH_SETTINGS.items()
            if isinstance(getattr(config, other, None), int) and hasattr(processor_class, key)
        }
        processor = processor_class(**stated)
        edge = config_size(config)
        if edge and set(dict(processor.size or {})) == {"longest_edge"}:
            processor.size = {
                "longest_edge": max(edge)
            }  # pixtral's, which would make larger ones than the tower takes
        return processor
    return None


#: Name in image processors -> name in configs of towers.
_PATCH_SETTINGS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "pooling_kernel_size": "pooling_kernel_size",
}

#: Settings of image processors by which they make several views of one picture.
_VIEWS = ("slice_mode", "do_image_splitting", "do_pan_and_scan", "crop_to_patches")


def _makes_patches(processor: BaseImageProcessor, row: PictureInputs) -> bool:
    """Whether the processor gives the tower one grid of patches for each picture, as the tower takes them.

    Several views of one picture are switched off where the processor has a setting for it.
    """
    for key in _VIEWS:
        if getattr(processor, key, False):
            setattr(processor, key, False)
    pictures = [Image.fromarray(np.zeros((size, 96, 3), dtype=np.uint8)) for size in (64, 160)]
    try:
        outputs = image_outputs(processor, pictures, return_tensors="pt")
    except Exception as error:  # noqa: BLE001 - whatever fails there, another processor is looked for
        logger.warning("%s does not take a plain picture (%s).", type(processor).__name__, error)
        return False
    keys = row.from_processor.values()
    return all(key in outputs for key in keys) and all(
        len(outputs[key]) == len(pictures) for key in keys if key != "pixel_values"
    )


def fits_tower(
    processor: BaseImageProcessor, vision_tower: nn.Module, spec: dict, layer: int | Sequence[int] | None
) -> bool:
    """Whether the tower takes what a processor of patches makes of pictures of several sizes, and gives as many
    features as were counted. Warns with the reason if not."""
    if not PICTURE_INPUTS[spec["inputs"]].from_processor:
        return True
    pictures = [Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in ((160, 96), (96, 224))]
    outputs = image_outputs(processor, pictures, return_tensors="pt")
    keys = [key for key in PICTURE_INPUTS[spec["inputs"]].from_processor.values() if key in outputs]
    if not keys:
        return True
    device = next(vision_tower.parameters()).device
    tensors = {key: outputs[key].to(device) for key in keys}
    pixel_values = outputs["pixel_values"].to(device, vision_tower.dtype)
    try:
        with torch.no_grad():
            raw_features = call_vision_tower(vision_tower, spec, pixel_values, layer, tensors)
            read_features(raw_features, spec, image_grids(spec, pixel_values, tensors))
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is passed on
        logger.warning(
            "%s does not take what %s makes (%s: %s). Pictures of one size are used instead, which it takes; pass "
            "image_processor=… with its own for pictures of their own size.",
            type(vision_tower).__name__,
            type(processor).__name__,
            type(error).__name__,
            error,
        )
        return False
    return True


def _can_be_saved(processor: BaseImageProcessor) -> bool:
    """Whether a processor can be made again of what it writes. transformers' wrapper of timm's transforms cannot, and
    needs torchvision besides."""
    try:
        type(processor).from_dict(processor.to_dict())
    except TypeError:
        return False
    return True


def _timm_input(vision_tower: nn.Module) -> dict:
    """Settings of a plain processor for a tower that wraps a timm model, and the `size` of its pictures; else empty.

    timm describes the pictures of a model in a `pretrained_cfg`. That of the checkpoint is in the tower's config; the
    model's own is of the weights that timm has for its architecture. timm crops the middle of a picture to evaluate;
    here the whole picture is shown.
    """
    described = [getattr(vision_tower.config, "pretrained_cfg", None)]
    described += [getattr(child, "pretrained_cfg", None) for child in vision_tower.children()]
    needed = {"input_size", "mean", "std"}
    described = next((found for found in described if isinstance(found, Mapping) and needed <= found.keys()), None)
    if described is None:
        return {}
    resampling = Image.Resampling.__members__
    model_args = getattr(vision_tower.config, "model_args", None) or {}
    size = model_args.get("img_size") or tuple(described["input_size"])[-2:]
    return {
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "image_mean": list(described["mean"]),
        "image_std": list(described["std"]),
        "resample": resampling.get(str(described.get("interpolation")).upper(), Image.Resampling.BILINEAR),
    }


def _stated_settings(source: str | os.PathLike | None) -> dict:
    """Mean and deviation of the colours as the files of a processor that cannot be loaded here state them."""
    if source is None:
        return {}
    try:
        stated, _ = BaseImageProcessor.get_image_processor_dict(source)
    except (OSError, ValueError):
        return {}
    return {key: stated[key] for key in ("image_mean", "image_std", "do_normalize") if key in stated}


def _colours(processor: BaseImageProcessor) -> dict:
    keys = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample")
    found = {key: getattr(processor, key, None) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def plain_processor(processor: BaseImageProcessor, size: tuple[int, int]) -> BaseImageProcessor:
    """One that makes whole pictures of the colours that another makes."""
    return _plain_processor(size, _colours(processor))


def _plain_processor(size: tuple[int, int], settings: dict) -> BaseImageProcessor:
    # Pillow's version of ViTImageProcessor; it is saved under that name, and either version loads it. Imported here
    # because transformers takes a while to load it.
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, **settings)


def _default_size(config: PreTrainedConfig, row: PictureInputs) -> tuple[int, int]:
    height, width = config_size(config) or (224, 224)
    if row.is_patches:
        edge = patch_edge(config)
        return max(1, height // edge) * edge, max(1, width // edge) * edge
    return height, width


def _example_size(size: tuple[int, int], config: PreTrainedConfig, most: int = 448) -> tuple[int, int]:
    """The size of a picture with which a tower of any size is tried; a large one would only take long."""
    edge = patch_edge(config)
    return tuple(min(length, max(most // edge, 1) * edge) for length in size)


def config_size(config: PreTrainedConfig) -> tuple[int, int] | None:
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


def output_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Height and width of what the processor makes of pictures of any proportions; `None` if they differ."""
    sizes: set[Any] = set()
    for height, width in ((61, 97), (160, 40), (300, 400)):
        picture = Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))
        try:
            shape = np.shape(processor(picture, return_tensors="np")["pixel_values"])
        except (ValueError, TypeError, KeyError, AttributeError):  # the last from ConvNext's, given a height and width
            return None
        if len(shape) != 4 or shape[0] != 1:
            return None
        sizes.add(shape[-2:])
    return tuple(int(edge) for edge in sizes.pop()) if len(sizes) == 1 else None
