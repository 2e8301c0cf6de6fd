"""What a composed model consists of, in numbers."""

from typing import Any

from ..configuration.image_views import has_several_views
from ..processing.prepared_views import makes_one_size


def describe_parts(model, processor) -> dict[str, Any]:
    """The composed parts: their types, parameters, which of them were trained, and tokens of an example picture.

    `one_size` is false where pictures take more or fewer tokens than the example: where they keep their own sizes or are
    cut into views, unless a fusion keeps their tokens out of the text.
    """
    config = model.config
    parts = {
        "vision tower": (model.vision_tower, config.vision_config.model_type),
        "projector": (model.multi_modal_projector, config.projector_config["type"]),
        **({} if model.fusion is None else {"fusion": (model.fusion, config.fusion)}),
        "language model": (model.language_model, config.text_config.model_type),
    }
    spec = config.vision_tower_spec
    example = processor._get_num_multimodal_tokens([spec["image_size"]]).num_image_tokens[0]
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
        "tokens_per_picture": example,
        "one_size": config.fusion != "embed"
        or (not has_several_views(processor.image_views) and makes_one_size(processor.image_processor, spec)),
    }
