"""LLaVA (Liu et al. 2023): a tower, two linear maps, image tokens among the text's."""

import copy
import math
from typing import Any

from transformers import LlavaConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .family import NativeFamily, plain_embedding, require, text_part
from .keys import Rename


def _read_config(native: LlavaConfig) -> dict[str, Any]:
    return {
        "vision_config": copy.deepcopy(native.vision_config),
        "text_config": text_part(native),
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


def without_first_token(native: LlavaConfig, spec: dict[str, Any]) -> dict[str, Any]:
    """LLaVA drops the first token whatever tower it has; of one without a CLS token (siglip) that is a patch, and what
    is left is no grid."""
    if native.vision_feature_select_strategy != "default":
        return spec
    beside = spec["num_prefix_tokens"], spec["num_suffix_tokens"]
    if beside == (1, 0):
        return spec
    num_features = math.prod(spec["grid"]) + sum(beside) - 1
    return {**spec, "num_prefix_tokens": 1, "num_suffix_tokens": 0, "grid": [1, num_features]}


def _write_config(config: AnyVlmConfig) -> LlavaConfig:
    spec, projector = config.vision_tower_spec, {"num_layers": 2, "hidden_act": "gelu", "bias": True}
    projector |= config.projector_config
    beside = spec["num_prefix_tokens"], spec["num_suffix_tokens"]
    width = getattr(config.text_config, "hidden_size", None)
    inner = projector.get("hidden_features") or projector["out_features"]
    known = {"type", "num_layers", "hidden_act", "bias", "in_features", "out_features", "hidden_features"}
    beyond = {name: value for name, value in projector.items() if name not in known and value}
    require(
        *plain_embedding(config),
        (projector["type"] == "mlp" and projector["num_layers"] == 2, "its projector is an mlp of two layers"),
        (not beyond, f"its projector has no {', '.join(beyond)}"),
        (inner == projector["out_features"] == width, "its projector's layers are as wide as the language model"),
        (spec["layout"] == "sequence", f"its tower gives a sequence of tokens, not {spec['layout']!r}"),
        (not spec["any_size"] and spec["inputs"] == "pictures", "its tower takes whole pictures of one size"),
        (beside in ((1, 0), (0, 0)), f"it drops one token before the patches or none, not {beside}"),
        (set(spec["call_kwargs"]) <= {"return_dict"}, f"it calls its tower without {spec['call_kwargs']}"),
    )
    layer = config.vision_feature_layer
    return LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        image_seq_length=math.prod(spec["grid"]),
        projector_hidden_act=projector["hidden_act"],
        multimodal_projector_bias=projector["bias"],
        # The last hidden state itself; where that is another tensor (siglip's is normed), the logits will tell.
        vision_feature_layer=-1 if layer is None else layer,
        vision_feature_select_strategy="default" if beside == (1, 0) else "full",
        tie_word_embeddings=bool(config.text_config.tie_word_embeddings),
    )


def two_layer_rules(native) -> list[Rename]:
    """Tower and projector as LLaVA and its kin call them."""
    return [
        Rename("model.vision_tower.", "vision_tower."),
        Rename("model.multi_modal_projector.linear_1.", "multi_modal_projector.layers.0."),
        Rename("model.multi_modal_projector.linear_2.", "multi_modal_projector.layers.1."),
    ]


def _write_processor(processor: AnyVlmProcessor, native: LlavaConfig, config: AnyVlmConfig) -> dict[str, Any]:
    spec = config.vision_tower_spec
    # The native count is one of patches of pixels, to which it adds what stands beside them and takes one away.
    patch = getattr(config.vision_config, "patch_size", None) or spec["image_size"][0] // spec["grid"][0]
    patches = math.prod(edge // patch for edge in spec["image_size"])
    dropped = native.vision_feature_select_strategy == "default"
    return {
        "patch_size": patch,
        "num_additional_image_tokens": math.prod(spec["grid"]) + dropped - patches,
        "vision_feature_select_strategy": native.vision_feature_select_strategy,
        "image_token": processor.image_token,
    }


FAMILIES = (
    NativeFamily(
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        processor_class="LlavaProcessor",
        read_config=_read_config,
        write_config=_write_config,
        rules=two_layer_rules,
        read_processor=lambda native, config: {"image_token": native.image_token},
        write_processor=_write_processor,
        adjust_spec=without_first_token,
    ),
)
