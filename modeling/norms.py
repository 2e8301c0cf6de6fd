"""Normalisations that projectors use, by name."""

import torch
from torch import nn


class RmsNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019), computed in fp32, with llama's order of the casts.

    Args:
        zero_centered: The weight is what is added to one, as in gemma, and not the factor itself. Then the product is
            cast, and not its first factor.
    """

    def __init__(self, width: int, eps: float = 1e-6, zero_centered: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        values = hidden_states.float()
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (values * (1.0 + self.weight.float())).type_as(hidden_states)
        return self.weight * values.type_as(hidden_states)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"


NORMS = ("layer_norm", "rms_norm", "zero_centered_rms_norm")


def build_norm(norm: str, width: int, eps: float | None = None) -> nn.Module:
    """A normalisation over the last axis.

    Args:
        norm: One of `NORMS`.
        eps: Default: 1e-5 for a layer norm, 1e-6 for the others, as in torch and transformers.

    Raises:
        ValueError: an unknown name.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}. Choose one of: {', '.join(NORMS)}.")
    if norm == "layer_norm":
        return nn.LayerNorm(width, eps=1e-5 if eps is None else eps)
    return RmsNorm(width, 1e-6 if eps is None else eps, zero_centered=norm == "zero_centered_rms_norm")
