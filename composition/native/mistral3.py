"""Mistral 3 (Mistral AI 2025): Pixtral's tower for pictures of any size, squares of patches merged, rows of tokens each with
a token at its end."""

import copy
from typing import Any

from transformers import Mistral3Config, PreTrainedConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .conditions import plain_embedding, sized_tower
from .family import NativeFamily, require
from .keys import Rename
from .pieces import example_size, read_parts, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


_MERGER = {"type": "patch_merger", "channel_order": "channels_first", "norm": "rms_norm", "num_layers": 2}


def merger_config(native: PreTrainedConfig, **settings) -> dict[str, Any]:
    eps = native.text_config.rms_norm_eps
    return {**_MERGER, "scale_factor": native.spatial_merge_size, "norm_eps": eps, **settings}


def merger_rules(native_prefix: str) -> list[Rename]:
    """The projector, from where the native model has it."""
    ours = "multi_modal_projector."
    return [
        Rename(f"{native_prefix}norm.", f"{ours}features_norm."),
        Rename(f"{native_prefix}patch_merger.merging_layer.", f"{ours}merging_layer."),
        Rename(f"{native_prefix}linear_1.", f"{ours}layers.0."),
        Rename(f"{native_prefix}linear_2.", f"{ours}layers.1."),
    ]


def require_merger(config: AnyVlmConfig, **expected) -> dict[str, Any]:
    """All arguments of the projector, of a model that such a native class can be.

    Args:
        expected: Arguments beyond those of `merger_config`.

    Raises:
        Misfit: with each reason why it cannot.
    """
    eps, width = (getattr(config.text_config, name, None) for name in ("rms_norm_eps", "hidden_size"))
    projector = {**_MERGER, "scale_factor": FREE, "norm_eps": eps, "hidden_features": [width], **expected}
    require(
        *plain_embedding(config),
        *same_projector(config.projector_config, projector),
        *sized_tower(config.vision_tower_spec),
    )
    return projector_arguments(config.projector_config)


def pictures_in_units(image_processor: Any, unit: int) -> Any:
    """A copy of Pixtral's image processor that makes each edge of a picture a multiple of `unit` pixels."""
    image_processor = copy.deepcopy(image_processor)
    image_processor.patch_size = {"height": unit, "width": unit}
    return image_processor


def _read_config(native: Mistral3Config) -> dict[str, Any]:
    return {
        **read_parts(native),
        "projector_config": merger_config(
            native, hidden_act=native.projector_hidden_act, bias=native.multimodal_projector_bias
        ),
        "image_token_id": native.image_token_index,
        "vision_feature_layer": native.vision_feature_layer,
        "image_size": example_size(native.vision_config, native.spatial_merge_size),
    }


def _write_config(config: AnyVlmConfig) -> Mistral3Config:
    projector = require_merger(config, hidden_act=FREE, bias=FREE)
    layer = config.vision_feature_layer
    require((layer is None or isinstance(layer, int), "it reads one layer of the tower"))
    return Mistral3Config(
        **write_parts(config),
        image_token_index=config.image_token_id,
        projector_hidden_act=projector["hidden_act"],
        multimodal_projector_bias=projector["bias"],
        spatial_merge_size=projector["scale_factor"],
        vision_feature_layer=-1 if layer is None else layer,
    )


def read_pixtral_processor(native, config: AnyVlmConfig) -> dict[str, Any]:
    """`PixtralProcessor` tells its image processor at every call of which edge a picture must be a multiple."""
    return {
        "image_processor": pictures_in_units(native.image_processor, native.patch_size * native.spatial_merge_size),
        "image_token": native.image_token,
        "image_text": {"line_end": native.image_break_token, "last_line_end": native.image_end_token},
    }


def write_pixtral_processor(processor: AnyVlmProcessor, native, config: AnyVlmConfig) -> dict[str, Any]:
    text = processor.image_text or {}
    require(
        (set(text) == {"line_end", "last_line_end"}, "its pictures are rows of tokens, each with a token at its end")
    )
    patch = native.vision_config.patch_size
    return {
        "image_processor": pictures_in_units(processor.image_processor, patch),
        "patch_size": patch,
        "spatial_merge_size": getattr(native, "spatial_merge_size", 1),
        "image_token": processor.image_token,
        "image_break_token": text["line_end"],
        "image_end_token": text["last_line_end"],
    }


FAMILIES = (
    NativeFamily(
        model_type="mistral3",
        model_class="Mistral3ForConditionalGeneration",
        processor_class="PixtralProcessor",
        processor_needs=("torchvision",),
        read_config=_read_config,
        write_config=_write_config,
        rules=lambda native: [
            Rename("model.vision_tower.", "vision_tower."),
            *merger_rules("model.multi_modal_projector."),
        ],
        read_processor=read_pixtral_processor,
        write_processor=write_pixtral_processor,
    ),
)
