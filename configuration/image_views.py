"""Into which views a picture is taken apart, and how many tokens it takes: one answer for the processor and the model.

A *view* is one picture handed to the tower: the whole picture, a tile, a slice or a crop. `image_views` in the config says
how a picture becomes views; `None` means `{"type": "resize"}`, one view. Its keys:

| key | meaning |
|---|---|
| `type` | a row of `VIEWS` |
| `view_size` | pixels `[height, width]` that the image processor makes of every view; `null`: as planned |
| `layout` | of `tiles`: a row of `TILE_LAYOUTS`, whose functions say which settings they read |
| `join` | `"concat"`: the views' tokens one after another; `"spatial"`: LLaVA-NeXT's merge of tiles into one map |
| `max_tokens`, `min_tokens` | of `native`: the budget |
| `cell_size`, `cell_tokens` | of `native`: edge in pixels of the squares that sizes are multiples of, and its tokens |
| `cut_patches` | of `native`: the image processor makes plain pictures, which are cut into patches afterwards |
| `several` | `"whole"`: pictures are not cut where a text has several, but laid on a square of `background` |
| `max_merged_tiles` | of `"spatial"`: a map of more tiles than this is scaled down (LLaVA-OneVision's `anyres_max_9`) |

Everything here is arithmetic on sizes: no picture and no tensor is made.
"""

import math
from collections.abc import Callable
from typing import Any

from .image_tokens import Grid, image_grid, token_grid
from .native_size import native_size
from .tile_layouts import TILE_LAYOUTS, PictureViews, Size, View, grid_of_tiles, squared_picture, whole_picture


JOINS = ("concat", "spatial")


def _resize(image_views: dict, height: int, width: int) -> PictureViews:
    return whole_picture(height, width)


def _tiles(image_views: dict, height: int, width: int) -> PictureViews:
    layout = image_views.get("layout")
    if layout not in TILE_LAYOUTS:
        raise ValueError(f"Unknown layout of tiles {layout!r}. Choose one of: {', '.join(sorted(TILE_LAYOUTS))}.")
    return TILE_LAYOUTS[layout](image_views, height, width)


def _slices(image_views: dict, height: int, width: int) -> PictureViews:
    """MiniCPM-V (Yao et al. 2024): the whole picture with the area of one slice, then, of a larger picture, up to
    `max_slices` slices whose shape is nearest to that area's square. Sizes are multiples of `unit` pixels."""
    area_edge, unit = image_views["slice_size"], image_views["unit"]
    grid = _slice_grid(height, width, area_edge, image_views["max_slices"])
    whole = _area_size(height, width, area_edge, unit, enlarge=grid is None)
    if grid is None:
        return whole_picture(height, width, whole)
    rows, columns = grid
    slice_height = _nearest_multiple(height, rows) / rows
    slice_width = _nearest_multiple(width, columns) / columns
    tile = _area_size(slice_height, slice_width, area_edge, unit, enlarge=True)
    slices = grid_of_tiles(rows, columns, tile, ((rows * tile[0], columns * tile[1]),))
    return PictureViews((View(whole, (whole,)), *slices), rows, columns)


def _slice_grid(height: int, width: int, area_edge: int, most: int) -> Size | None:
    wanted = min(math.ceil(width * height / (area_edge * area_edge)), most)
    if wanted <= 1:
        return None
    log_ratio = math.log(width / height)
    best, least_error = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > most:
            continue
        for rows in (number for number in range(1, count + 1) if count % number == 0):
            error = abs(log_ratio - math.log(count // rows / rows))
            if error < least_error or (error == least_error and rows > best[0]):
                best, least_error = (rows, count // rows), error
    return best


def _area_size(height: float, width: float, area_edge: int, unit: int, enlarge: bool) -> Size:
    """A size of the same proportions with the area of a square of `area_edge` pixels, in multiples of `unit`."""
    if height * width > area_edge * area_edge or enlarge:
        proportion = width / height
        height = int(area_edge / math.sqrt(proportion))
        width = int(height * proportion)
    return _nearest_multiple(height, unit), _nearest_multiple(width, unit)


def _nearest_multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def _native(image_views: dict, height: int, width: int) -> PictureViews:
    """The whole picture in its own proportions, and in its own size where the budget allows it."""
    tokens = image_views["cell_tokens"]
    most = image_views["max_tokens"] // tokens
    least = min(-(-image_views["min_tokens"] // tokens), most)
    size = native_size(height, width, image_views["cell_size"], most, least)
    return whole_picture(height, width, size)


#: Type -> `(image_views, height, width) -> PictureViews`.
VIEWS: dict[str, Callable[[dict, int, int], PictureViews]] = {
    "resize": _resize,
    "tiles": _tiles,
    "slices": _slices,
    "native": _native,
}

#: Types of which every picture is one view, so that the model needs no sizes to know which views belong together.
SINGLE_VIEW_TYPES = ("resize", "native")


def check_image_views(image_views: dict | None) -> None:
    """Refuse settings that would fail on the first picture.

    Raises:
        ValueError: an unknown type, layout or join, or a setting that is missing.
    """
    if image_views is None:
        return
    if image_views.get("type") not in VIEWS:
        raise ValueError(f"Unknown views {image_views.get('type')!r}. Choose one of: {', '.join(sorted(VIEWS))}.")
    if image_views.get("join", "concat") not in JOINS:
        raise ValueError(f"Unknown join of views {image_views['join']!r}. Choose one of: {', '.join(JOINS)}.")
    if image_views.get("several") not in (None, "whole"):
        raise ValueError(
            f"Unknown treatment of several pictures {image_views['several']!r}. Choose 'whole', or leave it out."
        )
    try:
        for height, width in ((1, 1), (3000, 1000)):
            for pictures in (1, 2):
                plan_views(image_views, height, width, pictures)
    except KeyError as error:
        raise ValueError(
            f"image_views lacks {error}, which views of this kind need: {image_views}. anyvlm.compose(views=…) fills in "
            "what is left out."
        ) from error


def has_several_views(image_views: dict | None) -> bool:
    """Whether a picture may become more than one view, so that the model needs `original_sizes`."""
    return image_views is not None and image_views["type"] not in SINGLE_VIEW_TYPES


def has_planned_views(image_views: dict | None) -> bool:
    """Whether pictures are cut or resized by a plan, before the image processor sees them."""
    return image_views is not None and image_views["type"] != "resize"


def has_newline(image_views: dict | None) -> bool:
    """Whether the model has the parameter `image_newline`, which ends each row of a map of merged tiles."""
    return has_several_views(image_views) and image_views.get("join", "concat") == "spatial"


def depends_on_pictures(image_views: dict | None) -> bool:
    """Whether the views of a picture depend on how many pictures its text has; then `original_sizes` has it."""
    return has_several_views(image_views) and image_views.get("several") is not None


def plan_views(image_views: dict | None, height: int, width: int, pictures: int = 1) -> PictureViews:
    """The views of a picture of `height` x `width` pixels, one of `pictures` in its text.

    Raises:
        ValueError: unknown type or layout, or no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"A picture of {height}x{width} pixels (height x width) has no views. Leave it out.")
    image_views = image_views or {"type": "resize"}
    if image_views.get("type") not in VIEWS:
        raise ValueError(f"Unknown views {image_views.get('type')!r}. Choose one of: {', '.join(sorted(VIEWS))}.")
    if pictures > 1 and depends_on_pictures(image_views):
        return squared_picture(height, width, image_views["background"])
    return VIEWS[image_views["type"]](image_views, height, width)


def feature_grids(config: Any, plan: PictureViews) -> list[Grid]:
    """Rows and columns of the tower's features for each view of a picture.

    Args:
        config: Anything with `vision_tower_spec` and `image_views`: the model's config or the processor.

    Raises:
        ValueError: only the image processor knows to which size it brings a picture.
    """
    spec = config.vision_tower_spec
    view_size = (config.image_views or {}).get("view_size")
    if view_size is None and not has_planned_views(config.image_views):
        if spec["any_size"]:
            raise ValueError(
                "These pictures keep their own sizes, by the rule of the image processor. Ask "
                "processor._get_num_multimodal_tokens."
            )
        view_size = spec["image_size"]
    return [image_grid(spec, *(view_size or view.size)) for view in plan.views]


def joined_grid(image_views: dict, plan: PictureViews, tile_grid: Grid, height: int, width: int) -> tuple[Grid, Grid]:
    """Of a map of merged tiles: rows and columns without padding, and those after scaling down.

    LLaVA-NeXT cuts away the rows or columns that show only the padding around the picture.
    """
    full_rows, full_columns = plan.rows * tile_grid[0], plan.columns * tile_grid[1]
    rows, columns = full_rows, full_columns
    if width / height > full_columns / full_rows:
        rows -= (full_rows - int(round(height * (full_columns / width), 7))) // 2 * 2
    else:
        columns -= (full_columns - int(round(width * (full_rows / height), 7))) // 2 * 2
    most = image_views.get("max_merged_tiles")
    if most is not None:
        ratio = math.sqrt(rows * columns / (most * tile_grid[0] ** 2))
        if ratio > 1.1:
            return (rows, columns), (max(1, int(rows // ratio)), max(1, int(columns // ratio)))
    return (rows, columns), (rows, columns)


def num_joined_tokens(image_views: dict | None, plan: PictureViews, grids: list[Grid], height: int, width: int) -> int:
    """Tokens of a picture whose views have tokens in these grids."""
    if not has_newline(image_views):
        return sum(math.prod(grid) for grid in grids)
    if plan.rows == 0:
        return math.prod(grids[plan.whole]) + 1
    tile_grid = next(grid for index, grid in enumerate(grids) if index != plan.whole)
    _, (rows, columns) = joined_grid(image_views, plan, tile_grid, height, width)
    return (math.prod(grids[plan.whole]) if plan.whole is not None else 0) + rows * (columns + 1)


def num_image_tokens(config: Any, height: int, width: int, pictures: int = 1) -> int:
    """Number of image tokens that a picture of `height` x `width` pixels takes in the language model's input.

    Args:
        pictures: How many pictures its text has.
        config: Anything with `vision_tower_spec`, `projector_config`, `image_views` and, unless it is `"embed"`, `fusion`:
            the model's config or the processor.
    """
    if getattr(config, "fusion", "embed") != "embed":
        return 1
    plan = plan_views(config.image_views, height, width, pictures)
    grids = [token_grid(config.projector_config, grid) for grid in feature_grids(config, plan)]
    return num_joined_tokens(config.image_views, plan, grids, height, width)
