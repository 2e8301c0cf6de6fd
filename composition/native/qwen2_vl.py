"""Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025): pictures of their own size, a tower that merges patches to
the language model's width, and positions with a time, a row and a column. Videos are not converted."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .conditions import plain_embedding, require_text
from .family import NativeFamily, require
from .keys import Rename
from .pieces import read_parts, write_parts


#: Merged patches along the edges of the picture that the tower is tried on; it takes any number.
_EXAMPLE = (8, 12)


def _read(native: PreTrainedConfig) -> dict[str, Any]:
    edge = native.vision_config.patch_size * native.vision_config.spatial_merge_size
    return {
        **read_parts(native),
        "projector_config": {"type": "identity"},
        "image_token_id": native.image_token_id,
        "image_size": tuple(edge * number for number in _EXAMPLE),
    }


def _writer(model_type: str) -> Callable[[AnyVlmConfig], PreTrainedConfig]:
    def write(config: AnyVlmConfig) -> PreTrainedConfig:
        types = config.vision_config.model_type, config.text_config.model_type
        require(
            *plain_embedding(config),
            (types[0] == f"{model_type}_vision", f"its tower is {model_type}_vision, not {types[0]}"),
            (types[1] == f"{model_type}_text", f"its language model is {model_type}_text, not {types[1]}"),
            (config.projector_config["type"] == "identity", "it has no projector but the tower's own merger"),
            (config.vision_feature_layer is None, "it reads the merged patches of its tower"),
        )
        return transformers.CONFIG_MAPPING[model_type](
            **write_parts(config),
            image_token_id=config.image_token_id,
        )

    return write


def _rules(native: PreTrainedConfig) -> list[Rename]:
    return [Rename("model.visual.", "vision_tower.")]


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {"image_token": native.image_token}


def _write_processor(processor: AnyVlmProcessor, native: PreTrainedConfig, config: AnyVlmConfig) -> dict[str, Any]:
    require_text(processor, {}, processor.image_token == "<|image_pad|>")
    # Videos are none of ours, but its processor insists on one for them.
    ours = processor.image_processor
    shared = {name: getattr(ours, name) for name in ("size", "patch_size", "temporal_patch_size", "merge_size")}
    return {"video_processor": transformers.Qwen2VLVideoProcessor(**shared)}


def _family(model_type: str, name: str) -> NativeFamily:
    return NativeFamily(
        model_type=model_type,
        model_class=f"{name}ForConditionalGeneration",
        processor_class=f"{name}Processor",
        read_config=_read,
        write_config=_writer(model_type),
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
        processor_needs=("torchvision",),
    )


FAMILIES = (_family("qwen2_vl", "Qwen2VL"), _family("qwen2_5_vl", "Qwen2_5_VL"))
