"""Aya Vision (Dash et al. 2025) and Cohere2 Vision (Command A Vision): tiles, each announced in the text or ended by a
token, neighbouring features side by side, and a gated mlp."""

import math
from typing import Any

from transformers import AyaVisionConfig, Cohere2VisionConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .conditions import check_tokens_dropped, embedded_as_text, require_text, square_tower
from .dynamic_tiles import dynamic_tiles, for_cut_views, for_whole_pictures, read_dynamic_tiles
from .family import Misfit, NativeFamily, require
from .keys import Rename
from .llava import two_layer_rules
from .pieces import read_parts, tokens_of_a_view, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


def _gated_projector(native: AyaVisionConfig | Cohere2VisionConfig | None, norm_eps: float | None) -> dict[str, Any]:
    width = FREE
    if native is not None:
        # Half of it gates the other half.
        width = getattr(native, "alignment_intermediate_size", native.text_config.hidden_size) // 2
    return {
        "type": "pixel_shuffle",
        "scale_factor": FREE if native is None else native.downsample_factor,
        "hidden_features": width,
        "gated": True,
        "hidden_act": "silu",
        **({} if norm_eps is None else {"norm": "layer_norm", "norm_eps": norm_eps}),
    }


def _read_aya(native: AyaVisionConfig) -> dict[str, Any]:
    if not isinstance(native.vision_feature_layer, int):
        raise CompositionError("Aya Vision's projector is as wide as one layer of its tower: name one, not several.")
    return {
        **read_parts(native),
        "projector_config": _gated_projector(native, native.adapter_layer_norm_eps),
        "image_token_id": native.image_token_index,
        "vision_feature_layer": native.vision_feature_layer,
    }


def _write_aya(config: AnyVlmConfig) -> AyaVisionConfig:
    projector, layer = config.projector_config, config.vision_feature_layer
    expected = {**_gated_projector(None, 1.0), "norm_eps": FREE}
    require(
        *embedded_as_text(config),
        *dynamic_tiles(config, "proportions"),
        *square_tower(config, ((0, 0), (1, 0))),
        *same_projector(projector, expected),
        (layer is None or isinstance(layer, int), "it reads one layer of its tower"),
    )
    arguments = projector_arguments(projector)
    return AyaVisionConfig(
        **write_parts(config),
        image_token_index=config.image_token_id,
        downsample_factor=arguments["scale_factor"],
        adapter_layer_norm_eps=arguments["norm_eps"],
        alignment_intermediate_size=2 * arguments["hidden_features"][0],
        # The last hidden state itself; where that is another tensor (siglip's is normed), the logits will tell.
        vision_feature_layer=-1 if layer is None else layer,
        vision_feature_select_strategy="default" if config.vision_tower_spec["num_prefix_tokens"] else "full",
    )


def _read_aya_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {
        "image_processor": for_cut_views(native.image_processor),
        "image_token": native.image_token,
        "image_text": {
            "token": native.img_patch_token,
            "start": native.start_of_img_token,
            "end": native.end_of_img_token,
            "tile": native.tile_token + "_{index}{tokens}",
            "whole": native.tile_global_token + "{tokens}",
        },
    }


def _write_aya_processor(processor: AnyVlmProcessor, native: AyaVisionConfig, config: AnyVlmConfig) -> dict[str, Any]:
    text = processor.image_text or {}
    tile, whole = (
        text.get(key, "{tokens}").removesuffix(end)
        for key, end in (("tile", "_{index}{tokens}"), ("whole", "{tokens}"))
    )
    require_text(
        processor,
        {
            "token": text.get("token", processor.image_token),
            "start": text.get("start", ""),
            "end": text.get("end", ""),
            "tile": tile + "_{index}{tokens}",
            "whole": whole + "{tokens}",
        },
    )
    # Its processor counts tokens by pixels.
    edge = config.vision_tower_spec["image_size"][0]
    return {
        "image_processor": for_whole_pictures(processor, True),
        "image_token": processor.image_token,
        "img_patch_token": text["token"],
        "start_of_img_token": text["start"],
        "end_of_img_token": text["end"],
        "tile_token": tile,
        "tile_global_token": whole,
        "img_size": edge,
        "patch_size": edge // config.vision_tower_spec["grid"][0],
        "downsample_factor": native.downsample_factor,
    }


def _read_cohere2(native: Cohere2VisionConfig) -> dict[str, Any]:
    return {
        **read_parts(native),
        "projector_config": _gated_projector(native, None),
        "image_token_id": native.image_token_id,
    }


def _write_cohere2(config: AnyVlmConfig) -> Cohere2VisionConfig:
    require(
        *embedded_as_text(config),
        *dynamic_tiles(config, "scale"),
        *square_tower(config, ((0, 0),)),
        *same_projector(config.projector_config, _gated_projector(None, None)),
        (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
    )
    arguments = projector_arguments(config.projector_config)
    return Cohere2VisionConfig(
        **write_parts(config),
        image_token_id=config.image_token_id,
        downsample_factor=arguments["scale_factor"],
        alignment_intermediate_size=2 * arguments["hidden_features"][0],
    )


def _cohere2_text(tokenizer) -> dict[str, str]:
    view = "{tokens}" + tokenizer.img_line_break_token
    return {"start": tokenizer.boi_token, "end": tokenizer.eoi_token, "tile": view, "whole": view}


def _read_cohere2_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {
        "image_processor": for_cut_views(native.image_processor),
        "image_token": native.image_token,
        "image_text": _cohere2_text(native.tokenizer),
    }


def _write_cohere2_processor(processor: AnyVlmProcessor, native: Cohere2VisionConfig, config: AnyVlmConfig) -> dict:
    names = ("boi_token", "eoi_token", "img_line_break_token", "image_token")
    tokens = {name: getattr(processor.tokenizer, name, None) for name in names}
    if None in tokens.values():
        raise Misfit(f"its tokenizer names its tokens {', '.join(names)}")
    require_text(processor, _cohere2_text(processor.tokenizer), processor.image_token == tokens["image_token"])
    tokens_per_tile = tokens_of_a_view(config)
    image_processor = for_whole_pictures(processor, True, "Cohere2VisionImageProcessor")
    # Its processor takes the edge of a tile in tokens for this.
    image_processor.patch_size = math.isqrt(tokens_per_tile)
    return {"image_processor": image_processor}


FAMILIES = (
    NativeFamily(
        model_type="aya_vision",
        model_class="AyaVisionForConditionalGeneration",
        processor_class="AyaVisionProcessor",
        read_config=_read_aya,
        read_views=read_dynamic_tiles("proportions"),
        write_config=_write_aya,
        rules=lambda native: [
            *two_layer_rules(native),
            Rename("model.multi_modal_projector.layernorm.", "multi_modal_projector.norms.0."),
        ],
        read_processor=_read_aya_processor,
        write_processor=_write_aya_processor,
        adjust_spec=check_tokens_dropped,
    ),
    NativeFamily(
        model_type="cohere2_vision",
        model_class="Cohere2VisionForConditionalGeneration",
        processor_class="Cohere2VisionProcessor",
        read_config=_read_cohere2,
        read_views=read_dynamic_tiles("scale"),
        write_config=_write_cohere2,
        rules=two_layer_rules,
        read_processor=_read_cohere2_processor,
        write_processor=_write_cohere2_processor,
    ),
)
