"""From views to what the tower takes, and the grids of features that it will give."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..configuration.image_tokens import image_grids, num_tokens_of_grid
from ..configuration.image_views import has_planned_views, num_image_tokens
from ..modeling.picture_inputs import PICTURE_INPUTS
from .image_outputs import image_outputs
from .patch_cutting import cut_pictures


def prepare_views(
    image_processor, views: list[Image.Image], vision_tower_spec: dict, image_views: dict | None, **kwargs
) -> dict[str, torch.Tensor]:
    """`pixel_values` of views, and what else the tower takes beside them."""
    kwargs["return_tensors"] = kwargs.get("return_tensors") or "pt"
    if has_planned_views(image_views) and image_views.get("view_size") is None:
        kwargs["do_resize"] = False  # the views have the sizes that the tower is to see
    if (image_views or {}).get("cut_patches"):
        pictures = [
            torch.as_tensor(image_outputs(image_processor, [view], **kwargs)["pixel_values"])[0] for view in views
        ]
        return cut_pictures(pictures, vision_tower_spec)
    processed = image_outputs(image_processor, views, **kwargs)
    # Image processors also return what only their own model reads (masks of padding, original sizes).
    keys = ("pixel_values", *patch_keys(vision_tower_spec))
    return {key: processed[key] for key in keys if key in processed}


def grids_of_sizes(
    image_processor, vision_tower_spec: dict, image_sizes: list[tuple[int, int]], **kwargs
) -> list[tuple[int, int]]:
    """Rows and columns of features of pictures of the given `(height, width)` before processing."""
    # Only the image processor knows to which size it brings a picture.
    pictures = [Image.new("RGB", (width, height)) for height, width in image_sizes]
    return grids_of_outputs(vision_tower_spec, image_outputs(image_processor, pictures, return_tensors="pt", **kwargs))


def tokens_of_sizes(config: Any, image_processor, image_sizes: list[tuple[int, int]], **kwargs) -> list[int]:
    """Image tokens in the text of pictures of the given `(height, width)`. No picture is made, unless only the image
    processor knows to which size it brings one.

    Args:
        config: As for `num_image_tokens`.
        kwargs: For the image processor, where it is not to do as it is set.
    """
    planned = getattr(config, "fusion", "embed") != "embed" or has_planned_views(config.image_views)
    if planned or not (kwargs or config.vision_tower_spec["any_size"]):
        return [num_image_tokens(config, height, width) for height, width in image_sizes]
    grids = grids_of_sizes(image_processor, config.vision_tower_spec, image_sizes, **kwargs)
    return [num_tokens_of_grid(config.projector_config, grid) for grid in grids]


def makes_one_size(image_processor, vision_tower_spec: dict) -> bool:
    """Whether pictures of any size take the same tokens; else each keeps its own size or proportions."""
    height, width = vision_tower_spec["image_size"]
    wide, tall = grids_of_sizes(image_processor, vision_tower_spec, [(height, 4 * width), (4 * height, width)])
    return wide == tall


def patch_keys(vision_tower_spec: dict) -> list[str]:
    """What the tower takes beside patches, under the names of image processors; empty for whole pictures."""
    return list(PICTURE_INPUTS[vision_tower_spec["inputs"]].from_processor.values())


def grids_of_outputs(vision_tower_spec: dict, image_inputs: Mapping) -> list[tuple[int, int]]:
    """Rows and columns of features of each picture that an image processor has made ready."""
    keys = (*patch_keys(vision_tower_spec), "tower_grids")
    outputs = {key: image_inputs[key] for key in keys if key in image_inputs}
    return image_grids(vision_tower_spec, image_inputs.get("pixel_values"), outputs)
