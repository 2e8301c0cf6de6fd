"""Join the tokens of a picture's views into the tokens of the picture."""

from collections.abc import Sequence

import torch
from torch import nn

from ..configuration.image_tokens import Grid
from ..configuration.image_views import depends_on_pictures, has_newline, joined_grid, plan_views
from ..configuration.tile_layouts import PictureViews


def check_views(image_views: dict, original_sizes: torch.Tensor, num_views: int) -> list[PictureViews]:
    """The views of each picture.

    Args:
        image_views: As in the config.
        original_sizes: `(num_images, 2)`, height and width of each picture before it was cut; or `(num_images, 3)`, and how
            many pictures its text has, where its views depend on that.
        num_views: Of all pictures together.

    Raises:
        ValueError: the pictures have more or fewer views than that.
    """
    columns = 3 if depends_on_pictures(image_views) else 2
    if original_sizes.ndim != 2 or original_sizes.shape[1] != columns:
        raise ValueError(
            f"original_sizes must be (num_images, {columns}), got {tuple(original_sizes.shape)}. Pass what the processor "
            "returned: model(**inputs)."
        )
    plans = [plan_views(image_views, *size) for size in original_sizes.tolist()]
    expected = sum(len(plan.views) for plan in plans)
    if expected != num_views:
        raise ValueError(
            f"Pictures of these original_sizes have {expected} views, but pixel_values has {num_views}. Pass everything "
            "that the processor returned in one call: model(**inputs)."
        )
    return plans


def join_views(
    tokens: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    image_views: dict,
    plans: Sequence[PictureViews],
    sizes: Sequence[Sequence[int]],
    newline: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Tokens of each picture `(num_tokens, width)`.

    Args:
        tokens: Of each view, `(rows * columns, width)`, in the order in which the processor cut the views.
        grids: Rows and columns of the tokens of each view.
        image_views: As in the config.
        plans: The views of each picture.
        sizes: Height and width of each picture before it was cut; more is not read.
        newline: `(width,)`, put at the end of each row of a map of merged tiles.
    """
    joined, start = [], 0
    for plan, size in zip(plans, sizes):
        end = start + len(plan.views)
        if has_newline(image_views):
            joined.append(
                merge_tiles(tokens[start:end], grids[start:end], image_views, plan, tuple(size[:2]), newline)
            )
        else:
            joined.append(torch.cat(list(tokens[start:end])))
        start = end
    return joined


def merge_tiles(
    tokens: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    image_views: dict,
    plan: PictureViews,
    size: tuple[int, int],
    newline: torch.Tensor,
) -> torch.Tensor:
    """LLaVA-NeXT: the whole picture's tokens, then those of all tiles as one map without what shows only padding, each row
    ended by `newline` (Liu et al. 2024). A map that is too large is scaled down first (LLaVA-OneVision, Li et al. 2024).
    """
    newline = newline.to(tokens[0])
    if plan.rows == 0:
        return torch.cat([tokens[plan.whole], newline[None]])
    tiles = [view for index, view in enumerate(tokens) if index != plan.whole]
    rows, columns = next(grid for index, grid in enumerate(grids) if index != plan.whole)
    full = torch.stack(tiles).view(plan.rows, plan.columns, rows, columns, -1)
    full = full.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    (kept_rows, kept_columns), scaled = joined_grid(image_views, plan, (rows, columns), *size)
    top, left = (full.shape[1] - kept_rows) // 2, (full.shape[2] - kept_columns) // 2
    merged = full[:, top : top + kept_rows, left : left + kept_columns]
    if scaled != (kept_rows, kept_columns):
        merged = nn.functional.interpolate(merged[None], list(scaled), mode="bilinear")[0]
    ends = newline[:, None, None].expand(*merged.shape[:-1], 1)
    merged = torch.cat([merged, ends], dim=-1).flatten(1, 2).transpose(0, 1)
    return merged if plan.whole is None else torch.cat([tokens[plan.whole], merged])
