"""To which size a picture is brought that keeps its own size and proportions, within a budget of tokens.

Towers of patches that take any size (NaFlex, Tschannen et al. 2025; NaViT, Dehghani et al. 2023; Qwen2-VL, Wang et al.
2024) see a picture as it is. Here a picture is cut into *cells*, squares of `edge` pixels that become one token each: a
patch, times the patches that the tower merges, times the tokens that the projector joins. (Some towers merge patches and
part them again; then a cell is what they merge, and several tokens.)
"""

import math


def native_size(
    height: int, width: int, edge: int, max_cells: int | None = None, min_cells: int = 1
) -> tuple[int, int]:
    """Pixels `(height, width)` to which a picture is brought: multiples of `edge`, both at least one.

    A picture whose cells fit keeps its size, to half a cell. A larger one is reduced until at most `max_cells` are
    left, one of fewer than `min_cells` is enlarged; then its longer side is a whole number of cells, and the shorter one
    follows from it to half a cell, but is one cell at least. So the proportions hold up to a cell, also where one side
    is thousands of times the other.

    Args:
        height, width: Pixels of the picture.
        edge: Pixels along each side of a cell.
        max_cells: The budget, which always holds; `None` for none.
        min_cells: Reached where the budget allows it: there may be no grid of the picture's proportions between both.

    Raises:
        ValueError: a picture without pixels, or a budget that holds no cell or less than `min_cells`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"A picture of {height}x{width} pixels (height x width) has no pixels.")
    if max_cells is not None and not 1 <= min_cells <= max_cells:
        raise ValueError(
            f"A budget must hold at least one token, and min_tokens must not exceed max_tokens; got "
            f"min_tokens={min_cells}, max_tokens={max_cells}."
        )
    long, short = max(height, width), min(height, width)
    cells = (_nearest(long, edge), _nearest(short, edge))
    if max_cells is not None and math.prod(cells) > max_cells:
        # With r = short / long, `count` cells along the longer side make at least count * (count * r - 1/2).
        ratio = short / long
        bound = math.ceil((0.25 + math.sqrt(0.0625 + ratio * max_cells)) / ratio)
        longest = min(cells[0], max_cells, bound)
        grids = (_grid(count, long, short) for count in range(longest, 0, -1))
        cells = next(grid for grid in grids if math.prod(grid) <= max_cells)
    elif math.prod(cells) < min_cells:
        for count in range(cells[0], min_cells + 1):
            found = _grid(count, long, short)
            if max_cells is not None and math.prod(found) > max_cells:
                break
            cells = found
            if math.prod(cells) >= min_cells:
                break
    rows, columns = cells if height >= width else cells[::-1]
    return rows * edge, columns * edge


def _nearest(pixels: int, edge: int) -> int:
    return max(1, (2 * pixels + edge) // (2 * edge))


def _grid(longer: int, long: int, short: int) -> tuple[int, int]:
    """`longer` cells along the longer side, and the nearest number of them along the shorter one."""
    return longer, _nearest(longer * short, long)
