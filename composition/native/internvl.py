"""InternVL 3 (Zhu et al. 2025): tiles and the whole picture, four neighbouring features side by side, a normed mlp."""

from typing import Any

import transformers
from transformers import InternVLConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .conditions import check_tokens_dropped, embedded_as_text, require_text, square_tower
from .dynamic_tiles import dynamic_tiles, for_cut_views, for_whole_pictures, read_dynamic_tiles
from .family import NativeFamily, require
from .keys import Rename
from .llava import two_layer_rules
from .pieces import read_parts, tokens_of_a_view, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


def _projector(native: InternVLConfig | None) -> dict[str, Any]:
    return {
        "type": "pixel_shuffle",
        "norm": "layer_norm",
        "scale_factor": FREE if native is None else round(1 / native.downsample_ratio),
        "hidden_act": FREE if native is None else native.projector_hidden_act,
    }


def _read(native: InternVLConfig) -> dict[str, Any]:
    if not isinstance(native.vision_feature_layer, int):
        raise CompositionError("InternVL reads one layer of its tower: name one, not several.")
    return {
        **read_parts(native),
        "projector_config": _projector(native),
        "image_token_id": native.image_token_id,
        # -1 is the last hidden state, with the norm that may follow the last layer.
        "vision_feature_layer": None if native.vision_feature_layer == -1 else native.vision_feature_layer,
        "image_size": tuple(native.vision_config.image_size),
    }


def _write(config: AnyVlmConfig) -> InternVLConfig:
    projector, layer = config.projector_config, config.vision_feature_layer
    require(
        *embedded_as_text(config),
        *dynamic_tiles(config, "proportions"),
        *square_tower(config, ((1, 0),)),
        *same_projector(projector, _projector(None)),
        (config.vision_config.model_type == "internvl_vision", "its tower is internvl_vision"),
        (layer is None or isinstance(layer, int), "it reads one layer of its tower"),
    )
    arguments = projector_arguments(projector)
    factor = arguments["scale_factor"]
    require((factor & (factor - 1) == 0, f"its scale_factor is a power of two, not {factor}"))
    last = config.vision_config.num_hidden_layers
    return InternVLConfig(
        **write_parts(config),
        image_token_id=config.image_token_id,
        image_seq_length=tokens_of_a_view(config),
        downsample_ratio=1 / factor,
        projector_hidden_act=arguments["hidden_act"],
        vision_feature_layer=-1 if layer is None else last if layer == -1 else layer,
        vision_feature_select_strategy="default",
    )


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {
        "image_processor": for_cut_views(native.image_processor),
        "image_token": native.image_token,
        "image_text": {"start": native.start_image_token, "end": native.end_image_token},
    }


def _write_processor(processor: AnyVlmProcessor, native: InternVLConfig, config: AnyVlmConfig) -> dict:
    tokens = [getattr(processor.tokenizer, f"{name}_image_token", None) for name in ("start", "end", "context")]
    require_text(
        processor, {"start": tokens[0], "end": tokens[1]}, processor.image_token == tokens[2] and None not in tokens
    )
    image_processor = for_whole_pictures(processor, False)
    return {
        "image_processor": image_processor,
        # Videos are none of ours, but its processor insists on one for them.
        "video_processor": transformers.InternVLVideoProcessor(
            size=dict(image_processor.size),
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
        ),
        "image_seq_length": native.image_seq_length,
    }


FAMILIES = (
    NativeFamily(
        model_type="internvl",
        model_class="InternVLForConditionalGeneration",
        processor_class="InternVLProcessor",
        read_config=_read,
        read_views=read_dynamic_tiles("proportions"),
        write_config=_write,
        rules=lambda native: [
            *two_layer_rules(native),
            Rename("model.multi_modal_projector.layer_norm.", "multi_modal_projector.norms.0."),
        ],
        read_processor=_read_processor,
        write_processor=_write_processor,
        adjust_spec=check_tokens_dropped,
        processor_needs=("torchvision",),
    ),
)
