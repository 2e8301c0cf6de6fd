"""Linear layers trained in coordinates in which their inputs have unit variance and do not depend on one another.

Features of a tower lie along few directions, and what tells two pictures apart is often in the others, which plain gradient
steps hardly move; with learning rates that do, tokens grow to hundreds of times the size of embeddings. In whitened
coordinates (Desjardins et al. 2015, "Natural neural networks") all directions learn alike. The layer computes what it did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize


#: Added to the variance of each direction, as a multiple of the mean variance: what hardly varies is mostly noise.
REGULARISATION = 1e-2
#: Wider layers are trained as they are; the eigendecomposition would take longer than it saves.
MAX_FEATURES = 2048
#: Steps of a bias against those of its layer's outputs, and of other parameters against their size.
_BIAS_SHARE, _OTHER_SHARE = 0.3, 0.2


class _Whitened(nn.Module):
    """`weight = whitened @ transform`."""

    def __init__(self, transform: torch.Tensor, inverse: torch.Tensor):
        super().__init__()
        self.register_buffer("transform", transform)
        self.register_buffer("inverse", inverse)

    def forward(self, whitened: torch.Tensor) -> torch.Tensor:
        return whitened @ self.transform

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.inverse


@contextmanager
def whitened_layers(module: nn.Module, run: Callable[[], object]) -> Iterator[list[dict]]:
    """Train `module` with the inputs of its linear layers whitened; afterwards it has ordinary weights again.

    Args:
        module: The projector.
        run: Runs the module on a sample of its inputs.

    Yields:
        Parameter groups for an optimiser that takes steps of one size for all (Adam): each with `scale`, the size of its
        parameters, by which the learning rate is to be multiplied.
    """
    moments, sizes = _measured(module, run)
    parametrized = []
    try:
        groups, seen = [], set()
        for layer, moment in moments.items():
            if moment.shape[0] <= MAX_FEATURES:
                transform, inverse = _transform(moment, layer.weight.dtype)
                parametrize.register_parametrization(layer, "weight", _Whitened(transform, inverse))
                parametrized.append(layer)
                weight = layer.parametrizations.weight.original
            else:
                weight = layer.weight
            groups.append({"params": [weight], "scale": _rms(weight)})
            seen.add(weight)
            if layer.bias is not None:
                groups.append({"params": [layer.bias], "scale": _BIAS_SHARE * sizes[layer]})
                seen.add(layer.bias)
        for parameter in module.parameters():
            if parameter not in seen:
                groups.append({"params": [parameter], "scale": _OTHER_SHARE * max(_rms(parameter), 1e-2)})
        yield groups
    finally:
        for layer in parametrized:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


@torch.no_grad()
def _measured(module: nn.Module, run: Callable[[], object]) -> tuple[dict, dict]:
    """Second moments of the inputs of each linear layer that was called, float64, and the RMS of its outputs."""
    moments: dict[nn.Linear, torch.Tensor] = {}
    counts: dict[nn.Linear, int] = {}
    sizes: dict[nn.Linear, float] = {}

    def look(layer, inputs, outputs) -> None:
        samples = inputs[0].detach().flatten(0, -2).double().cpu()
        moments[layer] = moments.get(layer, 0) + samples.T @ samples
        counts[layer] = counts.get(layer, 0) + len(samples)
        sizes[layer] = _rms(outputs)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {layer: moment / counts[layer] for layer, moment in moments.items()}, sizes


def _transform(moment: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    values = values + REGULARISATION * values.mean().clamp(min=torch.finfo(torch.float32).tiny)
    transform = (vectors * values.rsqrt()) @ vectors.T
    inverse = (vectors * values.sqrt()) @ vectors.T
    return transform.to(dtype), inverse.to(dtype)


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())
