"""What nearly every family reads from a config, or writes into one."""

import copy
from typing import Any

from transformers import PreTrainedConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...configuration.image_tokens import num_tokens_of_grid


#: Edge in pixels of the picture with which such a tower is tried; its own largest would only take long.
_EXAMPLE_EDGE = 448


def text_part(native_config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the text config that ties its embeddings if the native model does: there the whole config decides."""
    text_config = copy.deepcopy(native_config.text_config)
    text_config.tie_word_embeddings = bool(native_config.tie_word_embeddings)
    return text_config


def read_parts(native_config: PreTrainedConfig) -> dict[str, Any]:
    """Copies of both sub-configs, for `AnyVlmConfig`."""
    return {"vision_config": copy.deepcopy(native_config.vision_config), "text_config": text_part(native_config)}


def write_parts(config: AnyVlmConfig) -> dict[str, Any]:
    """The same for a native config."""
    return {
        "vision_config": copy.deepcopy(config.vision_config),
        "text_config": copy.deepcopy(config.text_config),
        "tie_word_embeddings": bool(config.text_config.tie_word_embeddings),
    }


def tokens_of_a_view(config: AnyVlmConfig) -> int:
    """Of a tower of pictures of one size."""
    return num_tokens_of_grid(config.projector_config, config.vision_tower_spec["grid"])


def example_size(vision_config: PreTrainedConfig, merge: int) -> tuple[int, int]:
    """Pixels of a picture that a tower of any size takes and a projector can merge."""
    unit = vision_config.patch_size * merge
    edge = max(min(_EXAMPLE_EDGE, vision_config.image_size) // unit, 1) * unit
    return edge, edge
