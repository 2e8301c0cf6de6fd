"""Pictures of several sizes to patches, for towers whose image processor does not take sizes that were planned.

What comes out is what image processors of such towers give: the patches, and the shapes or positions beside them.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from ..modeling.picture_inputs import PICTURE_INPUTS


def cut_pictures(pictures: Sequence[torch.Tensor], spec: dict) -> dict[str, torch.Tensor]:
    """`pixel_values`, and what goes along with them under the names of image processors.

    Args:
        pictures: Each `(channels, height, width)`, in multiples of the patches.
        spec: `vision_tower_spec`.
    """
    row = PICTURE_INPUTS[spec["inputs"]]
    cut = [row.from_pictures(picture[None], spec) for picture in pictures]
    pixels = [tensors["pixels"] for tensors in cut]
    if spec["patch"]["form"] == "row":  # image processors leave that axis to the model
        pixels = [patches.squeeze(0) for patches in pixels]
    # A strip grows to the side; everything else has its pictures or patches along the first axis.
    outputs = {"pixel_values": torch.cat(pixels, dim=-1) if spec["inputs"] == "patch_strip" else _padded(pixels, 0)}
    for name, key in row.from_processor.items():
        if name == "patch_mask":  # image processors mask pixels
            for tensors in cut:
                size = spec["patch"]["size"]
                tensors[name] = tensors[name].repeat_interleave(size, 1).repeat_interleave(size, 2).long()
        outputs[key] = _padded([tensors[name] for tensors in cut], -1 if name == "positions" else 0)
    return outputs


def _padded(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
    """One after another along the first axis, filled up with `value` to one size along the others."""
    sizes = [max(edges) for edges in zip(*(tensor.shape[1:] for tensor in tensors))]
    filled = []
    for tensor in tensors:
        missing = [size - edge for size, edge in zip(sizes, tensor.shape[1:])]
        filled.append(pad(tensor, [width for edge in reversed(missing) for width in (0, edge)], value=value))
    return torch.cat(filled)
