"""The same pictures by an old and a new path: what the projector got, and what it is to get, at the same places."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..configuration.image_tokens import Grid
from ..configuration.image_views import plan_views
from ..configuration.instructions import reads_instruction
from ..configuration.token_grids import NEED_ROWS_AND_COLUMNS, token_grid
from ..modeling.feature_alignment import resample_features
from .feature_maps import core_config, core_features, core_projector
from .picture_paths import PicturePath
from .true_positions import Places, TruePositions, interpolation


class AlignmentError(ValueError):
    """The two paths cannot be compared; the message says why."""


@dataclass
class PairedView:
    """One view of the new path, with what the old path had at its places. float32, on the device of the models.

    Args:
        picture: Number of its picture in the batch.
        grid: Rows and columns that the projector's core gets of the view on the new path.
        new: `(rows * columns, new width)`, features of the new tower on this grid.
        old: `(rows * columns, old width)`, what the old core got, at these places.
        reached: `(rows * columns,)`, false where the old path did not look.
        tokens: `(tokens, token width)`, what the old core made, at the places of the new tokens; `None` if the projector
            reads text.
        tokens_reached: `(tokens,)`.
    """

    picture: int
    grid: Grid
    new: torch.Tensor
    old: torch.Tensor
    reached: torch.Tensor
    tokens: torch.Tensor | None
    tokens_reached: torch.Tensor | None


class PairedFeatures:
    """Pictures to pairs of features of two models, of which one has another vision tower.

    Args:
        old, new: The models with their processors. The projector of the new one says to which grid its features are
            brought; its weights are not used.
        is_replaced: The new projector is another one than the old, and not a map before the same.
    """

    def __init__(self, old: PicturePath, new: PicturePath, is_replaced: bool = False):
        self.old, self.new = old, new
        self.old_config = core_config(old.model.config.projector_config)
        self.new_config = core_config(new.model.config.projector_config) if is_replaced else self.old_config
        # In fp32: what a core makes is compared, and half precision would be the larger part of the differences.
        self.old_core = copy.deepcopy(core_projector(old.model.multi_modal_projector)).float().eval()
        self.old_positions, self.new_positions = TruePositions(old.processor), TruePositions(new.processor)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[PairedView]:
        """
        Raises:
            AlignmentError: features that are in no rows and columns, and not equally many.
        """
        sizes = [(picture.height, picture.width) for picture in pictures]
        old_features, old_raw_grids, old_grids = self._old_features(pictures)
        new_features, new_raw_grids, new_grids = self._new_features(pictures)
        old_tokens, old_token_grids = self._old_tokens(old_features, old_grids)
        old_counts, new_counts = self._view_counts(self.old, sizes), self._view_counts(self.new, sizes)
        pairs = []
        old_start = new_start = 0
        for index, (size, old_count, new_count) in enumerate(zip(sizes, old_counts, new_counts)):
            old_views = range(old_start, old_start + old_count)
            new_views = range(new_start, new_start + new_count)
            old_start, new_start = old_views.stop, new_views.stop
            old_places = self.old_positions(*size, [old_raw_grids[view] for view in old_views])
            new_places = self.new_positions(*size, [new_raw_grids[view] for view in new_views])
            old_places = [_on(places, old_grids[view]) for places, view in zip(old_places, old_views)]
            new_places = [_on(places, new_grids[view]) for places, view in zip(new_places, new_views)]
            for chosen, places, view in zip(_matched(old_places, new_places), new_places, new_views):
                old_view, old_place = old_views[chosen], old_places[chosen]
                grid = new_grids[view]
                old, reached = _brought(old_features[old_view], old_grids[old_view], old_place, grid, places)
                tokens = tokens_reached = None
                if old_tokens is not None:
                    tokens, tokens_reached = self._brought_tokens(
                        old_tokens[old_view], old_token_grids[old_view], old_place, grid, places
                    )
                pairs.append(PairedView(index, grid, new_features[view], old, reached, tokens, tokens_reached))
        return pairs

    def _old_features(self, pictures: Sequence[Image.Image]) -> tuple[list[torch.Tensor], list[Grid], list[Grid]]:
        """What the old core gets of each view, the grid of the tower's features, and that of the core's."""
        features, grids = self.old.features(self.old.inputs(pictures))
        features, core_grids = by_grid(features, grids, lambda batch, grid: core_features(self.old.model, batch, grid))
        return features, grids, core_grids

    def _new_features(self, pictures: Sequence[Image.Image]) -> tuple[list[torch.Tensor], list[Grid], list[Grid]]:
        """The new tower's features of each view on the grid that the core gets, its own grid, and that one."""
        features, grids = self.new.features(self.new.inputs(pictures))
        target = self.new.model.config.projector_config.get("aligned_grid")

        def brought(batch: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
            if target is None or tuple(target) == tuple(grid):
                return batch.float(), grid
            return resample_features(batch.float(), grid, tuple(target)), tuple(target)

        features, brought_grids = by_grid(features, grids, brought)
        return features, grids, brought_grids

    def _old_tokens(
        self, features: list[torch.Tensor], grids: list[Grid]
    ) -> tuple[list[torch.Tensor] | None, list[Grid]]:
        if reads_instruction(self.old_config):
            return None, []
        return by_grid(features, grids, lambda batch, grid: self.old_core(batch.float(), grid))

    def _view_counts(self, path: PicturePath, sizes: list[tuple[int, int]]) -> list[int]:
        return [len(plan_views(path.model.config.image_views, *size).views) for size in sizes]

    def _brought_tokens(
        self, tokens: torch.Tensor, token_grid_: Grid, old: Places | None, grid: Grid, new: Places | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        new_token_grid = token_grid(self.new_config, grid)
        old_token_places = _token_places(self.old_config, old, token_grid_)
        new_token_places = _token_places(self.new_config, new, new_token_grid)
        if (old_token_places is None or new_token_places is None) and len(tokens) != math.prod(new_token_grid):
            return None, None
        return _brought(tokens, token_grid_, old_token_places, new_token_grid, new_token_places)


def by_grid(
    features: Sequence[torch.Tensor], grids: Sequence[Grid], function: Callable[[torch.Tensor, Grid], tuple]
) -> tuple[list[torch.Tensor], list[Grid]]:
    """What a function of `(views, places, width)` and their grid makes of views of several grids, in their order."""
    made: list = [None] * len(features)
    made_grids: list = [None] * len(features)
    for grid in dict.fromkeys(grids):
        indices = [index for index, other in enumerate(grids) if other == grid]
        batch, batch_grid = function(torch.stack([features[index] for index in indices]), grid)
        for index, sample in zip(indices, batch):
            made[index], made_grids[index] = sample.float(), tuple(batch_grid)
    return made, made_grids


def _on(places: Places | None, grid: Grid) -> Places | None:
    return None if places is None else places.resampled(grid)


def _token_places(config: dict, places: Places | None, grid: Grid) -> Places | None:
    """Places of tokens made of features at `places`; `None` where they have none (queries)."""
    if places is None or (config["type"] not in NEED_ROWS_AND_COLUMNS and grid != places.grid):
        return None
    return places.pooled(grid)


def _matched(old: Sequence[Places | None], new: Sequence[Places | None]) -> list[int]:
    """For each new view, the old view that shows the same part of the picture, or most of it."""
    if len(old) == len(new):
        return list(range(len(new)))
    if any(places is None for places in (*old, *new)):
        raise AlignmentError(
            f"A picture is {len(old)} views to the old model and {len(new)} to the new one, and their features are in no "
            "rows and columns, so that nobody can say which belong together. Swap with views=… as the old model has them."
        )
    return [max(range(len(old)), key=lambda index: _overlap(old[index], places)) for places in new]


def _overlap(old: Places, new: Places) -> float:
    """Area that both views show, over that which either does."""
    shared = both = 1.0
    sides = []
    for first, second in ((old.y, new.y), (old.x, new.x)):
        first, second = first[~first.isnan()], second[~second.isnan()]
        if len(first) == 0 or len(second) == 0:
            return 0.0
        sides.append((float(first[0]), float(first[-1]), float(second[0]), float(second[-1])))
    for a, b, c, d in sides:
        shared *= max(0.0, min(b, d) - max(a, c))
    both = math.prod(b - a for a, b, _, _ in sides) + math.prod(d - c for _, _, c, d in sides) - shared
    return shared / both if both > 0 else 0.0


def _brought(
    values: torch.Tensor, grid: Grid, places: Places | None, new_grid: Grid, new_places: Places | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(rows * columns, width)` of the old path at the places of the new one, and where there are any."""
    if places is None or new_places is None:
        if len(values) != math.prod(new_grid):
            raise AlignmentError(
                f"The features of one of the towers are in no rows and columns (queries of a detector, or tokens beside "
                f"the patches), and a picture has {len(values)} of the old and {math.prod(new_grid)} of the new one, so "
                "that nobody can say which belong together."
            )
        return values, torch.ones(len(values), dtype=torch.bool, device=values.device)
    by_row, rows_reached = interpolation(places.y, new_places.y)
    by_column, columns_reached = interpolation(places.x, new_places.x)
    reached = (rows_reached[:, None] & columns_reached[None]).flatten().to(values.device)
    by_row, by_column = by_row.to(values), by_column.to(values)
    brought = torch.einsum("ij,jkc,lk->ilc", by_row, values.unflatten(0, grid), by_column).flatten(0, 1)
    return brought, reached
