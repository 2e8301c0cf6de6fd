"""A linear map from the features of a new tower to those that a projector was trained for, put in front of it.

The core of a projector is what was trained for features of one width; a `FeatureAlignment` may stand before it. Where the
core begins with a linear map, a map before it is folded into that, and no layer is added.
"""

import copy

import torch
from torch import nn

from ..configuration.token_grids import Grid
from ..modeling.feature_alignment import AlignedProjector
from ..modeling.mlp_projector import MlpProjector
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.projectors import LinearProjector, build_projector
from ..processing.processing_anyvlm import AnyVlmProcessor


_ALIGNMENT = ("aligned_grid", "aligned_features")


def core_projector(projector: nn.Module) -> nn.Module:
    """The projector without what aligns features for it."""
    return projector.projector if isinstance(projector, AlignedProjector) else projector


def core_config(projector_config: dict) -> dict:
    """The `projector_config` of the core alone."""
    width = projector_config.get("aligned_features") or projector_config["in_features"]
    return {**{key: value for key, value in projector_config.items() if key not in _ALIGNMENT}, "in_features": width}


def foldable_layer(core: nn.Module) -> nn.Linear | None:
    """The linear map with a bias by which a core begins place by place; `None` if it begins with something else."""
    layer = None
    if isinstance(core, LinearProjector):
        layer = core.linear
    elif type(core) is MlpProjector and len(core.norms) == 0:
        layer = core.layers[0]
    return None if layer is None or layer.bias is None else layer


def core_features(
    model: AnyVlmForConditionalGeneration, features: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, Grid]:
    """What the core of a model's projector gets: `(num_views, places, width)` and its grid, of the tower's features."""
    projector = model.multi_modal_projector
    if not isinstance(projector, AlignedProjector):
        return features, grid
    linear = projector.alignment.linear
    return projector.alignment(features if linear is None else features.to(linear.weight.dtype), grid)


def mapped_config(core: nn.Module, config: dict, in_features: int, grid: Grid | None) -> dict:
    """The `projector_config` of a core behind a map from features of another width.

    Args:
        core, config: The core and its config.
        in_features: Width of the new features.
        grid: Grid that they are brought to, or `None`.
    """
    mapped = dict(config, in_features=in_features)
    if foldable_layer(core) is None:
        mapped["aligned_features"] = config["in_features"]
    elif config["type"] == "mlp" and not isinstance(config.get("hidden_features"), (list, tuple)):
        # What is left out follows from the widths of the ends.
        mapped["hidden_features"] = [layer.in_features for layer in core.layers[1:]]
    if grid is not None:
        mapped["aligned_grid"] = list(grid)
    return mapped


@torch.no_grad()
def mapped_projector(
    core: nn.Module, config: dict, weight: torch.Tensor, bias: torch.Tensor, grid: Grid | None
) -> tuple[nn.Module, dict]:
    """A projector that maps features linearly to those of a core and hands them to it, and its config.

    Args:
        core, config: The core and its config; neither is changed, and no tensor of it is shared.
        weight, bias: `(core's in_features, new in_features)` and `(core's in_features,)`, of any floating dtype; the
            projector has that of the core, or for one without tensors of its own fp32 at most.
        grid: Grid that features are brought to first, or `None`. A linear map and this commute.
    """
    new_config = mapped_config(core, config, weight.shape[1], grid)
    like = next(core.parameters(), weight if weight.dtype.itemsize < 4 else weight.float())
    projector = build_projector(new_config).to(like.device, like.dtype)
    new_core = core_projector(projector)
    kept = dict(core.state_dict())
    weight, bias = weight.double().to(like.device), bias.double().to(like.device)
    layer = foldable_layer(core)
    if layer is None:
        projector.alignment.linear.weight.copy_(weight)
        projector.alignment.linear.bias.copy_(bias)
    else:
        name = next(name for name, module in core.named_modules() if module is layer)
        kept[f"{name}.weight"] = (layer.weight.double() @ weight).to(like.dtype)
        kept[f"{name}.bias"] = (layer.weight.double() @ bias + layer.bias.double()).to(like.dtype)
    new_core.load_state_dict({key: tensor.clone() for key, tensor in kept.items()})
    return projector.train(core.training), new_config


def set_projector(
    model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor, projector: nn.Module, projector_config: dict
) -> None:
    """Put a projector into a model, and its config where the model and the processor look."""
    model.multi_modal_projector = projector
    model.config.projector_config = copy.deepcopy(projector_config)
    processor.projector_config = copy.deepcopy(projector_config)
