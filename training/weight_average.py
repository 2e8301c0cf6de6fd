"""A teacher that is the moving average of what is trained (Tarvainen & Valpola 2017, "Mean teachers")."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(nn.Module):
    """The moving average of those parameters of a model that require a gradient now, in single precision; the frozen ones
    are not copied. Its buffers are its state, so whoever holds it as a module saves it along.

    The average begins fast and slows down: its decay after n updates is `min(decay, (1 + n) / (10 + n))`, as in TensorFlow's
    `ExponentialMovingAverage`, or it would stay near the untrained weights for the first `1 / (1 - decay)` steps.

    Args:
        model: What is trained, with or without adapters.
        decay: Of the average, in the long run.

    Raises:
        ValueError: nothing in the model is trained, or `decay` is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and less than 1, such as 0.999.")
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("Nothing in this model is trained. Choose what is before its average is made.")
        # Names of buffers have no dots.
        self._names = {name: name.replace(".", "/") for name in trained}
        for name, parameter in trained.items():
            self.register_buffer(self._names[name], parameter.detach().float().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights as they are now into the average."""
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        averages, parameters = zip(*self._pairs(model))
        get_ema_multi_avg_fn(decay)(
            list(averages), [p.detach().to(a.dtype) for a, p in zip(averages, parameters)], None
        )
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages for weights, and its own again afterwards. Graphs made before are not disturbed."""
        pairs = self._pairs(model)
        own = [parameter.data for _, parameter in pairs]
        try:
            for average, parameter in pairs:
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for (_, parameter), data in zip(pairs, own):
                parameter.data = data

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averages for good."""
        for average, parameter in self._pairs(model):
            parameter.copy_(average)

    def _pairs(self, model: nn.Module) -> list[tuple[torch.Tensor, nn.Parameter]]:
        parameters = dict(extract_model_from_parallel(model).named_parameters())
        pairs = [(getattr(self, buffer), parameters[name]) for name, buffer in self._names.items()]
        if any(average.shape != parameter.shape for average, parameter in pairs):
            raise ValueError(
                "The model's parameters are sharded over processes, which an average of them is not made for."
            )
        return pairs
