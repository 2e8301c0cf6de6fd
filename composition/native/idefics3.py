"""Idefics3 (Laurençon et al. 2024) and SmolVLM (Marafioti et al. 2025): a grid of tiles and the whole picture, named by row
and column in the text; neighbouring features side by side, and one matrix."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import (
    Idefics3ImageProcessorPil,
    PreTrainedConfig,
    ProcessorMixin,
    SmolVLMImageProcessorPil,
)

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .colours import colours_of, for_views
from .conditions import embedded_as_text, require_text, square_tower
from .family import NativeFamily, require
from .keys import Rename
from .pieces import read_parts, tokens_of_a_view, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


#: Written around the views of a picture; these tokens are fixed in the processors' code.
_TEXT = {
    "tile": "<fake_token_around_image><row_{row}_col_{column}>{tokens}",
    "row_end": "\n",
    "whole": "\n<fake_token_around_image><global-img>{tokens}<fake_token_around_image>",
    "whole_alone": "<fake_token_around_image><global-img>{tokens}<fake_token_around_image>",
}


def _projector(scale_factor: Any) -> dict[str, Any]:
    return {"type": "pixel_shuffle", "scale_factor": scale_factor, "num_layers": 1, "bias": False, "hidden_act": FREE}


def _read(native: PreTrainedConfig) -> dict[str, Any]:
    projector = _projector(native.scale_factor)
    del projector["hidden_act"]  # of one layer there is none
    return {
        **read_parts(native),
        "projector_config": projector,
        "image_token_id": native.image_token_id,
        "image_size": (native.vision_config.image_size,) * 2,
    }


def _read_views(native: PreTrainedConfig, processor: ProcessorMixin) -> dict[str, Any]:
    settings = processor.image_processor
    edge, longest = settings.max_image_size["longest_edge"], settings.size["longest_edge"]
    if not settings.do_resize or longest is None or edge != native.vision_config.image_size:
        raise CompositionError(
            f"{type(settings).__name__} must resize pictures to a longest_edge and cut tiles as large as the tower's "
            f"pictures ({native.vision_config.image_size} pixels): it has do_resize={settings.do_resize}, "
            f"size={settings.size}, max_image_size={settings.max_image_size}."
        )
    return {
        "type": "tiles",
        "layout": "split",
        "tile_size": [edge, edge],
        "view_size": [edge, edge],
        "longest_edge": longest,
        "cut": bool(settings.do_image_splitting),
    }


def _writer(config_class: str, vision_type: str) -> Callable[[AnyVlmConfig], PreTrainedConfig]:
    def write(config: AnyVlmConfig) -> PreTrainedConfig:
        views = config.image_views or {}
        size = list(config.vision_tower_spec["image_size"])
        require(
            *embedded_as_text(config),
            *square_tower(config, ((0, 0),)),
            *same_projector(config.projector_config, _projector(FREE)),
            (views.get("layout") == "split", "it cuts pictures into a grid of tiles, layout 'split'"),
            (list(views.get("tile_size", [])) == size, f"its tiles are of {size} pixels"),
            (config.vision_config.model_type == vision_type, f"its tower is {vision_type}"),
            (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
        )
        return getattr(transformers, config_class)(
            **write_parts(config),
            image_token_id=config.image_token_id,
            scale_factor=projector_arguments(config.projector_config)["scale_factor"],
            pad_token_id=config.text_config.pad_token_id,
        )

    return write


def _rules(native: PreTrainedConfig) -> list[Rename]:
    return [
        Rename("model.vision_model.", "vision_tower."),
        Rename("model.connector.modality_projection.proj.", "multi_modal_projector.layers.0."),
    ]


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {
        # The native one hands views on in a list for each text.
        "image_processor": for_views(native.image_processor, config.image_views["tile_size"]),
        "image_token": native.image_token,
        "image_text": _TEXT,
    }


def _write_processor(processor: AnyVlmProcessor, config: AnyVlmConfig, image_processor_class: type) -> dict[str, Any]:
    require_text(processor, _TEXT, processor.image_token == "<image>")
    views = processor.image_views
    return {
        "image_processor": image_processor_class(
            size={"longest_edge": views["longest_edge"]},
            max_image_size={"longest_edge": views["tile_size"][0]},
            do_image_splitting=views.get("cut", True),
            **colours_of(processor.image_processor),
        ),
        "image_seq_len": tokens_of_a_view(config),
    }


def _write_smolvlm_processor(processor: AnyVlmProcessor, native: PreTrainedConfig, config: AnyVlmConfig) -> dict:
    # Videos are none of ours, but its processor insists on one for them.
    size = {"longest_edge": config.image_views["tile_size"][0]}
    return {
        **_write_processor(processor, config, SmolVLMImageProcessorPil),
        "video_processor": transformers.SmolVLMVideoProcessor(size=size, max_image_size=size),
    }


FAMILIES = (
    NativeFamily(
        model_type="idefics3",
        model_class="Idefics3ForConditionalGeneration",
        processor_class="Idefics3Processor",
        read_config=_read,
        read_views=_read_views,
        write_config=_writer("Idefics3Config", "idefics3_vision"),
        rules=_rules,
        read_processor=_read_processor,
        write_processor=lambda processor, native, config: _write_processor(
            processor, config, Idefics3ImageProcessorPil
        ),
        base_prefix="model.text_model.",
    ),
    NativeFamily(
        model_type="smolvlm",
        model_class="SmolVLMForConditionalGeneration",
        processor_class="SmolVLMProcessor",
        read_config=_read,
        read_views=_read_views,
        write_config=_writer("SmolVLMConfig", "smolvlm_vision"),
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_smolvlm_processor,
        base_prefix="model.text_model.",
        processor_needs=("torchvision", "num2words"),
    ),
)
