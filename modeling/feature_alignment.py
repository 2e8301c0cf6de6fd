"""What brings the features of another tower to a projector that was trained for the one before.

In `projector_config`: `aligned_grid`, `[rows, columns]`, brings features to one grid, so that a picture keeps the number of
tokens that the language model knows; `aligned_features` maps them linearly to the width that the projector was trained for.
Model stitching (Lenc & Vedaldi 2015; Bansal et al. 2021) joins trained networks by such a map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..configuration.token_grids import Grid


class FeatureAlignment(nn.Module):
    """Features on another grid and of another width.

    Args:
        in_features: Width of the tower's features.
        out_features: Width that they are mapped to; `None` leaves them as they are.
        grid: Rows and columns that they are brought to, each place at its true position; `None` leaves theirs.
    """

    def __init__(self, in_features: int, out_features: int | None = None, grid: Sequence[int] | None = None):
        super().__init__()
        self.grid = None if grid is None else tuple(grid)
        self.linear = None if out_features is None else nn.Linear(in_features, out_features)

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        """`(num_images, rows * columns, in_features)` to `(num_images, num_features, out_features)`, and the new grid."""
        if self.grid is not None and self.grid != tuple(grid):
            features, grid = resample_features(features, grid, self.grid), self.grid
        return (features if self.linear is None else self.linear(features)), grid


class AlignedProjector(nn.Module):
    """A projector behind a `FeatureAlignment`; its tensors stay as they were trained."""

    def __init__(self, alignment: FeatureAlignment, projector: nn.Module):
        super().__init__()
        self.alignment = alignment
        self.projector = projector

    @property
    def output_layer(self) -> nn.Linear | None:
        return self.projector.output_layer

    def forward(self, features: torch.Tensor, grid: Grid, **instructions: Any) -> tuple[torch.Tensor, Grid]:
        return self.projector(*self.alignment(features, grid), **instructions)


def resample_features(features: torch.Tensor, grid: Grid, target: Grid) -> torch.Tensor:
    """Features `(num_images, rows * columns, width)` on another grid over the same picture, bilinear between the middles of
    places, and averaged where there are fewer of them."""
    maps = features.transpose(1, 2).unflatten(2, tuple(grid))
    # With antialiasing torch (2.13) makes wrong rows of a single column; lying down it is right.
    is_column = target[1] == 1
    if is_column:
        maps, target = maps.transpose(2, 3), (target[1], target[0])
    # Not every device has this in half precision.
    maps = nn.functional.interpolate(
        maps.float(), size=tuple(target), mode="bilinear", align_corners=False, antialias=True
    )
    if is_column:
        maps = maps.transpose(2, 3)
    return maps.flatten(2).transpose(1, 2).to(features.dtype)
