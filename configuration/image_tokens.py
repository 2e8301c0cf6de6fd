"""How many tokens a picture takes: one answer, asked by the model and by the processor alike."""

import math
from collections.abc import Mapping

from .token_grids import Grid, token_grid


def image_grid(vision_tower_spec: dict, height: int, width: int) -> Grid:
    """Rows and columns of features that the tower gives for one plain picture of ``height`` x ``width`` pixels.

    ``vision_tower_spec`` is what the probe measured when the model was composed (see ``composition/probe.py``).

    Raises:
        ValueError: the picture has not the size that was measured, or, where any size will do, no multiple of patches.
    """
    if vision_tower_spec["any_size"]:
        edge = vision_tower_spec["patch"]["size"] * vision_tower_spec["merge_size"]
        rest = 0 if vision_tower_spec["patch"].get("drops_rest") else height % edge or width % edge
        if rest or height < edge or width < edge:
            raise ValueError(
                f"The vision tower cuts pictures into patches of {edge}x{edge} pixels (merged ones), which "
                f"{height}x{width} pixels (height x width) are no multiple of. Leave the processor's sizes as they "
                "were saved."
            )
        return height // edge, width // edge
    expected_height, expected_width = vision_tower_spec["image_size"]
    if (height, width) != (expected_height, expected_width):
        raise ValueError(
            f"The vision tower was composed for pictures of {expected_height}x{expected_width} pixels (height x width) "
            f"but got {height}x{width}. Leave the processor's sizes as they were saved, or compose again with "
            f"image_size=({height}, {width})."
        )
    rows, columns = vision_tower_spec["grid"]
    return rows, columns


def image_grids(vision_tower_spec: dict, pixel_values, processor_outputs: Mapping) -> list[Grid]:
    """The grid of features of every picture of a batch.

    Args:
        pixel_values: Plain pictures ``(num_images, channels, height, width)``, or patches; ``None`` if none came as pixels.
        processor_outputs: What the tower's own image processor gives beside patches: ``image_grid_thw``
            ``(num_images, 3)``, ``spatial_shapes`` or ``target_sizes`` ``(num_images, 2)``, in patches,
            ``image_position_ids`` ``(num_images, num_patches, 2)``, column and row, negative at padding,
            ``tower_grids`` ``(num_views, 2)``, where a picture may come as features that the tower gave before,
            ``image_sizes`` ``(num_images, 2)``, in pixels, or ``pixel_attention_mask`` ``(num_images, height, width)``, 0 at
            padding. Empty for plain pictures.
    """
    if processor_outputs.get("tower_grids") is not None:
        others = {key: value for key, value in processor_outputs.items() if key != "tower_grids"}
        computed = iter([] if pixel_values is None else image_grids(vision_tower_spec, pixel_values, others))
        return [tuple(grid) if any(grid) else next(computed) for grid in processor_outputs["tower_grids"].tolist()]
    merge = vision_tower_spec["merge_size"]
    for key in ("image_grid_thw", "spatial_shapes", "target_sizes"):
        if processor_outputs.get(key) is not None:
            # Frames of a clip stand one below the other.
            shapes = [[1, *shape] if len(shape) == 2 else shape for shape in processor_outputs[key].tolist()]
            return [(frames * (rows // merge), columns // merge) for frames, rows, columns in shapes]
    if processor_outputs.get("image_position_ids") is not None:
        edges = processor_outputs["image_position_ids"].amax(1) + 1
        return [(rows // merge, columns // merge) for columns, rows in edges.tolist()]
    mask = processor_outputs.get("pixel_attention_mask")
    if mask is not None and mask.ndim == 3:
        sizes = zip(mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist())
        return [image_grid(vision_tower_spec, *size) for size in sizes]
    if processor_outputs.get("image_sizes") is not None:
        return [image_grid(vision_tower_spec, *size) for size in processor_outputs["image_sizes"].tolist()]
    return [image_grid(vision_tower_spec, *pixel_values.shape[-2:])] * len(pixel_values)


def num_tokens_of_grid(projector_config: dict, grid: Grid) -> int:
    """Number of tokens that the projector makes of a ``grid`` of features."""
    return math.prod(token_grid(projector_config, grid))
