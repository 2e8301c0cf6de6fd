"""How many tokens a picture takes: one answer, asked by the model and by the processor alike."""

import math


def image_grid(vision_tower_spec: dict, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of features that the tower gives for one picture of ``height`` x ``width`` pixels.

    ``vision_tower_spec`` is what the probe measured when the model was composed (see ``composition/probe.py``).

    Raises:
        ValueError: the picture has not the size that was measured.
    """
    expected_height, expected_width = vision_tower_spec["image_size"]
    if (height, width) != (expected_height, expected_width):
        raise ValueError(
            f"The vision tower was composed for pictures of {expected_height}x{expected_width} pixels (height x width) "
            f"but got {height}x{width}. Leave the processor's sizes as they were saved, or compose again with "
            f"image_size=({height}, {width})."
        )
    rows, columns = vision_tower_spec["grid"]
    return rows, columns


def num_image_tokens(vision_tower_spec: dict, projector_config: dict, height: int, width: int) -> int:
    """Number of image tokens that one picture of ``height`` x ``width`` pixels takes in the language model's input.

    ``projector_config`` is asked too, because a projector may merge features; `linear` and `mlp` keep their number.
    """
    return math.prod(image_grid(vision_tower_spec, height, width))
