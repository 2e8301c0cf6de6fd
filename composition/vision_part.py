"""The vision part of a model: one tower, or several that are fused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.fused_vision_towers_config import VISION_FUSIONS, FusedVisionTowersConfig
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..processing.fused_image_processor import FusedImageProcessor
from .errors import CompositionError
from .image_processors import fits_tower, load_image_processor
from .parts import PartSource
from .probe import probe_vision_tower
from .remote_code import is_remote
from .running import num_channels


@dataclass
class VisionPart:
    """What composing needs to know about the vision part.

    Args:
        tower: The tower, or `FusedVisionTowers`.
        image_processor: That goes with it.
        size: Pixels `(height, width)` of the pictures that it makes.
        spec: The `vision_tower_spec`.
        layer: The `vision_feature_layer` for the model's config; of several towers each has its own in `tower.config`.
        select_strategy: The `vision_feature_select_strategy`, likewise.
    """

    tower: nn.Module
    image_processor: BaseImageProcessor
    size: tuple[int, int]
    spec: dict
    layer: int | list[int] | None = None
    select_strategy: str = "default"


def vision_sources(vision: PartSource | Sequence[PartSource]) -> list[PartSource]:
    """The towers that `vision=` names.

    Raises:
        CompositionError: a tuple without any.
    """
    if not isinstance(vision, (list, tuple)):
        return [vision]
    if not vision:
        raise CompositionError("vision=() names no tower. Pass one, or several in a tuple.")
    return list(vision)


def examine_vision_part(
    sources: list[PartSource],
    towers: list[nn.Module],
    *,
    image_processor: Any,
    image_size: int | tuple[int, int] | None,
    layer: Any,
    select_strategy: str | Sequence[str],
    vision_fusion: str,
    trust_remote_code: bool,
) -> VisionPart:
    """Give each tower its image processor and measure it; several towers become one.

    Args:
        sources, towers: What each tower was loaded from, and the tower.
        image_processor, layer, select_strategy: As for `compose`; with several towers a list of one for each, or one
            for all.

    Raises:
        CompositionError: a tower cannot be used, or they cannot be fused.
    """
    check_vision_fusion(vision_fusion)
    if len(towers) == 1:
        layer = list(layer) if isinstance(layer, Sequence) else layer
        processor, size, spec = examine_tower(
            sources[0], towers[0], image_processor, image_size, layer, select_strategy, trust_remote_code
        )
        return VisionPart(towers[0], processor, size, spec, layer, select_strategy)
    number = len(towers)
    layers = [
        list(own) if isinstance(own, Sequence) else own for own in for_each(layer, number, "vision_feature_layer")
    ]
    strategies = for_each(select_strategy, number, "vision_feature_select_strategy")
    given = for_each(image_processor, number, "image_processor")
    found = [
        examine_tower(*arguments, trust_remote_code, plain=True)
        for arguments in zip(sources, towers, given, [image_size] * number, layers, strategies)
    ]
    specs = [spec for _, _, spec in found]
    tower = fuse_towers(towers, specs, layers, vision_fusion)
    spec = fused_spec(specs, vision_fusion)
    return VisionPart(
        tower, FusedImageProcessor([processor for processor, _, _ in found]), tuple(spec["image_size"]), spec
    )


def examine_tower(
    source: PartSource,
    tower: nn.Module,
    image_processor: Any,
    image_size: int | tuple[int, int] | None,
    layer: Any,
    select_strategy: str,
    trust_remote_code: bool,
    plain: bool = False,
    run: Callable[[Callable[[nn.Module], Any]], Any] | None = None,
) -> tuple[BaseImageProcessor, tuple[int, int], dict | None]:
    """The image processor of one tower, the size that it makes, and the `vision_tower_spec`.

    Args:
        plain: One of several: pictures are whole and of one size.
        run: What a function says of the tower, for one that has no weights itself; `None` where nothing could be run,
            and then there is no spec.

    Raises:
        CompositionError: it cannot be used.
    """
    processor, size = load_image_processor(image_processor, source, tower, image_size, trust_remote_code, plain=plain)

    def look(running: nn.Module) -> tuple[dict, bool]:
        spec = probe_vision_tower(running, size, layer, select_strategy)
        return spec, plain or fits_tower(processor, running, spec, layer)

    if plain:
        check_own_code(tower, processor)
    found = look(tower) if run is None else run(look)
    if found is None:
        return processor, size, None
    spec, fits = found
    if not fits:
        processor, size = load_image_processor(None, tower.config, tower, size, False)
    return processor, size, spec


def for_each(value: Any, number: int, name: str) -> list:
    """One value for each of several towers: a list has one for each, anything else is for all.

    Raises:
        CompositionError: a list of another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * number
    if len(value) != number:
        raise CompositionError(
            f"{name}={value!r} has {len(value)} entries, but there are {number} towers. Pass one entry for each tower "
            "(which may be a list itself), or one value for all."
        )
    return list(value)


def fuse_towers(towers: list[nn.Module], specs: list[dict], layers: list, vision_fusion: str) -> FusedVisionTowers:
    """One tower around the towers as they are, without a second copy of their weights."""
    config = FusedVisionTowersConfig(
        **{f"tower_{index}": tower.config for index, tower in enumerate(towers)},
        tower_specs=specs,
        tower_channels=[num_channels(tower.config) for tower in towers],
        vision_feature_layers=layers,
        vision_fusion=vision_fusion,
    )
    with torch.device("meta"):
        fused = FusedVisionTowers(config)
    for index, tower in enumerate(towers):
        fused.towers[index] = tower
    return fused.eval()


def fused_spec(specs: list[dict], vision_fusion: str) -> dict:
    """The `vision_tower_spec` of several towers as one.

    Raises:
        CompositionError: the features of one are no grid that could be brought to that of the first.
    """
    grids = [tuple(spec["grid"]) for spec in specs]
    if vision_fusion == "token":
        # A place of the picture is in it once for each tower, so what looks at neighbours cannot take it.
        grid = (1, sum(rows * columns for rows, columns in grids))
    else:
        grid = grids[0]
        flat = [other for other in grids if min(other) == 1]
        if flat and len(set(grids)) > 1:
            raise CompositionError(
                f"The towers give {' and '.join(f'{rows}x{columns}' for rows, columns in grids)} features, and "
                f"{flat[0][1]} in a row are no grid of places that could be brought to another. Pass "
                'vision_fusion="token", or vision_feature_select_strategy="default".'
            )
    return {
        "inputs": "pictures",
        "arguments": {"pixels": "pixel_values"},
        "patch": None,
        "any_size": False,
        "call_kwargs": {},
        "output": "last_hidden_state",
        "layout": "sequence",
        "num_prefix_tokens": 0,
        "num_suffix_tokens": 0,
        "merge_size": 1,
        "hidden_size": sum(spec["hidden_size"] for spec in specs),
        "image_size": [max(spec["image_size"][axis] for spec in specs) for axis in (0, 1)],
        "grid": list(grid),
    }


def check_vision_fusion(vision_fusion: str) -> None:
    if vision_fusion not in VISION_FUSIONS:
        raise CompositionError(f"Unknown vision_fusion {vision_fusion!r}. Choose one of: {', '.join(VISION_FUSIONS)}.")


def check_own_code(tower: nn.Module, image_processor: BaseImageProcessor) -> None:
    """Code of a checkpoint is carried for one tower alone.

    Raises:
        CompositionError: one of several towers, or its image processor, has code of its own.
    """
    for part in (tower, image_processor):
        if is_remote(type(part)):
            raise CompositionError(
                f"{type(part).__name__} is code of a checkpoint, which is carried for a single tower only, not for one "
                "of several. Pass it alone, or towers of types that transformers has."
            )
