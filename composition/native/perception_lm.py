"""Perception LM (Cho et al. 2025): a tower of timm, two linear maps, means of neighbouring tokens; the whole picture and
tiles of the canvas in which it is largest."""

from typing import Any

import transformers
from transformers import PerceptionLMConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .colours import colours_of, for_views
from .conditions import embedded_as_text, require_dropped, require_text, square_tower
from .family import NativeFamily, require
from .llava import two_layer_rules
from .pieces import read_parts, write_parts
from .projector_arguments import FREE, same_projector


def _projector(ratio: Any) -> dict[str, Any]:
    layers = {"num_layers": 2, "hidden_act": "gelu"}
    return (
        {"type": "mlp", **layers} if ratio == 1 else {"type": "avg_pool", "ratio": ratio, "pool_last": True, **layers}
    )


def _read_config(native: PerceptionLMConfig) -> dict[str, Any]:
    return {
        **read_parts(native),
        "projector_config": _projector(native.projector_pooling_ratio),
        "image_token_id": native.image_token_id,
    }


def _read_views(native: PerceptionLMConfig, processor: ProcessorMixin) -> dict[str, Any]:
    settings = processor.image_processor
    if not settings.do_resize:
        raise CompositionError("The image processor must resize views to its tile_size: it has do_resize=False.")
    tile = [settings.tile_size, settings.tile_size]
    if settings.vision_input_type != "thumb+tile":
        return {"type": "resize", "view_size": tile}
    return {
        "type": "tiles",
        "layout": "canvas",
        "tile_size": tile,
        "view_size": tile,
        "max_tiles": settings.max_num_tiles,
    }


def _check_tokens_dropped(native: PerceptionLMConfig, spec: dict[str, Any]) -> dict[str, Any]:
    """The class drops the first token or none as the config says, whatever the tower's tokens are."""
    return require_dropped(spec, native.vision_use_cls_token, f"vision_use_cls_token={native.vision_use_cls_token}")


def _write_config(config: AnyVlmConfig) -> PerceptionLMConfig:
    spec, views = config.vision_tower_spec, config.image_views or {"type": "resize"}
    width = getattr(config.text_config, "hidden_size", None)
    model_args = getattr(config.vision_config, "model_args", None) or {}
    ratio = config.projector_config.get("ratio", 2) if config.projector_config["type"] == "avg_pool" else 1
    require(
        *embedded_as_text(config),
        *square_tower(config, ((0, 0), (1, 0))),
        *same_projector(config.projector_config, {**_projector(ratio), "hidden_features": width, "ratio": FREE}),
        (spec["grid"][0] % ratio == 0, f"means are taken of whole squares of {ratio} by {ratio} features"),
        (config.projector_config["out_features"] == width, f"its projector gives tokens of the text's width {width}"),
        (
            model_args.get("embed_dim") == spec["hidden_size"],
            "its tower's config states the width of features as model_args['embed_dim']",
        ),
        (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
        (
            views["type"] == "resize" or views.get("layout") == "canvas",
            "it cuts pictures into tiles of layout 'canvas'",
        ),
        (views.get("join", "concat") == "concat", "its tiles follow one another"),
        (
            list(views.get("tile_size", spec["image_size"])) == list(spec["image_size"]),
            f"its tiles are of {spec['image_size']} pixels",
        ),
    )
    return PerceptionLMConfig(
        **write_parts(config),
        vision_use_cls_token=bool(spec["num_prefix_tokens"]),
        projector_pooling_ratio=ratio,
        image_token_id=config.image_token_id,
    )


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    return {
        "image_processor": for_views(native.image_processor, config.image_views["view_size"]),
        "image_token": native.image_token,
    }


def _write_processor(processor: AnyVlmProcessor, native: PerceptionLMConfig, config: AnyVlmConfig) -> dict[str, Any]:
    require_text(processor, {}, processor.image_token == getattr(processor.tokenizer, "image_token", None))
    views, edge = processor.image_views or {}, config.vision_tower_spec["image_size"][0]
    size = {"height": edge, "width": edge}
    colours = colours_of(processor.image_processor)
    return {
        "image_processor": transformers.PerceptionLMImageProcessor(
            tile_size=edge,
            max_num_tiles=views.get("max_tiles", 1),
            vision_input_type="thumb+tile" if views.get("type") == "tiles" else "vanilla",
            **colours,
        ),
        # Videos are none of ours, but its processor insists on one for them.
        "video_processor": transformers.PerceptionLMVideoProcessor(size=size, **colours),
        "patch_size": edge // config.vision_tower_spec["grid"][0],
        "pooling_ratio": native.projector_pooling_ratio,
    }


FAMILIES = (
    NativeFamily(
        model_type="perception_lm",
        model_class="PerceptionLMForConditionalGeneration",
        processor_class="PerceptionLMProcessor",
        read_config=_read_config,
        read_views=_read_views,
        write_config=_write_config,
        rules=two_layer_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
        adjust_spec=_check_tokens_dropped,
        processor_needs=("torchvision",),
    ),
)
