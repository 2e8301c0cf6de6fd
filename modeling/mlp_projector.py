"""The multi-layer projector, on which the projectors that first make fewer tokens are built."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration.token_grids import Grid
from .norms import build_norm


class MlpProjector(nn.Module):
    """`num_layers` linear maps with an activation between them; two are the projector of LLaVA-1.5 (Liu et al. 2023).

    Args:
        in_features: Width of the features.
        out_features: Width of the language model's embeddings.
        hidden_features: Width between the layers, or one for each of the `num_layers - 1` places between them.
            Default: `out_features`.
        num_layers: Number of linear maps; at least one.
        hidden_act: Activation, by transformers' name.
        bias: Whether the linear maps have one.
        norm: A normalisation by its name in `modeling/norms.py` (VipLLaVA, InternVL: `"layer_norm"`), or `None`.
        norm_eps: Its epsilon; `None` for the usual one.
        norm_every_layer: A normalisation before every linear map, and not before the first only.
        gated: Each map but the last gives twice the hidden width, and its second half, through the activation, gates the
            first (SwiGLU of Shazeer 2020 with `hidden_act="silu"`, as in Aya Vision).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | Sequence[int] | None = None,
        num_layers: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
        norm: str | None = None,
        norm_eps: float | None = None,
        norm_every_layer: bool = False,
        gated: bool = False,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"A projector needs num_layers >= 1, got {num_layers}.")
        if hidden_act not in ACT2FN:
            raise ValueError(f"Unknown hidden_act {hidden_act!r}. Choose one of: {', '.join(sorted(ACT2FN))}.")
        if not isinstance(hidden_features, Sequence):
            hidden_features = [hidden_features or out_features] * (num_layers - 1)
        if len(hidden_features) != num_layers - 1:
            raise ValueError(
                f"hidden_features has {len(hidden_features)} widths, but there are {num_layers - 1} places between "
                f"{num_layers} layers. Give one width for all, or {num_layers - 1} of them."
            )
        into, out_of = [in_features, *hidden_features], [*hidden_features, out_features]
        expansion = [2 if gated else 1] * (num_layers - 1) + [1]
        self.gated = gated
        self.norms = nn.ModuleList(
            build_norm(norm, width, norm_eps) for width in (into if norm_every_layer else into[:1]) if norm
        )
        self.layers = nn.ModuleList(
            nn.Linear(before, after * factor, bias=bias) for before, after, factor in zip(into, out_of, expansion)
        )
        self.act = ACT2FN[hidden_act]

    @property
    def output_layer(self) -> nn.Linear:
        return self.layers[-1]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, place by place."""
        hidden_states = features
        for index, layer in enumerate(self.layers):
            if index > 0:
                hidden_states = self._activate(hidden_states)
            if index < len(self.norms):
                hidden_states = self.norms[index](hidden_states)
            hidden_states = layer(hidden_states)
        return hidden_states

    def _activate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.act(hidden_states)
        values, gate = hidden_states.chunk(2, dim=-1)
        return self.act(gate) * values

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        return self.project(features), grid
