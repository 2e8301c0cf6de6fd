"""Where in the picture each feature of a tower lies.

Image processors crop, squash or pad, each in its own way, so that the same row and column of two towers may show different
things. What one does is not read from its settings but seen: it is given a black and a white picture, which say how values
were normalised and where only padding is, and pictures whose grey is the row or the column of the pixel. From what it makes
of these follows where each pixel came from. Views are cut by arithmetic, which is known.

Coordinates are those of the picture of the user, from 0 at its upper left corner to 1 at its lower right one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..configuration.image_tokens import Grid
from ..configuration.image_views import plan_views
from ..configuration.tile_layouts import View
from ..modeling.feature_alignment import resample_features
from ..processing.fused_image_processor import FusedImageProcessor
from ..processing.prepared_views import patch_keys, prepare_views


#: A shorter side has too few greys for a line through them.
_SHORTEST_SIDE = 4


@dataclass(frozen=True)
class Places:
    """Middles of the features of one view. What lies in padding is NaN.

    Args:
        y: `(rows,)`, float64.
        x: `(columns,)`, float64.
    """

    y: torch.Tensor
    x: torch.Tensor

    @property
    def grid(self) -> Grid:
        return len(self.y), len(self.x)

    def resampled(self, grid: Grid) -> "Places":
        """Of features that `resample_features` brought to another grid."""
        if grid == self.grid:
            return self
        y, x = (
            resample_features(axis.view(1, -1, 1), (len(axis), 1), (length, 1)).view(-1).double()
            for axis, length in ((self.y, grid[0]), (self.x, grid[1]))
        )
        return Places(y, x)

    def pooled(self, grid: Grid) -> "Places":
        """Of what was made of equal parts of the rows and columns: the mean of the middles in each part."""
        if grid == self.grid:
            return self
        y, x = (
            torch.stack(
                [
                    axis[len(axis) * index // length : -(-len(axis) * (index + 1) // length)].mean()
                    for index in range(length)
                ]
            )
            for axis, length in ((self.y, grid[0]), (self.x, grid[1]))
        )
        return Places(y, x)


class TruePositions:
    """Where the features of pictures lie that a processor makes ready. What was measured for one size of pictures is kept.

    Args:
        processor: Of a composed model.
    """

    def __init__(self, processor: Any):
        self.spec, self.image_views = processor.vision_tower_spec, processor.image_views
        self.image_processor = processor.image_processor
        # Of several towers, features stand in the grid of the first.
        if isinstance(self.image_processor, FusedImageProcessor):
            self.image_processor = self.image_processor.image_processors[0]
        self._measured = lru_cache(maxsize=1024)(self._measure)

    def __call__(self, height: int, width: int, grids: list[Grid]) -> list[Places | None]:
        """The places of each view of a picture of `height` x `width` pixels, alone in its text.

        Args:
            grids: Rows and columns of features of each view.

        Returns:
            An entry for each view; `None` where features are in no rows and columns.
        """
        plan = plan_views(self.image_views, height, width)
        return [self._places(view, height, width, grid) for view, grid in zip(plan.views, grids, strict=True)]

    def _places(self, view: View, height: int, width: int, grid: Grid) -> Places | None:
        # One row is what has no places (queries of a detector, tokens beside the patches), unless sizes are free.
        if grid[0] == 1 and grid[1] > 1 and not self.spec["any_size"]:
            return None
        top, left, bottom, right = view_window(view, height, width)
        y, x = self._measured(*view.size)
        places = []
        for pixels, length, start, end in ((y, grid[0], top, bottom), (x, grid[1], left, right)):
            along = start + (end - start) * middles(length, pixels)
            places.append(torch.where((along >= 0) & (along <= 1), along, torch.nan))
        return Places(*places)

    def _measure(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of a view of this size, the coordinates of the rows and of the columns of pixels that the tower gets; `None` for
        all of it, evenly."""
        pixels = self._processed(height, width)
        if pixels is None:
            return None, None
        black, white, by_row, by_column = pixels
        contrast = white - black
        if not np.isfinite(contrast).all() or np.abs(contrast).max() < 1e-6:
            return None, None  # each picture is normalised by itself
        shown = np.abs(contrast) > 0.5 * np.abs(contrast).max()
        contrast = np.where(shown, contrast, 1)
        rows = _coordinates((by_row - black) / contrast, shown, height)
        columns = _coordinates(((by_column - black) / contrast).T, shown.T, width)
        return rows, columns

    def _processed(self, height: int, width: int) -> np.ndarray | None:
        """`(4, pixel rows, pixel columns)` of a black picture, a white one and the two ramps; `None` where the tower gets
        patches, whose processors show the whole picture."""
        as_patches = patch_keys(self.spec) or (self.image_views or {}).get("cut_patches")
        if as_patches or self.spec["patch"] is not None or min(height, width) < _SHORTEST_SIDE:
            return None
        ramps = [
            np.zeros((height, width)),
            np.full((height, width), 255),
            np.repeat(_ramp(height)[:, None], width, axis=1),
            np.repeat(_ramp(width)[None], height, axis=0),
        ]
        views = [Image.fromarray(ramp.astype(np.uint8)).convert("RGB") for ramp in ramps]
        pixels = prepare_views(self.image_processor, views, self.spec, self.image_views)["pixel_values"]
        if pixels.ndim == 5:  # clips, which stand still
            pixels = pixels[:, 0]
        return pixels.double().mean(1).numpy() if pixels.ndim == 4 and len(pixels) == 4 else None


def view_window(view: View, height: int, width: int) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of a view in the coordinates of its picture; beyond 0 and 1 where it shows a canvas."""
    rows, columns = view.resizes[-1] if view.resizes else (height, width)
    canvas = view.canvas or (rows, columns)
    top, left = (canvas[0] - rows) // 2, (canvas[1] - columns) // 2
    box = view.box or (0, 0, *canvas)
    return (box[0] - top) / rows, (box[1] - left) / columns, (box[2] - top) / rows, (box[3] - left) / columns


def middles(length: int, pixels: np.ndarray | None) -> torch.Tensor:
    """Coordinates of the middles of `length` equal parts of a side, `(length,)`.

    Args:
        pixels: Coordinate of each pixel of the side, NaN in padding; `None` for the whole side, evenly.
    """
    even = (np.arange(length) + 0.5) / length
    if pixels is None:
        return torch.from_numpy(even)
    at = even * len(pixels) - 0.5
    known = np.flatnonzero(np.isfinite(pixels))
    found = np.interp(at, known, pixels[known])
    outside = (at < known[0] - 0.5) | (at > known[-1] + 0.5)
    return torch.from_numpy(np.where(outside, np.nan, found))


def _scale(length: int) -> float:
    """Steps of grey from pixel to pixel: whole ones where there are enough, so that nothing is rounded."""
    step = 255 / (length - 1)
    return float(int(step)) if step >= 1 else step


def _ramp(length: int) -> np.ndarray:
    return np.round(np.arange(length) * _scale(length))


def _coordinates(ramp: np.ndarray, shown: np.ndarray, length: int) -> np.ndarray | None:
    """Coordinate of each row of pixels, `(rows,)`, NaN where there is only padding.

    Args:
        ramp: `(rows, columns)`, what became of a ramp of `length` greys, black being 0 and white 1.
        shown: The same shape: where pixels are no padding.
    """
    counts = shown.sum(1)
    if not counts.any():
        return None
    positions = np.where(shown, ramp, 0).sum(1) / np.maximum(counts, 1) * 255 / _scale(length)
    kept = counts > counts.max() / 2
    # A ramp ends at the middle of the outermost pixels, and is flat from there. Images are scaled evenly, so that a line
    # through the rest is exact where greys are rounded; what is no line is taken as it is.
    inner = kept & (positions > 1) & (positions < length - 2)
    if inner.sum() >= 2:
        at = np.flatnonzero(inner)
        line = np.polynomial.Polynomial.fit(at, positions[at], 1)
        if np.abs(line(at) - positions[at]).max() < 0.02 * length:
            positions = line(np.arange(len(positions)))
    return np.where(kept, (positions + 0.5) / length, np.nan)


def interpolation(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How values at places of one side become values at other places of it.

    Linear between the middles of neighbours, and averaged over as much of the side as one new feature stands for, where
    that is more (a triangle, as in resizing with antialiasing).

    Args:
        old: `(n,)`, ascending, NaN where there is no value.
        new: `(m,)`.

    Returns:
        Weights `(m, n)`, whose rows sum to 1, and `(m,)`, false where the old values do not reach.
    """
    has_value = ~old.isnan()
    known = old[has_value]
    weights = torch.zeros(len(new), len(old), dtype=torch.float64)
    if len(known) == 0:
        return weights, torch.zeros(len(new), dtype=torch.bool)
    step = _step(known)
    distance = (new.unsqueeze(1) - known.unsqueeze(0)).abs()
    near = (1 - distance / max(step, _step(new[~new.isnan()]) if len(new) > 1 else step)).clamp(min=0)
    # A little beyond the last middle there is still the last feature.
    reached = (new >= known[0] - step * 0.501) & (new <= known[-1] + step * 0.501)
    near = torch.where((near.sum(1, keepdim=True) > 1e-9), near, (distance == distance.min(1, True).values).double())
    near = torch.where(reached.unsqueeze(1), near / near.sum(1, keepdim=True), 0)
    weights[:, has_value] = near
    return weights, reached


def _step(places: torch.Tensor) -> float:
    return float((places[1:] - places[:-1]).median()) if len(places) > 1 else 1.0
