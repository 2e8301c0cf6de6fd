"""Projectors: from the tower's features to tokens in the language model's embedding space.

A projector is called with `features` of shape `(num_images, num_features, in_features)` and the features' grid
`(rows, columns)`; it returns `(tokens, grid)` with tokens of shape `(num_images, num_tokens, out_features)`.
Its `output_layer` is the last linear map, whose scale sets the scale of the tokens.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN


Grid = tuple[int, int]


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


class MlpProjector(nn.Module):
    """`num_layers` linear maps with an activation between them; two are the projector of LLaVA-1.5 (Liu et al. 2023)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        num_layers: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
    ):
        super().__init__()
        if num_layers < 2:
            raise ValueError(f'An mlp projector needs num_layers >= 2, got {num_layers}; for one layer use "linear".')
        hidden_features = hidden_features or out_features
        widths = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=bias) for before, after in zip(widths[:-1], widths[1:])
        )
        self.act = ACT2FN[hidden_act]

    @property
    def output_layer(self) -> nn.Linear:
        return self.layers[-1]

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        hidden_states = self.layers[0](features)
        for layer in self.layers[1:]:
            hidden_states = layer(self.act(hidden_states))
        return hidden_states, grid


PROJECTORS: dict[str, type[nn.Module]] = {"linear": LinearProjector, "mlp": MlpProjector}


def build_projector(projector_config: dict) -> nn.Module:
    """Build the projector that `projector_config` describes: its `type`, and the arguments of that class.

    Raises:
        ValueError: unknown type (the known ones are listed), or an argument that the class does not take.
    """
    arguments = dict(projector_config)
    projector_type = arguments.pop("type", None)
    if projector_type not in PROJECTORS:
        raise ValueError(f"Unknown projector {projector_type!r}. Choose one of: {', '.join(sorted(PROJECTORS))}.")
    try:
        return PROJECTORS[projector_type](**arguments)
    except TypeError as error:
        raise ValueError(f"Projector {projector_type!r} cannot be built from {arguments}: {error}.") from error
