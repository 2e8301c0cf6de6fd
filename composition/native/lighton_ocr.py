"""LightOnOCR (LightOn 2025): Mistral 3's tower and projector with another language model, its tokens in one run."""

from typing import Any

from transformers import LightOnOcrConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .family import NativeFamily, require
from .keys import Rename
from .mistral3 import merger_config, merger_rules, require_merger
from .pieces import example_size, read_parts, write_parts
from .projector_arguments import FREE


def _read_config(native: LightOnOcrConfig) -> dict[str, Any]:
    return {
        **read_parts(native),
        # Its processor makes edges multiples of a patch, and not of a square of patches.
        "projector_config": merger_config(native, bias=False, crop=True),
        "image_token_id": native.image_token_id,
        "image_size": example_size(native.vision_config, native.spatial_merge_size),
    }


def _write_config(config: AnyVlmConfig) -> LightOnOcrConfig:
    projector = require_merger(config, bias=False, crop=FREE)
    require((config.vision_feature_layer in (None, -1), "it reads the tower's last layer"))
    return LightOnOcrConfig(
        **write_parts(config),
        image_token_id=config.image_token_id,
        spatial_merge_size=projector["scale_factor"],
    )


def _write_processor(processor: AnyVlmProcessor, native: LightOnOcrConfig, config: AnyVlmConfig) -> dict[str, Any]:
    names = ("image_token", "image_break_token", "image_end_token")
    require(
        (processor.image_text is None, "nothing is written around the tokens of its pictures"),
        *(
            (isinstance(getattr(processor.tokenizer, name, None), str), f"its tokenizer has the special token {name}")
            for name in names
        ),
    )
    return {"patch_size": native.vision_config.patch_size, "spatial_merge_size": native.spatial_merge_size}


FAMILIES = (
    NativeFamily(
        model_type="lighton_ocr",
        model_class="LightOnOcrForConditionalGeneration",
        processor_class="LightOnOcrProcessor",
        read_config=_read_config,
        write_config=_write_config,
        rules=lambda native: [
            Rename("model.vision_encoder.", "vision_tower."),
            *merger_rules("model.vision_projection."),
        ],
        read_processor=lambda native, config: {"image_token": native.image_token},
        write_processor=_write_processor,
    ),
)
