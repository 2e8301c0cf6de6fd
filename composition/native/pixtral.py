"""Pixtral-12B (Agrawal et al. 2024): LLaVA's class around a tower for pictures of any size, rows of tokens each with a token
at its end."""

from typing import Any

from transformers import LlavaConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ..errors import CompositionError
from .conditions import plain_embedding, sized_tower
from .family import NativeFamily, require
from .llava import read_two_layers, takes_sizes, two_layer_rules
from .mistral3 import read_pixtral_processor, write_pixtral_processor
from .pieces import example_size, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


def _read_config(native: LlavaConfig) -> dict[str, Any]:
    if native.vision_feature_select_strategy != "full":
        raise CompositionError(
            "With this tower vision_feature_select_strategy='default' drops the first patch of the first picture of a "
            "batch. Set it to 'full' in the config."
        )
    pieces = {**read_two_layers(native), "image_size": example_size(native.vision_config, 1)}
    del pieces["vision_feature_select_strategy"]  # there is nothing beside the patches
    return pieces


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
        **write_parts(config),
        image_token_index=config.image_token_id,
        projector_hidden_act=projector["hidden_act"],
        multimodal_projector_bias=projector["bias"],
        vision_feature_layer=-1 if layer is None else layer,
        vision_feature_select_strategy="full",
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
