"""How tiles of a picture are laid out: which parts of it, at which size, become views. Pure arithmetic on sizes.

Each layout is a function `(settings, height, width) -> PictureViews`, and a row of `TILE_LAYOUTS`. The numbers are those of
the image processors of transformers that cut pictures the same way; the tests compare both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from transformers.image_processing_utils import select_best_resolution


Size = tuple[int, int]

#: No picture is made longer than this before it is cut (Idefics3).
_LONGEST_EDGE = 4096


@dataclass(frozen=True)
class View:
    """One picture for the tower, out of one picture of the user.

    Args:
        size: Pixels `(height, width)` of the view.
        resizes: Sizes `(height, width)` to which the whole picture is brought, one after the other.
        canvas: Size of a canvas in whose middle the picture is laid then; `None` for none.
        background: The canvas's colour, red, green and blue from 0 to 255.
        box: `(top, left, bottom, right)` of what is cut out of that, and brought to `size`; `None` for all of it.
    """

    size: Size
    resizes: tuple[Size, ...] = ()
    canvas: Size | None = None
    background: tuple[int, int, int] = (0, 0, 0)
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class PictureViews:
    """The views of one picture, in their order.

    Args:
        views: At least one.
        rows: Rows of tiles; 0 where the picture is not cut.
        columns: Columns of tiles; 0 where the picture is not cut.
        whole: Index of the view that shows the whole picture; `None` if tiles alone show it.
    """

    views: tuple[View, ...]
    rows: int = 0
    columns: int = 0
    whole: int | None = 0


def whole_picture(height: int, width: int, size: Size | None = None) -> PictureViews:
    """The picture as one view: as it is, or brought to `size`."""
    return PictureViews((View(size or (height, width), (size,) if size else ()),))


def squared_picture(height: int, width: int, background: tuple[int, int, int]) -> PictureViews:
    """The picture as one view, in the middle of a square."""
    edge = max(height, width)
    return PictureViews((View((edge, edge), canvas=(edge, edge), background=tuple(background)),))


def grid_of_tiles(rows: int, columns: int, tile: Size, resizes: tuple[Size, ...], canvas: Size | None = None) -> tuple:
    """Views of a picture that was brought to `rows` x `columns` tiles, row by row."""
    height, width = tile
    return tuple(
        View(tile, resizes, canvas, box=(row * height, column * width, (row + 1) * height, (column + 1) * width))
        for row in range(rows)
        for column in range(columns)
    )


def _anyres(settings: dict, height: int, width: int) -> PictureViews:
    """LLaVA-NeXT and LLaVA-OneVision: the whole picture, then tiles of the one of `pinpoints` that fits best, into which
    the picture is laid with its proportions (Liu et al. 2024, Li et al. 2024)."""
    tile = tuple(settings["tile_size"])
    target = select_best_resolution((height, width), settings["pinpoints"])
    scale_height, scale_width = target[0] / height, target[1] / width
    if scale_width < scale_height:
        fitted = min(math.ceil(height * scale_width), target[0]), target[1]
    else:
        fitted = target[0], min(math.ceil(width * scale_height), target[1])
    rows, columns = target[0] // tile[0], target[1] // tile[1]
    tiles = grid_of_tiles(rows, columns, tile, (fitted,), tuple(target))
    return PictureViews((View(tile, (tile,)), *tiles), rows, columns)


def _dynamic(settings: dict, height: int, width: int) -> PictureViews:
    """InternVL (Chen et al. 2024), GOT-OCR 2 and Aya Vision: tiles of the arrangement whose proportions are nearest; with
    `fit` "scale" (Command A Vision) of that which enlarges the picture least. The whole picture comes last."""
    tile = tuple(settings["tile_size"])
    least, most = settings["min_tiles"], settings["max_tiles"]
    if settings.get("fit", "proportions") == "scale":
        columns, rows = _least_enlarged(height, width, tile, most)
    else:
        columns, rows = _nearest_proportions(height, width, tile, least, most)
    if rows * columns == 1:
        return whole_picture(height, width, tile)
    tiles = grid_of_tiles(rows, columns, tile, ((rows * tile[0], columns * tile[1]),))
    if not settings.get("thumbnail", True):
        return PictureViews(tiles, rows, columns, None)
    return PictureViews((*tiles, View(tile, (tile,))), rows, columns, len(tiles))


@lru_cache(maxsize=16)
def _arrangements(least: int, most: int) -> list[Size]:
    """All `(columns, rows)` of `least` to `most` tiles, those of fewer tiles first."""
    found = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most + 1)]
    return sorted((pair for pair in found if least <= math.prod(pair) <= most), key=math.prod)


def _nearest_proportions(height: int, width: int, tile: Size, least: int, most: int) -> Size:
    best, best_difference = (1, 1), math.inf
    for columns, rows in _arrangements(least, most):
        difference = abs(width / height - columns / rows)
        # Of equal proportions more tiles, until they have twice the picture's area.
        enough = width * height > 0.5 * tile[0] * tile[1] * columns * rows
        if difference < best_difference or (difference == best_difference and enough):
            best, best_difference = (columns, rows), difference
    return best


def _least_enlarged(height: int, width: int, tile: Size, most: int) -> Size:
    scales = {pair: min(pair[0] * tile[0] / width, pair[1] * tile[0] / height) for pair in _arrangements(1, most)}
    enlarging = {pair: scale for pair, scale in scales.items() if scale >= 1}
    return min(enlarging, key=enlarging.get) if enlarging else max(scales, key=scales.get)


def _split(settings: dict, height: int, width: int) -> PictureViews:
    """Idefics3 and SmolVLM: the longest edge is brought to `longest_edge`, both edges to whole tiles, and the picture
    cut; the whole picture, a tile in size, comes last (Laurençon et al. 2024). Tiles are square. With `cut` false there are
    no tiles, and the whole picture is what it is then."""
    edge = settings["tile_size"][0]
    first = _with_longest_edge(height, width, settings["longest_edge"])
    if not settings.get("cut", True):
        return PictureViews((View((edge, edge), (first, (edge, edge))),))
    height, width = first
    if width >= height:
        wide = math.ceil(width / edge) * edge
        tall = math.ceil(int(wide / (width / height)) / edge) * edge
    else:
        tall = math.ceil(height / edge) * edge
        wide = math.ceil(int(tall * (width / height)) / edge) * edge
    tall, wide = max(tall, edge), max(wide, edge)
    rows, columns = tall // edge, wide // edge
    resizes = (first, (tall, wide))
    if rows * columns == 1:
        return PictureViews((View((edge, edge), resizes),))
    whole = View((edge, edge), (*resizes, (edge, edge)))
    return PictureViews((*grid_of_tiles(rows, columns, (edge, edge), resizes), whole), rows, columns, rows * columns)


def _with_longest_edge(height: int, width: int, longest_edge: int) -> Size:
    proportion = width / height
    if width >= height:
        width = longest_edge
        height = int(width / proportion)
        height += height % 2
    else:
        height = longest_edge
        width = int(height * proportion)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    proportion = width / height
    if width >= height and width > _LONGEST_EDGE:
        height, width = int(_LONGEST_EDGE / proportion), _LONGEST_EDGE
    elif height > width and height > _LONGEST_EDGE:
        height, width = _LONGEST_EDGE, int(_LONGEST_EDGE * proportion)
    return max(height, 1), max(width, 1)


def _quarters(settings: dict, height: int, width: int) -> PictureViews:
    """Idefics2: four quarters, cut before they are resized, and the whole picture last (Laurençon et al. 2024). With
    `longest_edge` and `shortest_edge` each view's edges are brought between these, the shorter one by stretching it where it
    must be. With `cut` false there are no quarters."""
    size = _between(settings, height, width)
    whole = View(size, () if size == (height, width) else (size,))
    middle, centre = height // 2, width // 2
    if not settings.get("cut", True) or not middle or not centre:
        return PictureViews((whole,))
    boxes = [
        (top, left, bottom, right)
        for top, bottom in ((0, middle), (middle, height))
        for left, right in ((0, centre), (centre, width))
    ]
    quarters = [View(_between(settings, box[2] - box[0], box[3] - box[1]), box=box) for box in boxes]
    return PictureViews((*quarters, whole), 2, 2, 4)


def _between(settings: dict, height: int, width: int) -> Size:
    """The size of a view: `longest_edge` keeps the proportions, `shortest_edge` does not."""
    longest, shortest = settings.get("longest_edge"), settings.get("shortest_edge")
    proportion = width / height
    if longest is not None and width >= height and width > longest:
        height, width = int(longest / proportion), longest
    elif longest is not None and height > width and height > longest:
        height, width = longest, int(longest * proportion)
    return max(height, shortest or 1), max(width, shortest or 1)


def _pan_and_scan(settings: dict, height: int, width: int) -> PictureViews:
    """Gemma 3: the whole picture, and if it is long in one direction, crops along it (Gemma Team 2025)."""
    whole = whole_picture(height, width)
    longer, shorter = max(height, width), min(height, width)
    if longer / shorter < settings["min_ratio"]:
        return whole
    count = min(longer // settings["min_crop_size"], math.floor(longer / shorter + 0.5))
    count = min(settings["max_tiles"], max(2, count))
    length = math.ceil(longer / count)
    if min(length, shorter) < settings["min_crop_size"]:
        return whole
    # Lengths are rounded up, so that very small crops may have nothing left for the last.
    spans = [(start, min(start + length, longer)) for start in range(0, longer, length)]
    is_wide = width >= height
    boxes = [(0, start, height, end) if is_wide else (start, 0, end, width) for start, end in spans]
    crops = [View((box[2] - box[0], box[3] - box[1]), box=box) for box in boxes]
    rows, columns = (1, len(crops)) if is_wide else (len(crops), 1)
    return PictureViews((*whole.views, *crops), rows, columns)


def _canvas(settings: dict, height: int, width: int) -> PictureViews:
    """Perception LM and Llama 3.2: the whole picture, then tiles of the canvas in which the picture becomes largest, or,
    for pictures too large for any, of that with the nearest proportions (Cho et al. 2025). Tiles are square."""
    tile = tuple(settings["tile_size"])
    columns, rows = _largest_canvas(height, width, tile[0], settings["max_tiles"]) or _nearest_canvas(
        height, width, settings["max_tiles"]
    )
    tiles = grid_of_tiles(rows, columns, tile, ((rows * tile[0], columns * tile[1]),))
    return PictureViews((View(tile, (tile,)), *tiles), rows, columns)


@lru_cache(maxsize=16)
def _canvases(most: int) -> dict[float, list[Size]]:
    """Proportion -> its `(columns, rows)`, those of more tiles first. Ties are decided by this order."""
    found: dict[float, list[Size]] = {}
    for count in range(most, 0, -1):
        for columns in (number for number in range(1, count + 1) if count % number == 0):
            found.setdefault(columns / (count // columns), []).append((columns, count // columns))
    return found


def _largest_canvas(height: int, width: int, edge: int, most: int) -> Size | None:
    best, best_length = None, -math.inf
    for columns, rows in (pair for pairs in _canvases(most).values() for pair in pairs):
        if columns * edge < width or rows * edge < height:
            continue
        scale = min(columns * edge / width, rows * edge / height)
        proportion = width / height
        # The length of the shorter edge, with the rounding of the original.
        if proportion > 1:
            length = math.floor(scale * width / proportion)
        elif proportion == 1:
            length = scale * height
        else:
            length = math.floor(scale * height * proportion)
        if length >= best_length:
            best, best_length = (columns, rows), length
    return best


def _nearest_canvas(height: int, width: int, most: int) -> Size:
    proportion, canvases = width / height, _canvases(most)
    if proportion >= 1:
        nearest = min((key for key in canvases if key <= proportion), key=lambda key: abs(key - proportion))
        return max(canvases[nearest], key=lambda pair: pair[0])
    nearest = min((key for key in canvases if key > proportion), key=lambda key: abs(1 / key - 1 / proportion))
    return max(canvases[nearest], key=lambda pair: pair[1])


TILE_LAYOUTS: dict[str, Callable[[dict, int, int], PictureViews]] = {
    "anyres": _anyres,
    "dynamic": _dynamic,
    "split": _split,
    "quarters": _quarters,
    "pan_and_scan": _pan_and_scan,
    "canvas": _canvas,
}
