"""LLaVA-NeXT (Liu et al. 2024) and LLaVA-OneVision (Li et al. 2024): the whole picture and its tiles, which are merged into
one map whose rows end with a learned token."""

import copy
from collections.abc import Callable
from typing import Any

import transformers
from transformers import (
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PreTrainedConfig,
    ProcessorMixin,
)

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .colours import colours_of, for_views
from .conditions import check_tokens_dropped, embedded_as_text, require_text, square_tower
from .family import NativeFamily, require
from .keys import Rename
from .llava import read_two_layers, two_layer_rules, two_layers, write_llava_parts
from .projector_arguments import FREE, projector_arguments


def _read_config(native: PreTrainedConfig) -> dict[str, Any]:
    # The classes count tiles in pictures of the tower's own size.
    return {**read_two_layers(native), "image_size": (native.vision_config.image_size,) * 2}


def _read_views(native: PreTrainedConfig, processor: ProcessorMixin) -> dict[str, Any]:
    """As the model reads them; its image processor, which has settings of its own, must cut the same."""
    settings, edge = processor.image_processor, native.vision_config.image_size
    pinpoints = [list(pinpoint) for pinpoint in native.image_grid_pinpoints]
    sizes = [value for size in (settings.size, settings.crop_size or {}) for value in dict(size).values() if value]
    if (
        [list(pinpoint) for pinpoint in settings.image_grid_pinpoints] != pinpoints
        or set(sizes) != {edge}
        or not settings.do_resize
        or any(length % edge for pinpoint in pinpoints for length in pinpoint)
    ):
        raise CompositionError(
            f"{type(settings).__name__} must cut pictures by the model's image_grid_pinpoints, multiples of the tower's "
            f"{edge} pixels, and resize views to these. The model has {pinpoints}; it has {settings.image_grid_pinpoints}, "
            f"do_resize={settings.do_resize} and pictures of {sizes} pixels."
        )
    return {
        "type": "tiles",
        "layout": "anyres",
        "join": "spatial",
        "tile_size": [edge, edge],
        "view_size": [edge, edge],
        "pinpoints": pinpoints,
    }


def _read_onevision_views(native: LlavaOnevisionConfig, processor: ProcessorMixin) -> dict[str, Any]:
    most = native.vision_aspect_ratio.removeprefix("anyres_max_")
    if not most.isdecimal() or processor.vision_aspect_ratio != native.vision_aspect_ratio:
        raise CompositionError(
            f"vision_aspect_ratio must be anyres_max_ and a number, the same in model and processor; it is "
            f"{native.vision_aspect_ratio!r} and {processor.vision_aspect_ratio!r}."
        )
    return {
        **_read_views(native, processor),
        "max_merged_tiles": int(most),
        "several": "whole",
        "background": [int(colour * 255) for colour in processor.image_processor.image_mean],
    }


def _conditions(config: AnyVlmConfig) -> list[tuple[bool, str]]:
    views = config.image_views or {}
    size, grid = config.vision_tower_spec["image_size"], config.vision_tower_spec["grid"]
    edge = getattr(config.vision_config, "image_size", None)
    patch = getattr(config.vision_config, "patch_size", None)
    return [
        *two_layers(config, embedded_as_text, bias=FREE),
        *square_tower(config, ((0, 0), (1, 0))),
        (views.get("layout") == "anyres" and views.get("join") == "spatial", "it merges tiles of layout 'anyres'"),
        (list(views.get("tile_size", [])) == list(size), f"its tiles are of {size} pixels"),
        (size[0] == edge, f"its tower's pictures are of {edge} pixels"),
        (isinstance(patch, int) and grid[0] == size[0] // patch, "its tower gives one feature for each patch_size"),
    ]


def _arguments(config: AnyVlmConfig) -> dict[str, Any]:
    return {
        **write_llava_parts(config),
        "multimodal_projector_bias": projector_arguments(config.projector_config)["bias"],
        "vision_feature_select_strategy": "default" if config.vision_tower_spec["num_prefix_tokens"] else "full",
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in config.image_views["pinpoints"]],
    }


def _write_next(config: AnyVlmConfig) -> LlavaNextConfig:
    views = config.image_views or {}
    require(
        *_conditions(config),
        (views.get("max_merged_tiles") is None, "its map of tiles is not scaled down"),
        (views.get("several") is None, "it cuts every picture"),
    )
    return LlavaNextConfig(**_arguments(config))


def _write_onevision(config: AnyVlmConfig) -> LlavaOnevisionConfig:
    views = config.image_views or {}
    require(
        *_conditions(config),
        (views.get("max_merged_tiles") is not None, "it scales down a map of more tiles than max_merged_tiles"),
        (views.get("several") == "whole", "it cuts a picture only if it is its text's only one"),
    )
    arguments = _arguments(config)
    del arguments["image_seq_length"]
    return LlavaOnevisionConfig(
        **arguments,
        vision_aspect_ratio=f"anyres_max_{views['max_merged_tiles']}",
    )


def _rules(native: PreTrainedConfig) -> list[Rename]:
    return [*two_layer_rules(native), Rename("model.image_newline", "image_newline")]


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {
        "image_processor": for_views(native.image_processor, config.image_views["tile_size"]),
        "image_token": native.image_token,
    }


def _image_processor(processor: AnyVlmProcessor, image_processor_class: type, **settings) -> Any:
    return image_processor_class(
        image_grid_pinpoints=copy.deepcopy(processor.image_views["pinpoints"]),
        **colours_of(processor.image_processor),
        **settings,
    )


def _write_next_processor(processor: AnyVlmProcessor, native: LlavaNextConfig, config: AnyVlmConfig) -> dict[str, Any]:
    require_text(processor, {})
    height, width = processor.image_views["tile_size"]
    return {
        "image_processor": _image_processor(
            processor,
            LlavaNextImageProcessorPil,
            size={"shortest_edge": height},
            crop_size={"height": height, "width": width},
        ),
        "patch_size": config.vision_config.patch_size,
        # The native count adds these and takes one away for the token that the strategy drops.
        "num_additional_image_tokens": int(native.vision_feature_select_strategy == "default"),
        "vision_feature_select_strategy": native.vision_feature_select_strategy,
        "image_token": processor.image_token,
    }


def _write_onevision_processor(processor: AnyVlmProcessor, native: LlavaOnevisionConfig, config: AnyVlmConfig) -> dict:
    require_text(processor, {})
    height, width = processor.image_views["tile_size"]
    size = {"height": height, "width": width}
    background = [int(colour * 255) for colour in processor.image_processor.image_mean]
    require((processor.image_views["background"] == background, "it lays pictures on their mean colour"))
    colours = colours_of(processor.image_processor)
    return {
        "image_processor": _image_processor(processor, LlavaOnevisionImageProcessorPil, size=size),
        # Videos are none of ours, but its processor insists on one for them.
        "video_processor": transformers.LlavaOnevisionVideoProcessor(size=size, **colours),
        # For a token that the strategy drops it takes one away.
        "num_image_tokens": config.vision_tower_spec["grid"][0] ** 2
        + int(native.vision_feature_select_strategy == "default"),
        "vision_feature_select_strategy": native.vision_feature_select_strategy,
        "vision_aspect_ratio": native.vision_aspect_ratio,
        "image_token": processor.image_token,
    }


def _family(name: str, write_config: Callable, write_processor: Callable, **settings) -> NativeFamily:
    return NativeFamily(
        model_type=name,
        read_config=_read_config,
        write_config=write_config,
        rules=_rules,
        read_processor=_read_processor,
        write_processor=write_processor,
        adjust_spec=check_tokens_dropped,
        **settings,
    )


FAMILIES = (
    _family(
        "llava_next",
        _write_next,
        _write_next_processor,
        model_class="LlavaNextForConditionalGeneration",
        processor_class="LlavaNextProcessor",
        read_views=_read_views,
    ),
    _family(
        "llava_onevision",
        _write_onevision,
        _write_onevision_processor,
        model_class="LlavaOnevisionForConditionalGeneration",
        processor_class="LlavaOnevisionProcessor",
        read_views=_read_onevision_views,
        processor_needs=("torchvision",),
    ),
)
