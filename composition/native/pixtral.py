"""Pixtral-12B (Agrawal et al. 2024): LLaVA's class around a tower for pictures of any size, rows of tokens each with a token
at its end."""

import copy
from typing import Any

from transformers import LlavaConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ..errors import CompositionError
from .family import NativeFamily, plain_embedding, require, text_part
from .llava import takes_sizes, two_layer_rules
from .mistral3 import example_size, read_pixtral_processor, sized_tower, write_pixtral_processor
from .projector_arguments import FREE, projector_arguments, same_projector


def _read_config(native: LlavaConfig) -> dict[str, Any]:
    if native.vision_feature_select_strategy != "full":
        raise CompositionError(
            "With this tower vision_feature_select_strategy='default' drops the first patch of the first picture of a "
            "batch. Set it to 'full' in the config."
        )
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
        "image_size": example_size(native.vision_config, 1),
    }


def _write_config(config: AnyVlmConfig) -> LlavaConfig:
    width = getattr(config.text_config, "hidden_size", None)
    expected = {"type": "mlp", "num_layers": 2, "hidden_features": [width], "hidden_act": FREE, "bias": FREE}
    require(
        *plain_embedding(config),
        *same_projector(config.projector_config, expected),
        *sized_tower(config.vision_tower_spec),
    )
    projector, layer = projector_arguments(config.projector_config), config.vision_feature_layer
    return LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        projector_hidden_act=projector["hidden_act"],
        multimodal_projector_bias=projector["bias"],
        vision_feature_layer=-1 if layer is None else layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=bool(config.text_config.tie_word_embeddings),
    )


FAMILIES = (
    NativeFamily(
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        processor_class="PixtralProcessor",
        processor_needs=("torchvision",),
        is_family_of=takes_sizes,
        read_config=_read_config,
        write_config=_write_config,
        rules=two_layer_rules,
        read_processor=read_pixtral_processor,
        write_processor=write_pixtral_processor,
    ),
)
