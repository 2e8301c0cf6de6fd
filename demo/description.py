"""What a composed model consists of, in numbers."""

from typing import Any

from ..configuration.image_tokens import num_image_tokens


def describe_parts(model) -> dict[str, Any]:
    """The composed parts: their types, parameters, which of them were trained, and tokens per picture."""
    config = model.config
    parts = {
        "vision tower": (model.vision_tower, config.vision_config.model_type),
        "projector": (model.multi_modal_projector, config.projector_config["type"]),
        "language model": (model.language_model, config.text_config.model_type),
    }
    spec = config.vision_tower_spec
    return {
        "parts": {
            name: {
                "type": part_type,
                "parameters": sum(parameter.numel() for parameter in part.parameters()),
                "trained": any(parameter.requires_grad for parameter in part.parameters()),
            }
            for name, (part, part_type) in parts.items()
        },
        "picture_size": list(spec["image_size"]),
        "tokens_per_picture": num_image_tokens(spec, config.projector_config, *spec["image_size"]),
    }
