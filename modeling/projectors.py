"""Projectors: from the tower's features to tokens in the language model's embedding space.

A projector is called with `features` of shape `(num_images, num_features, in_features)` and the features' grid
`(rows, columns)`; it returns `(tokens, grid)` with tokens of shape `(num_images, num_tokens, out_features)`.
Its `output_layer` is the last linear map; what follows it is linear too, so that its scale sets the scale of the tokens.
It is `None` where there is nothing to scale.
"""

import torch
from torch import nn

from ..configuration.token_grids import Grid
from .feature_alignment import AlignedProjector, FeatureAlignment
from .grid_projectors import AvgPoolProjector, ConvProjector, PatchMergerProjector, PixelShuffleProjector
from .mlp_projector import MlpProjector
from .qformer_projector import QFormerProjector
from .query_projectors import ResamplerProjector


class LinearProjector(nn.Module):
    """One linear map, as in the first LLaVA (Liu et al. 2023)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        return self.linear(features), grid


class IdentityProjector(nn.Module):
    """No projector, for towers that give tokens of the language model's width themselves (Qwen2-VL, Wang et al. 2024, whose
    tower ends in a merger of patches), or for a fusion that maps features itself (Idefics)."""

    output_layer = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        if in_features != out_features:
            raise ValueError(
                f"An identity projector leaves features as they are, but the tower's are {in_features} wide and the "
                f'language model\'s embeddings {out_features}. Use projector="mlp".'
            )

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        return features, grid


#: Type in `projector_config` -> class. What tokens a type makes of a grid is in `configuration/token_grids.py`.
PROJECTORS: dict[str, type[nn.Module]] = {
    "identity": IdentityProjector,
    "linear": LinearProjector,
    "mlp": MlpProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "patch_merger": PatchMergerProjector,
    "avg_pool": AvgPoolProjector,
    "conv": ConvProjector,
    "resampler": ResamplerProjector,
    "qformer": QFormerProjector,
}


def build_projector(projector_config: dict) -> nn.Module:
    """Build the projector that `projector_config` describes: its `type`, and the arguments of that class; behind a
    `FeatureAlignment` where the config has `aligned_grid` or `aligned_features`.

    Raises:
        ValueError: unknown type (the known ones are listed), or an argument that the class does not take.
    """
    arguments = dict(projector_config)
    projector_type = arguments.pop("type", None)
    grid, width = arguments.pop("aligned_grid", None), arguments.pop("aligned_features", None)
    if projector_type not in PROJECTORS:
        raise ValueError(f"Unknown projector {projector_type!r}. Choose one of: {', '.join(sorted(PROJECTORS))}.")
    alignment = None
    if grid is not None or width is not None:
        alignment = FeatureAlignment(arguments["in_features"], width, grid)
        arguments["in_features"] = width or arguments["in_features"]
    try:
        projector = PROJECTORS[projector_type](**arguments)
    except TypeError as error:
        raise ValueError(f"Projector {projector_type!r} cannot be built from {arguments}: {error}.") from error
    return projector if alignment is None else AlignedProjector(alignment, projector)
