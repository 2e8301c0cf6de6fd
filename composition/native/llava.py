"""LLaVA (Liu et al. 2023) and its nearest kin: a tower, two linear maps, image tokens among the text's."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from transformers import FastVlmConfig, LlavaConfig, LlavaProcessor, PreTrainedConfig, VipLlavaConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...modeling.picture_inputs import picture_kinds
from ...modeling.vision_towers import vision_tower_class
from ...processing.processing_anyvlm import AnyVlmProcessor
from .conditions import plain_embedding, whole_pictures
from .family import NativeFamily, require
from .keys import Rename
from .pieces import read_parts, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


def read_two_layers(native: PreTrainedConfig) -> dict[str, Any]:
    return {
        **read_parts(native),
        "projector_config": {
            "type": "mlp",
            "num_layers": 2,
            "hidden_act": native.projector_hidden_act,
            "bias": native.multimodal_projector_bias,
        },
        "image_token_id": native.image_token_index,
        "vision_feature_layer": native.vision_feature_layer,
        "vision_feature_select_strategy": native.vision_feature_select_strategy,
    }


def without_first_token(spec: dict[str, Any]) -> dict[str, Any]:
    """LLaVA drops the first token whatever tower it has; of one without a CLS token (siglip) that is a patch, and what
    is left is no grid."""
    beside = spec["num_prefix_tokens"], spec["num_suffix_tokens"]
    if beside == (1, 0):
        return spec
    num_features = math.prod(spec["grid"]) + sum(beside) - 1
    return {**spec, "num_prefix_tokens": 1, "num_suffix_tokens": 0, "grid": [1, num_features]}


def takes_sizes(native: LlavaConfig) -> bool:
    """Whether LLaVA's tower is one to which it hands `image_sizes`; then its processor is Pixtral's."""
    tower_class = vision_tower_class(native.vision_config)
    return tower_class is not None and "sized_pictures" in picture_kinds(
        inspect.signature(tower_class.forward).parameters
    )


def write_llava_parts(config: AnyVlmConfig) -> dict[str, Any]:
    """What the configs of all classes here have in common; the last hidden state is the last of the hidden states (where
    it is another tensor, as siglip's normed one, the logits will tell)."""
    layer = config.vision_feature_layer
    return {
        **write_parts(config),
        "image_token_index": config.image_token_id,
        "image_seq_length": math.prod(config.vision_tower_spec["grid"]),
        "projector_hidden_act": projector_arguments(config.projector_config).get("hidden_act"),
        "vision_feature_layer": -1 if layer is None else layer,
    }


def two_layers(
    config: AnyVlmConfig,
    embedding: Callable[[AnyVlmConfig], list[tuple[bool, str]]] = plain_embedding,
    **expected: Any,
) -> list[tuple[bool, str]]:
    """Conditions of a projector of two linear maps as wide as the language model, and of a tower of pictures of one size.

    Args:
        embedding: Conditions of how pictures get into the text.
        expected: What is special about the projector.
    """
    spec, projector = config.vision_tower_spec, config.projector_config
    width = getattr(config.text_config, "hidden_size", None)
    two = {"type": "mlp", "num_layers": 2, "hidden_features": width, "hidden_act": FREE}
    return [
        *embedding(config),
        *same_projector(projector, {**two, **expected}),
        (projector["out_features"] == width, f"its projector gives tokens of the text config's width {width}"),
        *whole_pictures(spec),
    ]


def _tokens_beside(config: AnyVlmConfig) -> tuple[int, int]:
    return config.vision_tower_spec["num_prefix_tokens"], config.vision_tower_spec["num_suffix_tokens"]


def _is_sequence(config: AnyVlmConfig) -> tuple[bool, str]:
    layout = config.vision_tower_spec["layout"]
    return layout == "sequence", f"its tower gives a sequence of tokens, not {layout!r}"


def _write_config(config: AnyVlmConfig) -> LlavaConfig:
    beside = _tokens_beside(config)
    require(
        *two_layers(config, bias=FREE),
        _is_sequence(config),
        (beside in ((1, 0), (0, 0)), f"it drops one token before the patches or none, not {beside}"),
    )
    return LlavaConfig(
        **write_llava_parts(config),
        multimodal_projector_bias=projector_arguments(config.projector_config)["bias"],
        vision_feature_select_strategy="default" if beside == (1, 0) else "full",
    )


def two_layer_rules(native) -> list[Rename]:
    """Tower and projector as LLaVA and its kin call them."""
    return [
        Rename("model.vision_tower.", "vision_tower."),
        Rename("model.multi_modal_projector.linear_1.", "multi_modal_projector.layers.0."),
        Rename("model.multi_modal_projector.linear_2.", "multi_modal_projector.layers.1."),
    ]


def _write_processor(
    processor: AnyVlmProcessor, native: PreTrainedConfig, config: AnyVlmConfig, strategy: str | None = None
) -> dict[str, Any]:
    """The native count is that of patches of pixels, to which it adds what stands beside them, and takes one away."""
    spec = config.vision_tower_spec
    strategy = strategy or native.vision_feature_select_strategy
    patch = getattr(config.vision_config, "patch_size", None) or spec["image_size"][0] // spec["grid"][0]
    patches = math.prod(edge // patch for edge in spec["image_size"])
    dropped = int(strategy == "default")
    return {
        "patch_size": patch,
        "num_additional_image_tokens": math.prod(spec["grid"]) + dropped - patches,
        "vision_feature_select_strategy": strategy,
        "image_token": processor.image_token,
    }


def _read_processor(native: LlavaProcessor, config: AnyVlmConfig) -> dict[str, Any]:
    return {"image_token": native.image_token}


LLAVA = NativeFamily(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    processor_class="LlavaProcessor",
    read_config=read_two_layers,
    write_config=_write_config,
    rules=two_layer_rules,
    read_processor=_read_processor,
    write_processor=_write_processor,
    is_family_of=lambda native: not takes_sizes(native),
    adjust_spec=lambda native, spec: (
        without_first_token(spec) if native.vision_feature_select_strategy == "default" else spec
    ),
)


# ViP-LLaVA (Cai et al. 2024): features of several layers side by side, normed before the projector.


def _read_vipllava(native: VipLlavaConfig) -> dict[str, Any]:
    layer = native.vision_feature_layers  # before transformers 5.23 its only name
    return {
        **read_parts(native),
        "projector_config": {
            "type": "mlp",
            "num_layers": 2,
            "hidden_act": native.projector_hidden_act,
            "norm": "layer_norm",
            "norm_eps": native.projector_layernorm_eps,
        },
        "image_token_id": native.image_token_index,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
    }


def _write_vipllava(config: AnyVlmConfig) -> VipLlavaConfig:
    beside = _tokens_beside(config)
    require(
        *two_layers(config, norm="layer_norm", norm_eps=FREE),
        _is_sequence(config),
        (beside == (1, 0), f"it drops one token before the patches, not {beside}"),
    )
    parts = write_llava_parts(config)
    layers = parts.pop("vision_feature_layer")
    return VipLlavaConfig(
        **parts,
        vision_feature_layers=layers,
        projector_layernorm_eps=projector_arguments(config.projector_config)["norm_eps"],
    )


VIPLLAVA = NativeFamily(
    model_type="vipllava",
    model_class="VipLlavaForConditionalGeneration",
    processor_class="LlavaProcessor",
    read_config=_read_vipllava,
    write_config=_write_vipllava,
    rules=lambda native: [
        *two_layer_rules(native),
        Rename("model.multi_modal_projector.projector_layernorm.", "multi_modal_projector.norms.0."),
    ],
    read_processor=_read_processor,
    write_processor=lambda *arguments: _write_processor(*arguments, strategy="default"),
    adjust_spec=lambda native, spec: without_first_token(spec),
)


# FastVLM (Vasu et al. 2025): a hybrid tower of timm, whose last map is read place by place.


def _read_fast_vlm(native: FastVlmConfig) -> dict[str, Any]:
    pieces = read_two_layers(native)
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        del pieces[name]  # it allows one of each: the last map, whole
    return pieces


def _write_fast_vlm(config: AnyVlmConfig) -> FastVlmConfig:
    spec = config.vision_tower_spec
    width = getattr(config.vision_config, "hidden_size", None)
    require(
        *two_layers(config, bias=FREE),
        (spec["layout"] == "channels_first", f"its tower gives a map, not {spec['layout']!r}"),
        (config.vision_feature_layer is None, "it reads the tower's last map"),
        (spec["output"] == "last_hidden_state", f"it does not read the tower's {spec['output']}"),
        (
            width == spec["hidden_size"],
            f"its tower's features are as wide as its config says, not {spec['hidden_size']}",
        ),
    )
    return FastVlmConfig(
        **write_llava_parts(config),
        multimodal_projector_bias=projector_arguments(config.projector_config)["bias"],
        vision_feature_select_strategy="full",
    )


FAST_VLM = NativeFamily(
    model_type="fast_vlm",
    model_class="FastVlmForConditionalGeneration",
    processor_class="LlavaProcessor",
    read_config=_read_fast_vlm,
    write_config=_write_fast_vlm,
    rules=two_layer_rules,
    read_processor=_read_processor,
    write_processor=_write_processor,
)

FAMILIES = (LLAVA, VIPLLAVA, FAST_VLM)
