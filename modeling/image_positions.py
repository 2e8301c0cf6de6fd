"""Positions with several axes: time, row and column of each image token, for language models with multi-axis rotary
positions (M-RoPE, Qwen2-VL, Wang et al. 2024).

A text token has one number on all axes, the number after the largest before it. The tokens of a picture begin at that
number: all have it as their time, and their row and column in the picture's grid of tokens are added to it on the other
axes. A picture of r rows and c columns thus moves what follows by max(r, c), not by its r * c tokens. Tokens of a picture
that are no grid (views joined with separators) count as text does.

What the pictures saved is kept with the cache, as `position_shift` `(batch, 1)`, so that a step knows its number.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from .packed_samples import counted_within


#: Time, row, column.
NUM_AXES = 3


def image_positions(
    position_ids: torch.Tensor,
    image_mask: torch.Tensor,
    token_grids: Sequence[tuple[int, int] | None],
    picture_lengths: Sequence[int],
    samples: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions on all axes, and what is to be added to the count of tokens after these.

    Args:
        position_ids: `(batch or 1, sequence)`, int64, the number of tokens before each; padding is not counted.
        image_mask: Boolean `(batch, sequence)`, true at image tokens.
        token_grids: Rows and columns of the tokens of each picture; `None` for tokens that are no grid.
        picture_lengths: Number of tokens of each picture.
        samples: The sample of each token, where several are packed in a row.

    Returns:
        `(3, batch, sequence)` and `(batch, 1)`, int64.
    """
    offsets, gains = [], []
    for grid, length in zip(token_grids, picture_lengths, strict=True):
        offset, gain = torch.zeros(NUM_AXES, length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
        if grid is not None:
            rows, columns = grid
            offset[1] = torch.arange(rows).repeat_interleave(columns)
            offset[2] = torch.arange(columns).repeat(rows)
            gain -= 1
            gain[-1] += max(rows, columns)
        offsets.append(offset)
        gains.append(gain)
    device = position_ids.device
    gain = torch.zeros(image_mask.shape, dtype=torch.long, device=device)
    gain[image_mask] = torch.cat(gains).to(device)
    positions = (position_ids + counted_within(gain, samples) - gain).repeat(NUM_AXES, 1, 1)
    positions[:, image_mask] += torch.cat(offsets, dim=1).to(device)
    return positions.clamp(min=0), gain.sum(1, keepdim=True)


def positions_on_axes(
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
    image_mask: torch.Tensor | None,
    token_grids: Sequence[tuple[int, int] | None] | None,
    picture_lengths: Sequence[int],
    samples: torch.Tensor | None = None,
) -> torch.Tensor:
    """`position_ids` on all axes; those that have several already stay.

    Args:
        position_ids: `(batch or 1, sequence)`, counting tokens; or `(axes, batch, sequence)`.
        past_key_values: The cache, which is told what the pictures saved, and tells it at later steps.
        image_mask, token_grids, picture_lengths, samples: As for `image_positions`; `None` or empty without pictures.

    Raises:
        ValueError: pictures whose grids are not known.
    """
    if position_ids.ndim != 2:
        return position_ids
    shift = 0 if past_key_values is None else vars(past_key_values).get("position_shift", 0)
    position_ids = position_ids + shift
    if image_mask is None:
        return position_ids
    if token_grids is None:
        raise ValueError(
            "The positions of image tokens follow from the rows and columns of each picture's tokens, and these are not "
            "known. Pass what get_image_features returned as mm_encoder_outputs['image'], whole, or pixel_values."
        )
    position_ids, gained = image_positions(position_ids, image_mask, token_grids, picture_lengths, samples)
    if past_key_values is not None:
        past_key_values.position_shift = shift + gained
    return position_ids
