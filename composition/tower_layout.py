"""What the axes of a tower's features mean, and which of its tokens are patches."""

import inspect
import math

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling.picture_inputs import tower_arguments
from ..modeling.vision_towers import call_vision_tower
from .errors import CompositionError
from .running import device_of, in_mode, num_channels, synthetic_pictures


def feature_layout(
    features: torch.Tensor, spec: dict, vision_tower: nn.Module, image_size: tuple[int, int], name: str
) -> str:
    """Where the channels of a map are: the axis that is not one of two spatial axes of the picture's proportions."""
    if spec["inputs"] == "tiles":
        return "tiles"
    if spec["output"] == "feature_maps" and features.ndim == 4:
        return "channels_first"  # what a backbone promises
    if features.ndim == 3:
        return "sequence"
    if features.ndim != 4:
        raise CompositionError(
            f"{name} gives features of shape {tuple(features.shape)}, which are neither a sequence nor a map. Pass a "
            "vision tower such as dinov2, siglip or clip."
        )
    _, first, middle, last = features.shape
    height, width = image_size

    def is_map(rows: int, columns: int) -> bool:
        # One stride for both axes, up to a row or column of rounding.
        return abs(rows * width - columns * height) <= max(height, width) and rows <= height and columns <= width

    candidates = []
    if is_map(middle, last):
        candidates.append("channels_first")
    if is_map(first, middle):
        candidates.append("channels_last")
    if len(candidates) != 1:
        # Both fit when there are about as many channels as rows, and none with other strides for rows than for columns
        # (text recognition). Then a width that the config states decides.
        widths = set(_config_widths(vision_tower.config))
        if last in widths and first not in widths:
            candidates = ["channels_last"]
        elif first in widths and last not in widths:
            candidates = ["channels_first"]
    if len(candidates) != 1:
        candidates = _layout_by_other_width(vision_tower, spec, tuple(features.shape), image_size)
    if len(candidates) != 1:
        raise CompositionError(
            f"{name} gives features of shape {tuple(features.shape)}, whose channels cannot be told from its rows and "
            "columns. Compose it with another image_size."
        )
    return candidates[0]


def _layout_by_other_width(vision_tower: nn.Module, spec: dict, shape: tuple[int, ...], image_size) -> list[str]:
    """The layout of a map by which axis grows with a wider picture; empty if the tower takes no wider one."""
    height, width = image_size
    pictures = synthetic_pictures(2, num_channels(vision_tower.config), (height, 2 * width)).to(
        device_of(vision_tower)
    )
    try:
        with torch.no_grad(), in_mode(vision_tower):
            found = call_vision_tower(vision_tower, spec, pictures.to(vision_tower.dtype))[0].shape
    except Exception:  # noqa: BLE001 - a tower of one size may fail in any way
        return []
    grown = [axis for axis in range(4) if found[axis] != shape[axis]]
    return {(3,): ["channels_first"], (2,): ["channels_last"]}.get(tuple(grown), [])


def _config_widths(config: PreTrainedConfig) -> list[int]:
    values = []
    for key in ("hidden_size", "hidden_sizes", "output_channels", "embed_dim", "fpn_hidden_size"):
        value = getattr(config, key, None)
        values.extend(value if isinstance(value, (list, tuple)) else [value])
    return [value for value in values if isinstance(value, int)]


def tokens_beside_patches(vision_tower: nn.Module, spec: dict, num_features: int, width: int) -> tuple[int, int]:
    """How many tokens at the start and at the end of a sequence are not patches.

    Tokens that are not patches (CLS, registers, distillation, detection tokens) enter the tower equal for every
    picture. So: run two different pictures and see which tokens of `hidden_states[0]`, before any attention, agree.
    Hierarchical towers change their number of tokens on the way; there the largest grid of the picture's proportions
    that fits is the map, and what is left over stands in front of it (pvt).
    """
    image_size = tuple(spec["image_size"])
    pictures = synthetic_pictures(2, num_channels(vision_tower.config), image_size)
    pictures = pictures.to(device_of(vision_tower), vision_tower.dtype)
    with torch.no_grad(), in_mode(vision_tower):
        arguments = {**tower_arguments(spec, pictures, {}), **spec["call_kwargs"]}
        outputs = vision_tower(**arguments, **_hidden_states_argument(vision_tower))
    if isinstance(outputs, torch.Tensor):
        return num_features - math.prod(_largest_grid(num_features, image_size)), 0
    hidden_states = outputs.get("hidden_states")
    if hidden_states and hidden_states[0].ndim == 3 and hidden_states[0].shape[1] == num_features:
        is_patch = (hidden_states[0][0] != hidden_states[0][1]).any(-1)
        if bool(is_patch.any()):
            positions = is_patch.nonzero().squeeze(1)
            return int(positions[0]), num_features - 1 - int(positions[-1])
    num_places = _places_of_map(hidden_states[-1], width) if hidden_states else None
    if num_places is None or num_places > num_features:
        num_places = math.prod(_largest_grid(num_features, image_size))
    return num_features - num_places, 0


def _places_of_map(hidden_state: torch.Tensor, width: int) -> int | None:
    """Places of a hidden state that is a map of the given width (timm's, of which the other tokens were cut off)."""
    if hidden_state.ndim != 4:
        return None
    _, first, middle, last = hidden_state.shape
    return middle * last if first == width else first * middle if last == width else None


def _hidden_states_argument(vision_tower: nn.Module) -> dict:
    """`output_hidden_states` for a tower that takes it; some (cvt, align) raise or take nothing of the kind."""
    parameters = inspect.signature(vision_tower.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"output_hidden_states": True} if takes_any or "output_hidden_states" in parameters else {}


def _largest_grid(num_features: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """The largest `(rows, columns)` of the picture's proportions with at most `num_features` cells."""
    height, width = image_size
    rows = int(math.sqrt(num_features * height / width) + 1e-6)
    while rows > 0:
        columns = round(rows * width / height)
        if columns and rows * columns <= num_features:
            return rows, columns
        rows -= 1
    return 1, num_features


def factor_grid(num_patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Grid of `num_patches` patches, or one row if they do not fill a grid of the picture's proportions."""
    grid = _largest_grid(num_patches, image_size)
    return grid if math.prod(grid) == num_patches else (1, num_patches)
