"""The resampler: learned queries look at the features and become a fixed number of tokens of any picture.

The tokens of a picture have no place in it, so their grid is `(1, num_queries)` whatever the grid of the features.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..configuration.token_grids import Grid
from .mlp_projector import MlpProjector
from .norms import build_norm


POSITIONS = ("sincos_2d",)


def sincos_positions_2d(grid: Grid, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Positions of a grid `(rows, columns)`, `(rows * columns, width)` in fp32: sine and cosine of the column in the
    first half of the channels, of the row in the second (He et al. 2021; in MiniCPM-V, Yao et al. 2024, for the true
    grid of each picture).

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f'positions="sincos_2d" needs a width that is a multiple of 4, got {width}.')
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64  # which mps has not
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=device, dtype=dtype) / (width // 4))

    def encode(length: int) -> torch.Tensor:
        angles = torch.arange(length, device=device, dtype=dtype).unsqueeze(1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    rows, columns = grid
    by_column = encode(columns).expand(rows, -1, -1)
    by_row = encode(rows).unsqueeze(1).expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)


class QueryAttention(nn.Module):
    """Attention of queries to keys and values of another sequence, with fewer key-value heads if wanted (Ainslie et al.
    2023)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=bias)
        self.q_norm, self.k_norm = query_norm or nn.Identity(), key_norm or nn.Identity()

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`(B, Q, width)`, `(B, N, width)`, `(B, N, width)` to `(B, Q, width)`."""
        groups = self.num_heads // self.num_key_value_heads
        query = self.q_norm(self._heads(self.q_proj(queries), self.num_heads))
        key = self.k_norm(self._heads(self.k_proj(keys), self.num_key_value_heads)).repeat_interleave(groups, dim=1)
        value = self._heads(self.v_proj(values), self.num_key_value_heads).repeat_interleave(groups, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
        return hidden_states.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)


class ResamplerLayer(nn.Module):
    """Queries look at the features, and an mlp follows if there is one; see `ResamplerProjector` for the arguments."""

    def __init__(
        self,
        width: int,
        attention: dict,
        norm: str,
        norm_eps: float | None,
        residual: bool,
        queries_as_context: bool,
        qk_norm: bool,
        mlp: dict | None,
    ):
        super().__init__()
        self.residual, self.queries_as_context = residual, queries_as_context
        self.queries_norm = build_norm(norm, width, norm_eps)
        self.context_norm = build_norm(norm, width, norm_eps)
        norms = [build_norm(norm, attention["head_dim"], norm_eps) for _ in range(2)] if qk_norm else []
        self.attention = QueryAttention(width, **attention, **dict(zip(("query_norm", "key_norm"), norms)))
        self.mlp_norm = None if mlp is None else build_norm(norm, width, norm_eps)
        self.mlp = None if mlp is None else MlpProjector(width, width, **mlp)

    def forward(self, queries: torch.Tensor, context: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        normed, values = self.queries_norm(queries), self.context_norm(context)
        keys = values if positions is None else values + positions
        if self.queries_as_context:
            keys, values = torch.cat([keys, normed], dim=1), torch.cat([values, normed], dim=1)
        attended = self.attention(normed, keys, values)
        queries = queries + attended if self.residual else attended
        if self.mlp is not None:
            queries = queries + self.mlp.project(self.mlp_norm(queries))
        return queries


class ResamplerProjector(nn.Module):
    """Learned queries with one or more layers of cross-attention to the features.

    As it comes: one layer, keys with 2-D positions by the true grid of each picture (MiniCPM-V, Yao et al. 2024). The
    perceiver of Idefics2 (Laurençon et al. 2024) has `num_layers=3`, `positions=None`, `norm="rms_norm"`,
    `attention_bias=False`, `residual=True`, `queries_as_context=True`, a gated `mlp`, `output_projection=False`, and as
    `input_projection` a gated mlp.

    Args:
        in_features: Width of the features.
        out_features: Width of the language model's embeddings.
        num_queries: Number of tokens of a picture.
        num_layers: Number of layers.
        hidden_features: Width of queries and layers. Default: `out_features`, rounded up to a multiple of 4 where an output
            projection follows.
        num_attention_heads: Default: heads of 128 channels or more.
        num_key_value_heads: Default: as many.
        head_dim: Default: `hidden_features / num_attention_heads`.
        attention_bias: Whether the linear maps of the attention have a bias.
        positions: `"sincos_2d"`, added to the keys, or `None`.
        norm, norm_eps: Of queries, features and result, see `modeling/norms.py`.
        residual: Add the queries to what attention gives.
        queries_as_context: Queries attend to one another too.
        qk_norm: Normalise queries and keys of each head.
        mlp: Arguments of an `mlp` projector (`modeling/mlp_projector.py`) that follows each attention; `None` for none.
        input_projection: Arguments of an `mlp` projector from `in_features` to `hidden_features`. Default: one linear map
            without bias where these widths differ.
        output_projection: A linear map without bias to `out_features` at the end.

    Raises:
        ValueError: widths, heads or positions that do not fit together.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_queries: int = 64,
        num_layers: int = 1,
        hidden_features: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        attention_bias: bool = True,
        positions: str | None = "sincos_2d",
        norm: str = "layer_norm",
        norm_eps: float | None = 1e-6,
        residual: bool = False,
        queries_as_context: bool = False,
        qk_norm: bool = False,
        mlp: dict | None = None,
        input_projection: dict | None = None,
        output_projection: bool = True,
    ):
        super().__init__()
        check_counts(num_queries=num_queries, num_layers=num_layers)
        if positions is not None and positions not in POSITIONS:
            raise ValueError(f"Unknown positions {positions!r}. Choose one of: {', '.join(POSITIONS)}, or None.")
        if hidden_features and not output_projection:
            raise ValueError(
                "Without an output projection the resampler is as wide as the language model's embeddings. Leave out "
                "hidden_features, or set output_projection=True."
            )
        width = hidden_features or (-(-out_features // 4) * 4 if output_projection else out_features)
        if positions is not None:
            sincos_positions_2d((1, 1), width)
        attention = _attention_shape(width, num_attention_heads, num_key_value_heads, head_dim)
        attention["bias"] = attention_bias
        self.positions = positions
        if input_projection is None and in_features != width:
            input_projection = {"num_layers": 1, "bias": False}
        self.input_projection = (
            None if input_projection is None else MlpProjector(in_features, width, **input_projection)
        )
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.layers = nn.ModuleList(
            ResamplerLayer(width, attention, norm, norm_eps, residual, queries_as_context, qk_norm, mlp)
            for _ in range(num_layers)
        )
        self.norm = build_norm(norm, width, norm_eps)
        self.output_projection = nn.Linear(width, out_features, bias=False) if output_projection else None
        nn.init.trunc_normal_(self.queries, std=0.02)

    @property
    def output_layer(self) -> nn.Module:
        return self.norm if self.output_projection is None else self.output_projection

    def forward(self, features: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
        context = features if self.input_projection is None else self.input_projection.project(features)
        positions = None
        if self.positions is not None:
            positions = sincos_positions_2d(grid, context.shape[-1], context.device).to(context.dtype)
        hidden_states = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, context, positions)
        tokens = self.norm(hidden_states)
        if self.output_projection is not None:
            tokens = self.output_projection(tokens)
        return tokens, (1, len(self.queries))


def _attention_shape(
    width: int, num_heads: int | None, num_key_value_heads: int | None, head_dim: int | None
) -> dict[str, int]:
    """Heads and their width, completed."""
    if num_heads is None:
        num_heads = next(count for count in range(max(1, width // (head_dim or 128)), 0, -1) if width % count == 0)
    num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
    if num_heads < 1 or num_key_value_heads < 1 or num_heads % num_key_value_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_key_value_heads}."
        )
    if head_dim is None and width % num_heads:
        raise ValueError(
            f"The resampler is {width} wide, which {num_heads} heads do not divide. Choose another num_attention_heads, or "
            "set head_dim."
        )
    return {
        "num_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim or width // num_heads,
    }


def check_counts(**counts: int) -> None:
    """
    Raises:
        ValueError: a count that is not at least 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
