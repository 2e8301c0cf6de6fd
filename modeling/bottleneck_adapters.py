"""Small networks behind the layers of a part, trained in place of the layers (Houlsby et al. 2019; one behind each layer, as
in Pfeiffer et al. 2020).

They are not linear, so they cannot be merged into weights: they are part of the model, and of its config.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN


#: Name of an adapter inside its layer.
ADAPTER_NAME = "bottleneck_adapter"


class BottleneckAdapter(nn.Module):
    """`x + up(activation(down(x)))`. As made, it changes nothing: `up` is zero.

    Args:
        width: Of the layer's output.
        size: Of what is between.
        activation: One of transformers' `ACT2FN`.
    """

    def __init__(self, width: int, size: int, activation: str = "gelu"):
        super().__init__()
        self.down = nn.Linear(width, size)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(size, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.up(self.activation(self.down(hidden_states)))


def attach_bottleneck_adapters(model: nn.Module, adapters: dict[str, dict[str, Any]] | None) -> None:
    """Give layers their adapters.

    Args:
        adapters: `config.bottleneck_adapters`: name of a part -> `layers`, names of modules, and the arguments of
            `BottleneckAdapter`.

    Raises:
        ValueError: the model has no such layer, because the part was exchanged.
    """
    for part, settings in (adapters or {}).items():
        arguments = {name: value for name, value in settings.items() if name != "layers"}
        for name in settings["layers"]:
            try:
                layer = model.get_submodule(name)
            except AttributeError as error:
                raise ValueError(
                    f"The config has bottleneck adapters for {name}, which the model has not: {part} was exchanged. Set "
                    "config.bottleneck_adapters to None, and add new ones."
                ) from error
            layer.add_module(ADAPTER_NAME, BottleneckAdapter(**arguments))
            layer.register_forward_hook(_after_layer)


def _after_layer(layer: nn.Module, args: tuple, outputs: Any) -> Any:
    """Forward hook of a layer. It holds nothing of the model, so that copies and replicas each use their own adapters."""
    adapter = getattr(layer, ADAPTER_NAME)
    if isinstance(outputs, tuple):
        return (adapter(outputs[0]), *outputs[1:])
    return adapter(outputs)
