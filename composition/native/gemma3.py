"""Gemma 3 (Gemma Team 2025): means of neighbouring features, normed, one matrix; the tokens of a picture see one another.

Its processor cuts long pictures into crops ("pan and scan") only where a call asks for it, so imported models show pictures
whole until `pan_and_scan` is called.
"""

import copy
import math
from typing import Any

from transformers import Gemma3Config, Gemma3TextConfig, PreTrainedConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...configuration.image_tokens import num_tokens_of_grid
from ...configuration.image_views import check_image_views
from ...modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ...processing.processing_anyvlm import AnyVlmProcessor
from .conditions import require_text, square_tower
from .family import NativeFamily, require
from .keys import Rename, Rule, transposed
from .pieces import text_part, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


def pan_and_scan(
    model: AnyVlmForConditionalGeneration,
    processor: AnyVlmProcessor,
    min_crop_size: int = 256,
    max_crops: int = 4,
    min_ratio: float = 1.2,
) -> None:
    """Let an imported model show long pictures whole and in crops, as the native processor does with
    `do_pan_and_scan=True`; the arguments are its `pan_and_scan_…`, with its defaults. Model and processor are changed."""
    views = {
        "type": "tiles",
        "layout": "pan_and_scan",
        "view_size": list(model.config.vision_tower_spec["image_size"]),
        "min_crop_size": min_crop_size,
        "max_tiles": max_crops,
        "min_ratio": min_ratio,
    }
    check_image_views(views)
    model.config.image_views, processor.image_views = views, dict(views)
    processor.image_text = pan_and_scan_text(processor.tokenizer)


def picture_text(tokenizer) -> dict[str, str]:
    """What stands around the tokens of a picture; the names of the tokens are the tokenizer's."""
    return {
        "token": tokenizer.image_token,
        "start": f"\n\n{tokenizer.boi_token}",
        "end": f"{tokenizer.eoi_token}\n\n",
    }


def pan_and_scan_text(tokenizer) -> dict[str, str]:
    """What stands around and between a picture and its crops."""
    view = f"\n\n{tokenizer.boi_token}{{tokens}}{tokenizer.eoi_token}\n\n"
    return {
        "token": tokenizer.image_token,
        "whole": f"Here is the original image {view} and here are some crops to help you see better ",
        "whole_alone": view,
        "tile": view,
        "tile_separator": " ",
        "row_separator": " ",
    }


def _projector(ratio: Any, norm_eps: Any) -> dict[str, Any]:
    return {
        "type": "avg_pool",
        "ratio": ratio,
        "num_layers": 1,
        "bias": False,
        "norm": "zero_centered_rms_norm",
        "norm_eps": norm_eps,
    }


def _read(native: Gemma3Config) -> dict[str, Any]:
    vision = native.vision_config
    ratio = (vision.image_size // vision.patch_size) // math.isqrt(native.mm_tokens_per_image)
    return {
        "vision_config": copy.deepcopy(vision),
        "text_config": text_part(native),
        "projector_config": _projector(ratio, vision.layer_norm_eps),
        "image_token_id": native.image_token_id,
        "image_attention": "bidirectional",
        "image_size": (vision.image_size,) * 2,
    }


def _write(config: AnyVlmConfig) -> Gemma3Config:
    eps = getattr(config.vision_config, "layer_norm_eps", None)
    require(
        (config.fusion == "embed", f"fusion is {config.fusion!r}, not 'embed'"),
        (config.image_attention == "bidirectional", f"image_attention is {config.image_attention!r}"),
        (
            config.image_views is None or config.image_views["type"] == "resize",
            "its processor cuts pictures only where a call asks for it",
        ),
        (isinstance(config.text_config, Gemma3TextConfig), "its language model is gemma3_text"),
        (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
        *square_tower(config, ((0, 0),)),
        *same_projector(config.projector_config, {**_projector(FREE, eps), "hidden_act": FREE}),
    )
    side, ratio = config.vision_tower_spec["grid"][0], projector_arguments(config.projector_config)["ratio"] or 2
    require((side // max(side // ratio, 1) == ratio, f"it cannot take the mean of {ratio} of {side} features"))
    return Gemma3Config(
        **write_parts(config),
        mm_tokens_per_image=num_tokens_of_grid(config.projector_config, (side, side)),
        image_token_index=config.image_token_id,
    )


def _rules(native: PreTrainedConfig) -> list[Rule]:
    projector = "model.multi_modal_projector."
    return [
        Rename("model.vision_tower.", "vision_tower."),
        Rename(f"{projector}mm_soft_emb_norm.", "multi_modal_projector.norms.0."),
        transposed(f"{projector}mm_input_projection_weight", "multi_modal_projector.layers.0.weight"),
    ]


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {"image_token": native.boi_token, "image_text": picture_text(native.tokenizer)}


def _write_processor(processor: AnyVlmProcessor, native: PreTrainedConfig, config: AnyVlmConfig) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    named = {"boi_token", "eoi_token", "image_token"} <= set(tokenizer.special_tokens_map)
    require((named, "its tokenizer names a boi_token, an eoi_token and an image_token"))
    require_text(processor, picture_text(tokenizer), processor.image_token == tokenizer.boi_token)
    return {"image_seq_length": native.mm_tokens_per_image}


FAMILIES = (
    NativeFamily(
        model_type="gemma3",
        model_class="Gemma3ForConditionalGeneration",
        processor_class="Gemma3Processor",
        read_config=_read,
        write_config=_write,
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
    ),
)
