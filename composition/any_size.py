"""Towers of whole pictures that take pictures of any size: measured, not known by their name."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..modeling.vision_towers import call_vision_tower, read_features, to_sequence
from .errors import CompositionError
from .running import device_of, in_mode, num_channels, synthetic_pictures


Size = tuple[int, int]
#: Grids of features that are tried beside one larger than the tower's own; even, since some towers join four features.
_TRIED_GRIDS = ((2, 6), (6, 4))
#: Largest difference, in parts of the largest feature, of what another way of calling the tower may make of a picture.
_TOLERANCE = 1e-3


def any_size_spec(vision_tower: nn.Module, spec: dict, layer: int | Sequence[int] | None = None) -> dict:
    """The `vision_tower_spec` by which a tower sees each picture in a size of its own, those of one size in one run.

    Convolutional towers take any size; transformers do if they interpolate their positions, in every call or when asked
    to. So larger, smaller and oblong pictures are run, whose features must be as many as their size lets expect.

    Args:
        spec: As measured for one size.
        layer: As `AnyVlmConfig.vision_feature_layer`.

    Raises:
        CompositionError: the tower takes pictures of one size alone.
    """
    name = type(vision_tower).__name__
    if spec["inputs"] != "pictures" or (min(spec["grid"]) == 1 and math.prod(spec["grid"]) > 1):
        raise CompositionError(f"{name} gives features whose number or places do not follow from a picture's size")
    errors = []
    for by_size in _ways_to_call(vision_tower, spec):
        for edge in _edges(spec):
            try:
                with torch.no_grad(), in_mode(vision_tower):
                    if _takes_any(vision_tower, by_size, edge, layer) and _gives_the_same(
                        vision_tower, spec, by_size, layer
                    ):
                        return _spec_of_any_size(by_size, edge)
            except Exception as failed:  # noqa: BLE001 - a tower may fail in any way; what it said is reported
                errors.append(f"{type(failed).__name__}: {failed}".strip().splitlines()[0].rstrip("."))
    said = errors[0] if errors else "it gives fewer or more features than their size lets expect"
    raise CompositionError(f"{name} does not take pictures of another size ({said})")


def _ways_to_call(vision_tower: nn.Module, spec: dict) -> Iterator[dict]:
    yield copy.deepcopy(spec)
    if "interpolate_pos_encoding" in inspect.signature(vision_tower.forward).parameters:
        yield {**copy.deepcopy(spec), "call_kwargs": {**spec["call_kwargs"], "interpolate_pos_encoding": True}}


def _edges(spec: dict) -> list[int]:
    """Pixels along each edge of what may become one feature: those that make the grid which was measured."""
    (height, width), (rows, columns) = spec["image_size"], spec["grid"]
    fitting = [
        edge
        for edge in range(1, min(height, width) + 1)
        for whole in (math.floor, math.ceil)
        if (whole(height / edge), whole(width / edge)) == (rows, columns)
    ]
    # A tower is rarely made for a size that it must crop.
    return sorted(set(fitting), key=lambda edge: (height % edge + width % edge, -edge))


def _takes_any(vision_tower: nn.Module, by_size: dict, edge: int, layer) -> bool:
    larger = tuple(2 * (cells // 2 + 1) for cells in by_size["grid"])
    for rows, columns in (*_TRIED_GRIDS, larger):
        raw_features = _run(vision_tower, by_size, (rows * edge, columns * edge), layer)
        for features in raw_features:
            if by_size["layout"] == "channels_first":
                found = tuple(features.shape[-2:])
            elif by_size["layout"] == "channels_last":
                found = tuple(features.shape[1:3])
            else:
                beside = by_size["num_prefix_tokens"] + by_size["num_suffix_tokens"]
                number = to_sequence(features, by_size["layout"]).shape[1] - beside
                found = (rows, columns) if number == rows * columns else (1, number)
            if found != (rows, columns):
                return False
    return True


def _gives_the_same(vision_tower: nn.Module, spec: dict, by_size: dict, layer) -> bool:
    """Whether a picture of the tower's own size gives what it gives when the tower is called as usual."""
    found, expected = (
        torch.stack(read_features(_run(vision_tower, way, tuple(spec["image_size"]), layer), way, [spec["grid"]]))
        for way in (by_size, spec)
    )
    return float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def _run(vision_tower: nn.Module, spec: dict, size: Size, layer) -> list[torch.Tensor]:
    pictures = synthetic_pictures(1, num_channels(vision_tower.config), size)
    return call_vision_tower(vision_tower, spec, pictures.to(device_of(vision_tower), vision_tower.dtype), layer)


def _spec_of_any_size(by_size: dict, edge: int) -> dict:
    rows, columns = by_size["grid"]
    return {
        **by_size,
        "inputs": "pictures_by_size",
        "any_size": True,
        "patch": {"size": edge, "frames": 1, "form": "flat", "block": 1},
        "layout": "sequence",
        "num_prefix_tokens": 0,
        "num_suffix_tokens": 0,
        "merge_size": 1,
        "image_size": [rows * edge, columns * edge],
        "by_size": by_size,
    }
