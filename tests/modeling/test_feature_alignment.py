"""What stands before a projector that was trained for another tower."""

import pytest
import torch
from torch.nn import functional as F

from anyvlm.modeling.feature_alignment import resample_features


def _along(before: int, after: int) -> torch.Tensor:
    """What becomes of one side, `(after, before)`, from columns side by side that all hold the same."""
    columns = torch.eye(before).view(1, before, before, 1).repeat(1, 1, 1, 2)
    return F.interpolate(columns, size=(after, 2), mode="bilinear", antialias=True)[0, :, :, 0].T


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("grid", [(4, 1), (1, 4), (4, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("target", [(2, 1), (8, 1), (1, 8), (2, 4), (1, 1), (3, 3)])
def test_both_sides_are_resampled_by_themselves(number, grid, target):
    features = torch.randn(number, grid[0] * grid[1], 8)
    rows, columns = _along(grid[0], target[0]), _along(grid[1], target[1])
    expected = torch.einsum("ij,bjkc,lk->bilc", rows, features.unflatten(1, grid), columns).flatten(1, 2)
    torch.testing.assert_close(resample_features(features, grid, target), expected)
