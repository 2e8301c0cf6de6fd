"""Which tensors of a tower are tables of positions, told by their shapes at two sizes of picture, and their resizing.

A table whose rows grow with the grid of places is interpolated as a map: so a place keeps what it knew of its part of the
picture (Dosovitskiy et al. 2021, section 3.2; Touvron et al. 2021). Rows for tokens that are no places, such as CLS, stay
as they are. Tables of offsets between two places (BEiT, Swin, SAM) are interpolated likewise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


Size = tuple[int, int]
Shape = tuple[int, ...]

#: A mode of `torch.nn.functional.interpolate`, and whether it is antialiased.
Resampling = tuple[str, bool]
#: All that towers of transformers do themselves: ViT, DINOv2 with registers, SigLIP 2, BEiT's offsets, Idefics2.
RESAMPLINGS: tuple[Resampling, ...] = (
    ("bicubic", False),
    ("bicubic", True),
    ("bilinear", True),
    ("bilinear", False),
    ("nearest", False),
)
#: Rows of a table of offsets that are no offsets: BEiT's from CLS to a place, from a place to CLS, and from CLS to CLS.
_NUM_CLS_OFFSETS = 3


@dataclass(frozen=True)
class SizeChange:
    """What a tower was measured to do at both sizes.

    Args:
        image_size, new_image_size: Pixels `(height, width)`.
        patch_size, new_patch_size: Pixels along each edge of a patch; 1 and 1 where the config states none.
        beside: How many rows `(at the start, at the end)` of a table may be for no place, the likeliest first.
        beside_of_rows: Number of tokens in a sequence inside the tower -> the same, measured for such sequences.
        num_frames: Of a clip; 1 for pictures.
    """

    image_size: Size
    new_image_size: Size
    patch_size: int
    new_patch_size: int
    beside: tuple[Size, ...]
    beside_of_rows: dict[int, Size]
    num_frames: int = 1

    def grids(self) -> Iterator[tuple[Size, Size]]:
        """Grids of places, old and new, that some stride over the picture would give, the largest first."""
        found = set()
        for stride in range(1, min(self.image_size) + 1):
            for rounded in (math.floor, math.ceil):
                new_stride = stride * self.new_patch_size / self.patch_size
                grid = tuple(rounded(edge / stride) for edge in self.image_size)
                new_grid = tuple(rounded(edge / new_stride) for edge in self.new_image_size)
                if (grid, new_grid) not in found and min(new_grid) > 0:
                    found.add((grid, new_grid))
                    yield grid, new_grid


@dataclass(frozen=True)
class PositionTable:
    """Where the positions are in a tensor, and how they are resized.

    Args:
        kind: `"places"`, `"offsets"` between places, `"row offsets"` along one edge, or a `"map"`.
        axis: Whose length changes; of a map, the first of two.
        grid, new_grid: What is interpolated, and to what.
        front, back: Rows at either end that are no places.
        inner: Sizes into which the axis is taken apart, `(copies, rows, width)`, of a table in one flat row.
    """

    kind: str
    axis: int
    grid: Size
    new_grid: Size
    front: int = 0
    back: int = 0
    inner: Shape | None = None

    @property
    def is_of_offsets(self) -> bool:
        return self.kind in ("offsets", "row offsets")

    @property
    def usual_resampling(self) -> Resampling:
        """Where a tower has no way of its own: bicubic, for offsets linear, and antialiased where the table shrinks."""
        shrinks = any(new < old for old, new in zip(self.grid, self.new_grid))
        return ("bilinear" if self.is_of_offsets else "bicubic", shrinks)

    def resize(self, table: torch.Tensor, resampling: Resampling | None = None) -> torch.Tensor:
        """The table for the new size, in its dtype; computed in fp32 or finer. Default: the usual resampling."""
        resampling = resampling or self.usual_resampling
        if self.inner is not None:
            rows = PositionTable(self.kind, self.axis + 1, self.grid, self.new_grid, self.front, self.back)
            return rows.resize(table.unflatten(self.axis, self.inner), resampling).flatten(self.axis, self.axis + 2)
        if self.kind == "map":
            places = table.movedim((self.axis, self.axis + 1), (-2, -1))
            return interpolated(places, self.new_grid, resampling).movedim((-2, -1), (self.axis, self.axis + 1))
        rows = table.movedim(self.axis, -1)
        end = rows.shape[-1] - self.back
        places = rows[..., self.front : end].unflatten(-1, (-1, *self.grid))
        resized = interpolated(places, self.new_grid, resampling).flatten(-3)
        return torch.cat([rows[..., : self.front], resized, rows[..., end:]], dim=-1).movedim(-1, self.axis)

    def describe(self, resampling: Resampling | None = None) -> str:
        (rows, columns), (new_rows, new_columns) = self.grid, self.new_grid
        beside = self.front + self.back
        kept = f", {beside} beside them kept" if beside else ""
        mode, antialias = resampling or self.usual_resampling
        way = f"{mode} with antialiasing" if antialias else mode
        return f"{self.kind} {rows}x{columns} interpolated to {new_rows}x{new_columns}{kept}, {way}"


def interpolated(maps: torch.Tensor, size: Size, resampling: Resampling) -> torch.Tensor:
    """Maps `(…, rows, columns)` of another size, corners of the outer cells on one another, in their own dtype."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    mode, antialias = resampling
    dtype = torch.promote_types(maps.dtype, torch.float32)
    flat = maps.reshape(1, -1, *maps.shape[-2:]).to(dtype)
    corners = {} if mode == "nearest" else {"align_corners": False, "antialias": antialias}
    resized = nn.functional.interpolate(flat, size=size, mode=mode, **corners)
    return resized.reshape(*maps.shape[:-2], *size).to(maps.dtype)


def find_position_table(shape: Shape, new_shape: Shape, change: SizeChange) -> PositionTable | None:
    """What a tensor of these shapes, at the old and the new size, must be; `None` if no table of positions."""
    changed = [axis for axis, (old, new) in enumerate(zip(shape, new_shape)) if old != new]
    if len(shape) != len(new_shape) or not changed:
        return None
    if len(changed) == 2 and changed[1] == changed[0] + 1:
        return _find_map(changed[0], shape, new_shape, change)
    # A map of one proportion may change along one edge alone.
    return _find_rows(changed[0], shape, new_shape, change) if len(changed) == 1 else None


def find_flat_table(shape: Shape, new_shape: Shape, tables: list[tuple[Shape, Shape, PositionTable]]):
    """A table in one flat row (Mllama's, of the places in each of several tiles) beside tables that were found:
    `(shape, new shape, table)`."""
    changed = [axis for axis, (old, new) in enumerate(zip(shape, new_shape)) if old != new]
    if len(shape) != len(new_shape) or len(changed) != 1:
        return None
    axis = changed[0]
    for rows, new_rows, table in tables:
        if table.kind != "places" or table.axis != len(rows) - 2:
            continue
        values, new_values = math.prod(rows[-2:]), math.prod(new_rows[-2:])
        copies = shape[axis] // values
        if copies and (shape[axis], new_shape[axis]) == (copies * values, copies * new_values):
            inner = (copies, *rows[-2:])
            return PositionTable("places", axis, table.grid, table.new_grid, table.front, table.back, inner)
    return None


def _find_map(axis: int, shape: Shape, new_shape: Shape, change: SizeChange) -> PositionTable | None:
    grid, new_grid = tuple(shape[axis : axis + 2]), tuple(new_shape[axis : axis + 2])
    if (grid, new_grid) in set(change.grids()):
        return PositionTable("map", axis, grid, new_grid)
    return None


def _find_rows(axis: int, shape: Shape, new_shape: Shape, change: SizeChange) -> PositionTable | None:
    number, new_number = shape[axis], new_shape[axis]
    measured = change.beside_of_rows.get(number)
    grids = list(change.grids())
    for front, back in change.beside if measured is None else (measured,):
        for frames in range(1, change.num_frames + 1):
            for grid, new_grid in grids:
                cells = frames * math.prod(grid), frames * math.prod(new_grid)
                if (number - front - back, new_number - front - back) == cells:
                    return PositionTable("places", axis, grid, new_grid, front, back)
    for back in (0, _NUM_CLS_OFFSETS):
        for grid, new_grid in grids:
            spans, new_spans = (tuple(2 * edge - 1 for edge in edges) for edges in (grid, new_grid))
            if (number - back, new_number - back) == (math.prod(spans), math.prod(new_spans)):
                return PositionTable("offsets", axis, spans, new_spans, 0, back)
    for grid, new_grid in grids:
        for edge, new_edge in zip(grid, new_grid):
            if (number, new_number) == (2 * edge - 1, 2 * new_edge - 1):
                return PositionTable("row offsets", axis, (1, number), (1, new_number))
    return None
