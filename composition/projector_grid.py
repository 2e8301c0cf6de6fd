"""Whether a projector can make tokens of what a tower gives."""

import torch

from ..configuration.token_grids import NEED_ROWS_AND_COLUMNS, TOKEN_GRIDS, Grid, token_grid
from ..modeling.projectors import build_projector
from .errors import CompositionError


#: Stands for widths that are not known yet; nearly every number of heads divides it.
_ANY_WIDTH = 2**6 * 3**2 * 5 * 7 * 11 * 13


def check_projector_arguments(projector_config: dict) -> None:
    """Build the projector without weights, before anything is loaded.

    Raises:
        ValueError: an unknown type, or arguments that it does not take or that do not go together.
    """
    with torch.device("meta"):
        build_projector({"in_features": _ANY_WIDTH, "out_features": _ANY_WIDTH, **projector_config})


def check_projector_grid(projector_config: dict, spec: dict, any_grid: bool) -> Grid:
    """The grid of tokens of a picture of the size that the tower was measured with.

    Args:
        spec: The `vision_tower_spec`.
        any_grid: Pictures keep their own sizes, so features may come in any grid.

    Raises:
        CompositionError: the projector needs rows and columns and the features have none, or cannot take their grid, or
            some of the grids of pictures of their own sizes.
    """
    projector_type = projector_config["type"]
    rows, columns = projector_config.get("aligned_grid") or spec["grid"]
    if projector_type in NEED_ROWS_AND_COLUMNS and rows == 1 and columns > 1:
        others = sorted(TOKEN_GRIDS.keys() - set(NEED_ROWS_AND_COLUMNS))
        raise CompositionError(
            f"Projector {projector_type!r} looks at neighbouring features, but the {columns} features of a picture are not "
            f'in rows and columns (they are a detector\'s queries, or vision_feature_select_strategy is "full"). Projectors '
            f'that take them: {", ".join(others)}. Or keep the patches with vision_feature_select_strategy="default".'
        )
    try:
        if any_grid:
            token_grid(projector_config, (rows + 1, columns + 1))
        return token_grid(projector_config, (rows, columns))
    except ValueError as error:
        sizes = (
            ' Pictures keep their own sizes with this tower, unless views="native" rounds them.' if any_grid else ""
        )
        raise CompositionError(f"Projector {projector_type!r}: {error}{sizes}") from error


def complete_projector(projector_config: dict, features_width: int, embedding_width: int, fusion: str) -> dict:
    """The projector's config with its widths.

    Raises:
        CompositionError: it cannot be built between them.
    """
    # Only a fusion takes features of the tower's own width.
    keeps_features = projector_config["type"] == "identity" and fusion != "embed"
    completed = {
        "in_features": features_width,
        "out_features": features_width if keeps_features else embedding_width,
        **projector_config,
    }
    try:
        with torch.device("meta"):
            build_projector(completed)
    except ValueError as error:
        raise CompositionError(str(error)) from error
    return completed
