"""Projectors that make fewer tokens of a grid of features by looking at neighbours.

All of them take grids of any proportions. What becomes of a grid is in `configuration/token_grids.py`, which the
processor asks as well.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration.token_grids import Grid, convolved_grid, pooled_grid, shuffled_grid
from .mlp_projector import MlpProjector
from .norms import build_norm


CHANNEL_ORDERS = ("places_first", "channels_first")


def pixel_shuffle(
    features: torch.Tensor, grid: Grid, scale_factor: int, channel_order: str = "places_first", crop: bool = False
) -> torch.Tensor:
    """Features of each square of `scale_factor` by `scale_factor` places as one feature.

    Squares that are cut off at the lower and right edge of the grid are filled with zeros, or with `crop` left out.

    Args:
        features: `(num_images, rows * columns, channels)`.
        channel_order: `"places_first"`: all channels of the upper left place, then of the place right of it, and so on
            (Idefics3, InternVL, Aya Vision, Cohere2 Vision). `"channels_first"`: the first channel of all places, then
            the second, and so on (`torch.nn.functional.unfold`, Mistral 3).

    Returns:
        `(num_images, number of squares, channels * scale_factor ** 2)`, squares row by row.
    """
    batch_size, _, channels = features.shape
    features = features.reshape(batch_size, *grid, channels)
    rows, columns = shuffled_grid(grid, scale_factor, pad=not crop, crop=crop)
    below, right = rows * scale_factor - grid[0], columns * scale_factor - grid[1]
    if below or right:  # negative ones are cut off
        features = F.pad(features, (0, 0, 0, right, 0, below))
    features = features.reshape(batch_size, rows, scale_factor, columns, scale_factor, channels)
    axes = (0, 1, 3, 2, 4, 5) if channel_order == "places_first" else (0, 1, 3, 5, 2, 4)
    return features.permute(axes).reshape(batch_size, rows * columns, channels * scale_factor**2)


class PixelShuffleProjector(MlpProjector):
    """Squares of features side by side in the channels, then an mlp (Idefics3, Laurençon et al. 2024: one linear map
    without bias; InternVL, Chen et al. 2024: a layer norm and two maps; Aya Vision: a gated mlp).

    Args:
        scale_factor: Edge of a square, in features.
        channel_order: See `pixel_shuffle`.
        pad: Fill the squares at the edge with zeros where the grid is no multiple of the factor (as VILA does).
        crop: Leave them out (as LightOnOCR does). With neither, such a grid is a `ValueError`.
        kwargs: As for `mlp`, whose input is `in_features * scale_factor ** 2` wide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale_factor: int = 2,
        channel_order: str = "places_first",
        pad: bool = False,
        crop: bool = False,
        **kwargs,
    ):
        _check_shuffle(scale_factor, channel_order, pad and crop)
        super().__init__(in_features * scale_factor**2, out_features, **kwargs)
        self.scale_factor = scale_factor
        self.channel_order = channel_order
        self.pad = pad
        self.crop = crop

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        tokens_grid = shuffled_grid(grid, self.scale_factor, self.pad, self.crop)
        return self.project(
            pixel_shuffle(features, grid, self.scale_factor, self.channel_order, self.crop)
        ), tokens_grid


class PatchMergerProjector(MlpProjector):
    """A normalisation, a linear map from each square of features to one of the same width, and an mlp (Mistral 3).

    Args:
        scale_factor, channel_order, pad, crop: As for `pixel_shuffle`.
        norm, norm_eps: Of the features before they are merged; `None` for none.
        kwargs: As for `mlp`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale_factor: int = 2,
        channel_order: str = "channels_first",
        pad: bool = False,
        crop: bool = False,
        norm: str | None = "rms_norm",
        norm_eps: float | None = None,
        **kwargs,
    ):
        _check_shuffle(scale_factor, channel_order, pad and crop)
        super().__init__(in_features, out_features, **kwargs)
        self.scale_factor = scale_factor
        self.channel_order = channel_order
        self.pad = pad
        self.crop = crop
        self.features_norm = nn.Identity() if norm is None else build_norm(norm, in_features, norm_eps)
        self.merging_layer = nn.Linear(in_features * scale_factor**2, in_features, bias=False)

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        tokens_grid = shuffled_grid(grid, self.scale_factor, self.pad, self.crop)
        squares = pixel_shuffle(self.features_norm(features), grid, self.scale_factor, self.channel_order, self.crop)
        return self.project(self.merging_layer(squares)), tokens_grid


class AvgPoolProjector(MlpProjector):
    """The mean of neighbouring features, and an mlp (Gemma 3: an RMS norm and one matrix; PerceptionLM: two maps, and
    the mean is taken of the tokens).

    Args:
        ratio: Each side becomes shorter by this factor; 2 if `tokens_per_side` is not given either.
        tokens_per_side: Or rows and columns of tokens, whatever the grid; a side of fewer features keeps them.
        pool_last: Take the mean of tokens, and not of features.
        kwargs: As for `mlp`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ratio: int | None = None,
        tokens_per_side: int | None = None,
        pool_last: bool = False,
        **kwargs,
    ):
        if ratio is not None and tokens_per_side is not None:
            raise ValueError("avg_pool takes ratio or tokens_per_side, not both.")
        for name, value in (("ratio", ratio), ("tokens_per_side", tokens_per_side)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        super().__init__(in_features, out_features, **kwargs)
        self.ratio = ratio
        self.tokens_per_side = tokens_per_side
        self.pool_last = pool_last

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        tokens_grid = pooled_grid(grid, self.ratio, self.tokens_per_side)
        if self.pool_last:
            return avg_pool(self.project(features), grid, tokens_grid), tokens_grid
        return self.project(avg_pool(features, grid, tokens_grid)), tokens_grid


def avg_pool(features: torch.Tensor, grid: Grid, tokens_grid: Grid) -> torch.Tensor:
    """Means of `(num_images, rows * columns, channels)`; where sides do not divide, neighbouring means overlap."""
    pictures = features.transpose(1, 2).unflatten(2, grid)
    if grid[0] % tokens_grid[0] == 0 and grid[1] % tokens_grid[1] == 0:
        pooled = F.avg_pool2d(pictures.contiguous(), (grid[0] // tokens_grid[0], grid[1] // tokens_grid[1]))
    else:
        pooled = F.adaptive_avg_pool2d(pictures, tokens_grid)
    return pooled.flatten(2).transpose(1, 2)


class ConvProjector(nn.Module):
    """Convolutions of stride 2 with twice the channels each, the last to the language model's width, and a linear map
    (GOT-OCR 2.0, Wei et al. 2024).

    Args:
        num_convs: Number of convolutions; each halves rows and columns.
    """

    def __init__(self, in_features: int, out_features: int, num_convs: int = 2):
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"A conv projector needs num_convs >= 1, got {num_convs}.")
        self.num_convs = num_convs
        widths = [in_features * 2**index for index in range(num_convs)] + [out_features]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            for before, after in zip(widths[:-1], widths[1:])
        )
        self.linear = nn.Linear(out_features, out_features)

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        hidden_states = features.transpose(1, 2).unflatten(2, grid)
        for conv in self.convs:
            hidden_states = conv(hidden_states)
        return self.linear(hidden_states.flatten(2).transpose(1, 2)), convolved_grid(grid, self.num_convs)


def _check_shuffle(scale_factor: int, channel_order: str, pads_and_crops: bool) -> None:
    if pads_and_crops:
        raise ValueError("pad fills the squares at the edge and crop leaves them out: set one of them, not both.")
    if scale_factor < 1:
        raise ValueError(f"scale_factor must be at least 1, got {scale_factor}.")
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"Unknown channel_order {channel_order!r}. Choose one of: {', '.join(CHANNEL_ORDERS)}.")
