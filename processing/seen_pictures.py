"""Pictures whose features are known, so that they need no pixels: a frozen tower saw them before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration.image_tokens import Grid


#: The key by which a picture given as a mapping is told to be one.
TOWER_FEATURES = "tower_features"


@dataclass(frozen=True, eq=False)
class SeenPicture:
    """A picture that the tower saw before.

    Args:
        height, width: Pixels of the picture before it was cut into views.
        tower_features: `(all features, hidden_size)`, of all its views, one after another.
        grids: Rows and columns of features of each view.
    """

    height: int
    width: int
    tower_features: torch.Tensor
    grids: tuple[Grid, ...]


def seen_picture(image: Any) -> SeenPicture | None:
    """A mapping with the arguments of `SeenPicture`, as one; `None` for anything else.

    A mapping, as the code of a checkpoint has classes of its own beside the package's.
    """
    if isinstance(image, Mapping) and TOWER_FEATURES in image:
        return SeenPicture(**{**image, "grids": tuple(map(tuple, image["grids"]))})
    return None


def seen_pictures_outputs(seen: Sequence[SeenPicture | None], numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """`tower_features` and `tower_grids` of a batch.

    Args:
        seen: For each picture or video; `None` for one that comes as pixels.
        numbers: The views of each.
    """
    grids = [
        grid for picture, number in zip(seen, numbers) for grid in (picture.grids if picture else [(0, 0)] * number)
    ]
    features = [picture.tower_features for picture in seen if picture]
    return {TOWER_FEATURES: torch.cat(features), "tower_grids": torch.tensor(grids)}
