"""MiniCPM-V 4.6 (Yao et al. 2024 and after): a whole picture and slices of it, of any proportions, in one strip; the tower
merges squares of patches, and the projector squares of those."""

import copy
from typing import Any

import transformers
from PIL import Image
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ImageProcessorPil, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .colours import colours_of
from .conditions import embedded_as_text
from .family import Misfit, NativeFamily, require
from .keys import Rename
from .pieces import example_size, read_parts, write_parts
from .projector_arguments import same_projector


#: Tokens around pictures, as the native processor has them from its tokenizer.
_NAMED = (
    "image_start_token",
    "image_end_token",
    "slice_start_token",
    "slice_end_token",
    "image_id_start_token",
    "image_id_end_token",
)

#: Patches along each edge of a token, in the two modes of the native class.
_PATCHES = {"16x": 4, "4x": 2}


def _rounding_unit(image_processor: Any) -> int:
    """Pixels of which the edges of its views are multiples: those of a token, but older versions of transformers take mode
    "16x" for that whatever the mode is. A picture this narrow becomes one of them wide."""
    narrow = image_processor([Image.new("RGB", (1, 20000))], slice_mode=False, return_tensors="np")
    return int(narrow["target_sizes"].min()) * image_processor.patch_size


def _projector(width: int) -> dict[str, Any]:
    return {
        "type": "pixel_shuffle",
        "scale_factor": 2,
        "norm": "layer_norm",
        "norm_eps": 1e-6,
        "num_layers": 2,
        "hidden_features": 4 * width,
        "hidden_act": "gelu",
    }


def _read_config(native: MiniCPMV4_6Config) -> dict[str, Any]:
    if native.merger_times != 1 or tuple(native.merge_kernel_size) != (2, 2):
        raise CompositionError(
            f"Its projector merges squares of {tuple(native.merge_kernel_size)} features {native.merger_times} times; once "
            "and of (2, 2) is what can be converted."
        )
    if native.downsample_mode not in _PATCHES:
        raise CompositionError(
            f"Unknown downsample_mode {native.downsample_mode!r}. Set it to one of: {', '.join(_PATCHES)}."
        )
    return {
        **read_parts(native),
        "projector_config": _projector(native.vision_config.hidden_size),
        "image_token_id": native.image_token_id,
        "image_size": example_size(native.vision_config, _PATCHES["16x"]),
    }


def _without_merging(native: MiniCPMV4_6Config, spec: dict[str, Any]) -> dict[str, Any]:
    """In mode "4x" the native class calls the tower without the merging of patches that it was measured with."""
    if native.downsample_mode == "16x":
        return spec
    rows, columns = (edge // spec["patch"]["size"] for edge in spec["image_size"])
    call_kwargs = {**spec["call_kwargs"], "use_vit_merger": False}
    return {**spec, "call_kwargs": call_kwargs, "merge_size": 1, "grid": [rows, columns]}


def _write_config(config: AnyVlmConfig) -> MiniCPMV4_6Config:
    spec, views = config.vision_tower_spec, config.image_views or {}
    require(
        *embedded_as_text(config),
        (config.vision_config.model_type == "minicpmv4_6_vision", "its tower is minicpmv4_6_vision"),
        (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
        *same_projector(config.projector_config, _projector(spec["hidden_size"])),
        (views.get("type") == "slices", "it cuts pictures into slices"),
    )
    mode = "16x" if spec["merge_size"] == 2 else "4x"
    unit = _rounding_unit(
        MiniCPMV4_6ImageProcessorPil(patch_size=config.vision_config.patch_size, downsample_mode=mode)
    )
    require((views.get("unit") == unit, f"the sizes of its slices are multiples of {unit} pixels"))
    return MiniCPMV4_6Config(
        **write_parts(config),
        insert_layer_id=config.vision_config.insert_layer_id,
        image_token_id=config.image_token_id,
        downsample_mode=mode,
    )


def _rules(native: MiniCPMV4_6Config) -> list[Rename]:
    merger, ours = "model.merger.mlp.0.", "multi_modal_projector."
    return [
        Rename("model.vision_tower.", "vision_tower."),
        Rename(f"{merger}pre_norm.", f"{ours}norms.0."),
        Rename(f"{merger}linear_1.", f"{ours}layers.0."),
        Rename(f"{merger}linear_2.", f"{ours}layers.1."),
    ]


def _read_views(native: MiniCPMV4_6Config, processor: ProcessorMixin) -> dict[str, Any]:
    settings, patch = processor.image_processor, native.vision_config.patch_size
    found = settings.do_resize, settings.downsample_mode, settings.patch_size
    if found != (True, native.downsample_mode, patch):
        raise CompositionError(
            f"{type(settings).__name__} has do_resize, downsample_mode and patch_size {found}; the model needs "
            f"{(True, native.downsample_mode, patch)}."
        )
    return {
        "type": "slices",
        "slice_size": settings.scale_resolution,
        "unit": _rounding_unit(settings),
        "max_slices": settings.max_slice_nums if settings.slice_mode else 1,
    }


def _text(tokens: dict[str, str], use_image_id: bool) -> dict[str, str]:
    text = {
        "whole": f"{tokens['image_start_token']}{{tokens}}{tokens['image_end_token']}",
        "tile": f"{tokens['slice_start_token']}{{tokens}}{tokens['slice_end_token']}",
        "row_separator": "\n",
    }
    if use_image_id:
        text["prefix"] = f"{tokens['image_id_start_token']}{{number}}{tokens['image_id_end_token']}"
    return text


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    image_processor = copy.deepcopy(native.image_processor)
    image_processor.slice_mode = False  # its views are cut already
    tokens = {name: getattr(native, name) for name in _NAMED}
    return {
        "image_processor": image_processor,
        "image_token": native.image_token,
        "image_text": _text(tokens, bool(native.default_use_image_id)),
    }


def _write_processor(processor: AnyVlmProcessor, native: MiniCPMV4_6Config, config: AnyVlmConfig) -> dict[str, Any]:
    named = processor.tokenizer.special_tokens_map
    missing = [name for name in ("image_token", "video_token", *_NAMED) if name not in named]
    if missing:
        raise Misfit(f"its tokenizer names its {', '.join(missing)}")
    text, numbered = processor.image_text or {}, "prefix" in (processor.image_text or {})
    require(
        (text == _text(named, numbered), "around pictures and slices its processor writes the tokens named for it")
    )
    views = processor.image_views
    settings = {
        "scale_resolution": views["slice_size"],
        "max_slice_nums": views["max_slices"],
        "slice_mode": views["max_slices"] > 1,
        "patch_size": config.vision_config.patch_size,
        "downsample_mode": native.downsample_mode,
        "use_image_id": numbered,
    }
    colours = colours_of(processor.image_processor)
    return {
        "image_processor": MiniCPMV4_6ImageProcessorPil(**settings, **colours),
        # Videos are none of ours, but its processor insists on one for them.
        "video_processor": transformers.MiniCPMV4_6VideoProcessor(**settings, **colours),
    }


FAMILIES = (
    NativeFamily(
        model_type="minicpmv4_6",
        model_class="MiniCPMV4_6ForConditionalGeneration",
        processor_class="MiniCPMV4_6Processor",
        read_config=_read_config,
        read_views=_read_views,
        adjust_spec=_without_merging,
        write_config=_write_config,
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
        processor_needs=("torchvision",),
    ),
)
