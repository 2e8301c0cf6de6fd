"""Understand a part by running it once, so that nothing is decided by its name.

What is learned about a tower is written into `AnyVlmConfig.vision_tower_spec` (keys in `modeling/vision_towers.py`).
Shapes are taken on the meta device, without weights or arithmetic; what shapes cannot tell, and towers that cannot run
on the meta device, take one small real run.
"""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling.vision_towers import build_vision_tower, call_vision_tower, to_sequence
from .errors import CompositionError


def probe_vision_tower(
    vision_tower: nn.Module,
    image_size: tuple[int, int],
    layer: int | Sequence[int] | None = None,
    select_strategy: str = "default",
) -> dict:
    """Measure how a tower is called and read; returns the `vision_tower_spec`.

    Args:
        vision_tower: The bare transformers model.
        image_size: Pixels `(height, width)` of the pictures that the image processor makes.
        layer: As `AnyVlmConfig.vision_feature_layer`.
        select_strategy: As `AnyVlmConfig.vision_feature_select_strategy`.

    Raises:
        CompositionError: the tower takes something else than pictures of this size, or its output cannot be read.
    """
    name = type(vision_tower).__name__
    _check_inputs(vision_tower, name)
    call_kwargs, raw_features = _run(vision_tower, image_size, layer, name)
    layouts = {_layout(features, vision_tower.config, image_size, name) for features in raw_features}
    shapes = {tuple(to_sequence(features, layout).shape[1:2]) for features in raw_features for layout in layouts}
    if len(layouts) > 1 or len(shapes) > 1:
        raise CompositionError(
            f"The layers {layer} of {name} have features of different shapes "
            f"{[tuple(features.shape[1:]) for features in raw_features]}. Choose layers of one stage."
        )
    layout = layouts.pop()
    sequence = [to_sequence(features, layout) for features in raw_features]
    num_features = sequence[0].shape[1]
    prefix = suffix = 0
    if layout == "sequence":
        if select_strategy == "full":
            grid = (1, num_features)
        else:
            prefix, suffix = _tokens_beside_patches(vision_tower, image_size, num_features, call_kwargs)
            grid = _factor(num_features - prefix - suffix, image_size)
    else:
        shape = raw_features[0].shape
        grid = tuple(shape[2:4]) if layout == "channels_first" else tuple(shape[1:3])
    return {
        "call_kwargs": call_kwargs,
        "layout": layout,
        "num_prefix_tokens": prefix,
        "num_suffix_tokens": suffix,
        "hidden_size": sum(features.shape[-1] for features in sequence),
        "image_size": list(image_size),
        "grid": list(grid),
    }


def synthetic_pictures(num_pictures: int, channels: int, image_size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Random pictures `(num_pictures, channels, height, width)`, normalised, with the 1/f spectrum of natural images.

    White noise would put a tower far from where it works; natural pictures have amplitude falling as 1/frequency
    (Field 1987, "Relations between the statistics of natural images and the response properties of cortical cells").
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = image_size
    noise = torch.randn(num_pictures, channels, height, width, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width)[None] * width)
    pictures = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp(min=1), s=image_size)
    return pictures / pictures.std()


def num_channels(config: PreTrainedConfig) -> int:
    return getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3


def _check_inputs(vision_tower: nn.Module, name: str) -> None:
    parameters = inspect.signature(vision_tower.forward).parameters
    if "pixel_values" not in parameters:
        takes = ", ".join(key for key in list(parameters)[:4])
        text = "input_ids" in parameters
        raise CompositionError(
            f"{name} does not take pictures (pixel_values) but {takes}. "
            + (
                "It is a language model: pass it as text=…, and a vision tower such as dinov2, siglip or clip as vision=…."
                if text
                else "Pass a vision tower such as dinov2, siglip or clip as vision=…."
            )
        )
    needed = [
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in ("pixel_values", "self")
    ]
    if needed:
        raise CompositionError(
            f"{name} needs {', '.join(needed)} beside pixel_values; towers of packed pictures are not supported yet. "
            "The nearest that works: siglip_vision_model or dinov2."
        )


def _run(vision_tower, image_size, layer, name) -> tuple[dict, list[torch.Tensor]]:
    """First on the meta device, then for real; each plainly, then with interpolated position embeddings."""
    attempts: list[dict] = [{}]
    if "interpolate_pos_encoding" in inspect.signature(vision_tower.forward).parameters:
        attempts.append({"interpolate_pos_encoding": True})
    try:
        with torch.device("meta"):
            meta_tower = build_vision_tower(vision_tower.config).eval()
    except Exception:  # noqa: BLE001 - any failure only means that this tower must run for real
        meta_tower = None
    errors = []
    for tower in (vision_tower,) if meta_tower is None else (meta_tower, vision_tower):
        device = next(tower.parameters()).device
        pixel_values = torch.zeros(2, num_channels(tower.config), *image_size, device=device, dtype=tower.dtype)
        for call_kwargs in attempts:
            try:
                with torch.no_grad(), _evaluating(tower):
                    raw_features = call_vision_tower(tower, pixel_values, layer, call_kwargs)
            except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported below
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if all(isinstance(features, torch.Tensor) and features.ndim in (3, 4) for features in raw_features):
                if raw_features[0].shape[0] == 2:
                    return call_kwargs, raw_features
                errors.append(f"2 pictures gave features of shape {tuple(raw_features[0].shape)}")
            else:
                errors.append("the features are not a sequence or a map")
    height, width = image_size
    raise CompositionError(
        f"{name} cannot be run on pictures of {height}x{width} pixels: {errors[-1]} Pass image_size=… with the size it "
        "was made for, or its own image_processor=…."
    )


class _evaluating:
    """`eval()` for the time of a run; then each module's mode as it was."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()

    def __exit__(self, *exc_info):
        for module, training in self.modes:
            module.training = training


def _layout(features: torch.Tensor, config: PreTrainedConfig, image_size: tuple[int, int], name: str) -> str:
    """Where the channels of a map are: the axis that is not one of two spatial axes of the picture's proportions."""
    if features.ndim == 3:
        return "sequence"
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
    if len(candidates) == 2:
        # Both fit when there are about as many channels as rows. Then a width that the config states decides.
        widths = set(_config_widths(config))
        if last in widths and first not in widths:
            candidates = ["channels_last"]
        elif first in widths and last not in widths:
            candidates = ["channels_first"]
    if len(candidates) != 1:
        raise CompositionError(
            f"{name} gives features of shape {tuple(features.shape)}, whose channels cannot be told from its rows and "
            "columns. Compose it with another image_size."
        )
    return candidates[0]


def _config_widths(config: PreTrainedConfig) -> list[int]:
    values = []
    for key in ("hidden_size", "hidden_sizes", "output_channels", "embed_dim", "fpn_hidden_size"):
        value = getattr(config, key, None)
        values.extend(value if isinstance(value, (list, tuple)) else [value])
    return [value for value in values if isinstance(value, int)]


def _tokens_beside_patches(
    vision_tower: nn.Module, image_size: tuple[int, int], num_features: int, call_kwargs: dict
) -> tuple[int, int]:
    """How many tokens at the start and at the end of a sequence are not patches.

    Tokens that are not patches (CLS, registers, distillation, detection tokens) enter the tower equal for every
    picture. So: run two different pictures and see which tokens of `hidden_states[0]`, before any attention, agree.
    Hierarchical towers change their number of tokens on the way; there the largest grid of the picture's proportions
    that fits is the map, and what is left over stands in front of it (pvt).
    """
    pictures = synthetic_pictures(2, num_channels(vision_tower.config), image_size)
    pictures = pictures.to(next(vision_tower.parameters()).device, vision_tower.dtype)
    with torch.no_grad(), _evaluating(vision_tower):
        outputs = vision_tower(pictures, output_hidden_states=True, return_dict=True, **call_kwargs)
    hidden_states = outputs.get("hidden_states")
    if hidden_states and hidden_states[0].ndim == 3 and hidden_states[0].shape[1] == num_features:
        is_patch = (hidden_states[0][0] != hidden_states[0][1]).any(-1)
        if bool(is_patch.any()):
            positions = is_patch.nonzero().squeeze(1)
            return int(positions[0]), num_features - 1 - int(positions[-1])
    return num_features - math.prod(_largest_grid(num_features, image_size)), 0


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


def _factor(num_patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Grid of `num_patches` patches, or one row if they do not fill a grid of the picture's proportions."""
    grid = _largest_grid(num_patches, image_size)
    return grid if math.prod(grid) == num_patches else (1, num_patches)
