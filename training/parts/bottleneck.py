"""Bottleneck adapters on chosen parts: they become part of the model, and its checkpoints stay whole."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ...modeling.bottleneck_adapters import ADAPTER_NAME, attach_bottleneck_adapters
from .layer_groups import LAYER, layer_groups


#: Of `r` and `activation`, where they are not given; the size is that of Houlsby et al.
DEFAULTS = {"r": 64, "activation": "gelu"}


def add_bottleneck_adapters(
    model: PreTrainedModel, parts: Mapping[str, Mapping[str, Any]], whole: Sequence[str]
) -> PreTrainedModel:
    """Freeze a model, and put an adapter behind every layer of the parts.

    Args:
        parts: Name of a part -> `r`, the width of the bottleneck, and `activation`.
        whole: Modules and parameters that are trained whole beside them.

    Raises:
        ValueError: a setting that is unknown, a part without layers, or whose layers do not give a sequence; layers that
            have such adapters already.
    """
    described = {part: _described(model, part, settings) for part, settings in parts.items()}
    present = dict(model.config.bottleneck_adapters or {})
    names = [name for settings in (*present.values(), *described.values()) for name in settings["layers"]]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{', '.join(described)}: layers would have two bottleneck adapters (there are already: "
            f"{', '.join(present) or 'none'}). Train those that are there, or begin with the model without."
        )
    model.requires_grad_(False)
    attach_bottleneck_adapters(model, described)
    model.config.bottleneck_adapters = {**present, **described}
    for settings in described.values():
        for name in settings["layers"]:
            layer = model.get_submodule(name)
            adapter = getattr(layer, ADAPTER_NAME)
            like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
            adapter.reset_parameters()
            adapter.to(device=like.device, dtype=like.dtype)
    added = [f"{name}.{ADAPTER_NAME}" for settings in described.values() for name in settings["layers"]]
    trained = tuple(f"{module}." for module in (*added, *whole))
    for name, parameter in model.named_parameters():
        if name.startswith(trained) or name in whole:
            parameter.requires_grad_(True)
    # Without this, gradient checkpointing that is reentrant gives frozen layers' adapters no gradient.
    model.enable_input_require_grads()
    return model


def _described(model: PreTrainedModel, part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    unknown = settings.keys() - {"type", *DEFAULTS}
    if unknown:
        raise ValueError(
            f"{part}: a bottleneck adapter has no {', '.join(sorted(unknown))}. Its settings: {', '.join(DEFAULTS)}."
        )
    values = {**DEFAULTS, **settings}
    if values["activation"] not in ACT2FN:
        raise ValueError(f"{part}: there is no activation {values['activation']!r}. Known: {', '.join(ACT2FN)}.")
    module = model.get_submodule(part)
    names = [
        f"{part}.{name}"
        for group in layer_groups(module)
        if group.kind == LAYER and group.name
        for name in group.modules or (group.name,)
    ]
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    if not names or width is None or any(isinstance(child, nn.Conv2d) for n in names for child in _of(model, n)):
        raise ValueError(
            f"{part} has no layers of one width that bottleneck adapters could stand behind. Use LoRA there "
            '("type": "lora").'
        )
    return {"layers": names, "width": int(width), "size": int(values["r"]), "activation": values["activation"]}


def _of(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(name).modules())
