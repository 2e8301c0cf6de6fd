"""What a stage trains, set up on a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..parts.part_settings import PartProblem, PartsError
from ..parts.trained_parts import TrainedParts, train_parts
from .schema import PART_ALIASES


#: Values of `train` that mean adapters -> the type of `add_adapters`.
ADAPTERS = {"lora": "lora", "dora": "dora", "bottleneck": "bottleneck"}
#: The smallest of what LoRA needs (Hu et al. 2021), where a recipe does not say.
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def full_names(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`projector` as the model calls it."""
    return {PART_ALIASES.get(name, name): dict(settings) for name, settings in parts.items()}


def prepare_parts(
    model: PreTrainedModel, parts: Mapping[str, Mapping[str, Any]], base_model: str = ""
) -> tuple[nn.Module, TrainedParts]:
    """Adapters where a stage asks for them, and all else frozen or trained as it says. Bottleneck adapters of a stage before
    are trained further.

    Args:
        base_model: Where the model is as it is now, for the adapter that is saved.

    Raises:
        ValueError: parts, layers or targets that the model has not.
    """
    parts = full_names(parts)
    adapters = {
        name: {"type": ADAPTERS[settings["train"]], **_adapter_settings(settings)}
        for name, settings in parts.items()
        if settings.get("train") in ADAPTERS and not _has_bottlenecks(model, name, settings)
    }
    adapted: nn.Module = model
    if adapters:
        from ..parts.adapters import add_adapters

        others = {
            name: settings
            for name, settings in parts.items()
            if name not in adapters and settings.get("train") != "frozen"
        }
        # What is trained without adapters has to be named, or checkpoints and the saved adapter would be without it.
        whole = trained_modules(model, train_parts(model, others)) if others else []
        adapted = add_adapters(model, adapters, also_train=whole, base_model=base_model)
    return adapted, train_parts(adapted, parts)


def _adapter_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    if settings["train"] == "bottleneck":
        return settings.get("bottleneck") or {}
    return settings.get("lora") or LORA


def _has_bottlenecks(model: PreTrainedModel, part: str, settings: Mapping[str, Any]) -> bool:
    """Whether the part has them already.

    Raises:
        PartsError: and they are others than those asked for.
    """
    present = (model.config.bottleneck_adapters or {}).get(part)
    if settings["train"] != "bottleneck" or present is None:
        return False
    known = {"r": present["size"], "activation": present["activation"]}
    if not known.items() >= dict(settings.get("bottleneck") or {}).items():
        message = f"it has adapters already, with {known}, which stay; leave this out to train them further."
        raise PartsError([PartProblem((part, "bottleneck"), message)])
    return True


def in_single_precision(model: nn.Module) -> None:
    """What is trained, in float32: the steps of a small rate are lost in rounding to bfloat16. For mixed precision, which
    computes in bfloat16 all the same."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def restore_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """As they were before, so that the next stage begins with what a checkpoint would give."""
    for name, parameter in model.named_parameters():
        if name in dtypes and parameter.dtype != dtypes[name]:
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])


def trained_modules(model: nn.Module, trained: TrainedParts) -> list[str]:
    """The largest modules of which every parameter is trained, in the model's order."""
    names = {name for part in trained.parts for group in part.groups for name in group.parameters}
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if name and inside and names.issuperset(inside) and not name.startswith(tuple(f"{above}." for above in found)):
            found.append(name)
    alone = [name for name in names if not name.startswith(tuple(f"{module}." for module in found))]
    return [*found, *sorted(alone)]


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The model with its adapters merged into its weights."""
    if isinstance(model, PreTrainedModel):
        return model
    return model.merge_and_unload()
