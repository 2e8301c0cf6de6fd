"""What a projector makes of a grid of features: pure functions of its config, for the processor and the model alike.

Every function takes a grid `(rows, columns)` of features and the arguments of the projector that concern its tokens, and
returns the grid of tokens. `TOKEN_GRIDS` has one for each type of projector.
"""

from collections.abc import Callable


Grid = tuple[int, int]


def same_grid(grid: Grid) -> Grid:
    """`identity`, `linear` and `mlp`: a token for each feature."""
    return grid


def shuffled_grid(grid: Grid, scale_factor: int = 2, pad: bool = False, crop: bool = False) -> Grid:
    """`pixel_shuffle` and `patch_merger`: a token for each square of `scale_factor` by `scale_factor` features.

    With `pad`, squares at the lower and right edge are filled up, with `crop` they are left out; without either, they must
    be whole.

    Raises:
        ValueError: the grid is no multiple of the factor, and neither is set; or nothing is left.
    """
    rows, columns = grid
    if crop and rows >= scale_factor and columns >= scale_factor:
        return rows // scale_factor, columns // scale_factor
    if not pad and (rows % scale_factor or columns % scale_factor):
        raise ValueError(
            f"A grid of {rows}x{columns} features cannot be cut into squares of {scale_factor}x{scale_factor}. "
            f"{_what_works(grid)}"
        )
    return -(-rows // scale_factor), -(-columns // scale_factor)


def pooled_grid(grid: Grid, ratio: int | None = None, tokens_per_side: int | None = None) -> Grid:
    """`avg_pool`: each side shorter by `ratio` (2 if nothing is said), or `tokens_per_side` on each side.

    No side becomes empty, and none grows: one of fewer features than `tokens_per_side` stays as it is.
    """
    if tokens_per_side is not None:
        return min(grid[0], tokens_per_side), min(grid[1], tokens_per_side)
    ratio = ratio or 2
    return max(grid[0] // ratio, 1), max(grid[1] // ratio, 1)


def convolved_grid(grid: Grid, num_convs: int = 2) -> Grid:
    """`conv`: each convolution halves the sides, rounding up."""
    for _ in range(num_convs):
        grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    return grid


def resampled_grid(grid: Grid, num_queries: int = 64) -> Grid:
    """`resampler`: a token for each query, whatever the picture; they have no place in it."""
    return 1, num_queries


def queried_grid(grid: Grid, num_queries: int = 32) -> Grid:
    """`qformer`: likewise."""
    return 1, num_queries


#: Type of projector -> the function for its grid, and the arguments in its config that this takes.
TOKEN_GRIDS: dict[str, tuple[Callable[..., Grid], tuple[str, ...]]] = {
    "identity": (same_grid, ()),
    "linear": (same_grid, ()),
    "mlp": (same_grid, ()),
    "pixel_shuffle": (shuffled_grid, ("scale_factor", "pad", "crop")),
    "patch_merger": (shuffled_grid, ("scale_factor", "pad", "crop")),
    "avg_pool": (pooled_grid, ("ratio", "tokens_per_side")),
    "conv": (convolved_grid, ("num_convs",)),
    "resampler": (resampled_grid, ("num_queries",)),
    "qformer": (queried_grid, ("num_queries",)),
}

#: Types that look at neighbours, and so need features in rows and columns.
NEED_ROWS_AND_COLUMNS = ("pixel_shuffle", "patch_merger", "avg_pool", "conv")


def token_grid(projector_config: dict, grid: Grid) -> Grid:
    """Rows and columns of tokens that the projector makes of a `grid` of features. `aligned_grid` in its config is the grid
    that it brings any to first (`modeling/feature_alignment.py`).

    Raises:
        ValueError: the projector cannot take this grid, or its type is unknown.
    """
    if projector_config["type"] not in TOKEN_GRIDS:
        known = ", ".join(sorted(TOKEN_GRIDS))
        raise ValueError(f"Unknown projector {projector_config['type']!r}. Choose one of: {known}.")
    function, names = TOKEN_GRIDS[projector_config["type"]]
    rows, columns = projector_config.get("aligned_grid") or grid
    return function((rows, columns), **{name: projector_config[name] for name in names if name in projector_config})


def _what_works(grid: Grid) -> str:
    factors = [factor for factor in range(2, min(grid) + 1) if not (grid[0] % factor or grid[1] % factor)][:3]
    named = f"Set scale_factor to {' or '.join(map(str, factors))}, or" if factors else "Set"
    return (
        f"{named} pad=True (the edge is filled with zeros) or crop=True (it is left out), choose an image_size whose grid "
        'is a multiple, or a projector that takes any grid: "mlp", "avg_pool", "conv".'
    )
