"""Pictures of their own size and proportions, within a budget of tokens: which towers take them, and in what steps."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.image_tokens import image_grid
from ..configuration.image_views import plan_views
from ..configuration.token_grids import token_grid
from ..modeling.picture_inputs import PICTURE_INPUTS
from ..modeling.vision_towers import call_vision_tower, read_features
from ..processing.prepared_views import grids_of_outputs, prepare_views
from .any_size import any_size_spec
from .errors import CompositionError
from .image_processors import plain_processor
from .running import device_of, in_mode


#: A budget where none is given: 512 x 512 pixels with patches of 16, as many as the largest NaFlex SigLIP 2 was trained on.
_MAX_TOKENS = 1024
_KEYS = ("type", "max_tokens", "min_tokens")
#: The most patches that are run through the tower to see whether it takes a picture of extreme proportions.
_TRIED_PATCHES = 1024
#: Grids by which is seen how many features along each side become one token.
_GRIDS = ((1, 1), (2, 3), (7, 5), (40, 41))
_LARGEST_FACTOR = 64


def spec_for_native_views(spec: dict, vision_tower: nn.Module, layer: int | list[int] | None) -> dict:
    """The `vision_tower_spec` by which a tower takes pictures of their own sizes: as it is if it takes patches of any
    size, else `any_size_spec`.

    Raises:
        CompositionError: the tower takes pictures of one size alone.
    """
    if spec["any_size"] and PICTURE_INPUTS[spec["inputs"]].from_processor:
        return spec
    height, width = spec["image_size"]
    try:
        return any_size_spec(vision_tower, spec, layer)
    except CompositionError as error:
        raise CompositionError(
            f'This vision tower takes pictures of {height}x{width} pixels, so views="native" cannot be used: {error}. Use '
            'views="tiles" or views="slices", which show large pictures in several views of that size, or views="resize"; '
            "or a tower that takes any size, such as siglip2_vision_model (NaFlex), qwen2_5_vl_vision, dinov2 or "
            "clip_vision_model."
        ) from error


def native_settings(settings: dict, spec: dict, projector_config: dict) -> dict:
    """`image_views` of type `"native"`, with every key.

    Args:
        settings: `max_tokens` and `min_tokens`, both optional.
        spec: The `vision_tower_spec`.
        projector_config: With its `type`.

    Raises:
        CompositionError: the projector makes more tokens than the budget, or a setting is unknown.
    """
    unknown = [key for key in settings if key not in _KEYS]
    if unknown:
        raise CompositionError(
            f'views of type "native" have no {", ".join(map(repr, unknown))}. They take max_tokens and min_tokens.'
        )
    found = {"max_tokens": _MAX_TOKENS, "min_tokens": 1, **settings}
    if not 1 <= found["min_tokens"] <= found["max_tokens"]:
        raise CompositionError(
            "A budget holds at least one token, and min_tokens is no more than max_tokens; got min_tokens="
            f"{found['min_tokens']}, max_tokens={found['max_tokens']}."
        )
    factor = features_along_a_token(projector_config)
    if factor is None:
        # Queries: their number does not follow from the picture, so the budget is for what they look at.
        fixed = max(_num_tokens(projector_config, grid) for grid in _GRIDS)
        if fixed > found["max_tokens"]:
            raise CompositionError(
                f"Projector {projector_config['type']!r} makes up to {fixed} tokens of any picture, more than max_tokens="
                f"{found['max_tokens']}. Raise max_tokens, which with this projector is a budget of features, or let the "
                "projector make fewer."
            )
    patches = spec["merge_size"] * (factor or 1)
    cell = math.lcm(patches, spec["patch"]["block"])
    return _with_cell({**found, "view_size": None}, spec, cell, (cell // patches) ** 2)


def _with_cell(settings: dict, spec: dict, patches: int, tokens: int) -> dict:
    """
    Args:
        patches: Along each edge of a cell.
        tokens: That a cell gives.

    Raises:
        CompositionError: no cell fits into the budget.
    """
    if settings["max_tokens"] < tokens:
        raise CompositionError(
            f"This vision tower gives at least {tokens} tokens of any picture, more than max_tokens="
            f"{settings['max_tokens']}."
        )
    return {**settings, "cell_size": spec["patch"]["size"] * patches, "cell_tokens": tokens}


def features_along_a_token(projector_config: dict) -> int | None:
    """Features along each edge of the square that becomes one token; `None` if the number of tokens is another rule's."""
    for factor in range(1, _LARGEST_FACTOR + 1):
        try:
            if all(
                token_grid(projector_config, (factor * rows, factor * columns)) == (rows, columns)
                for rows, columns in _GRIDS
            ):
                return factor
        except ValueError:  # a grid that this projector cannot take
            continue
    return None


def _num_tokens(projector_config: dict, grid: tuple[int, int]) -> int:
    rows, columns = token_grid(projector_config, grid)
    return rows * columns


def fit_to_budget(
    image_views: dict,
    spec: dict,
    vision_tower: nn.Module,
    processor: BaseImageProcessor,
    layer: int | list[int] | None,
) -> tuple[BaseImageProcessor, dict]:
    """The image processor and `image_views` with which pictures come to the tower as planned, tried with a picture as
    large as the budget and two of extreme proportions.

    A processor that cuts patches keeps doing so, if it leaves the planned sizes. Otherwise a plain one with its colours
    takes its place, and its pictures are cut (`processing/patch_cutting.py`). Some towers and processors take only even
    numbers of patches and do not say so: cells of twice the size are tried too.

    Raises:
        CompositionError: the tower does not take them.
    """
    patches = image_views["cell_size"] // spec["patch"]["size"]
    doubled = (
        _with_cell(image_views, spec, 2 * patches, 4 * image_views["cell_tokens"])
        if (image_views["max_tokens"] >= 4 * image_views["cell_tokens"])
        else None
    )
    plain = plain_processor(processor, (image_views["cell_size"],) * 2)
    errors = []
    for views, candidate, cut in (
        (image_views, processor, False),
        (image_views, plain, True),
        (doubled, processor, False),
        (doubled, plain, True),
    ):
        if views is None:
            continue
        views = {**views, "cut_patches": cut}
        try:
            _try(views, spec, vision_tower, candidate, layer)
        except Exception as error:  # noqa: BLE001 - a tower or a processor may fail in any way; what it said is reported
            errors.append(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        else:
            return candidate, views
    raise CompositionError(
        f"{type(vision_tower).__name__} does not take all pictures that a budget of {image_views['max_tokens']} tokens "
        f"allows ({errors[-1]}). Lower max_tokens in views=…, or leave views out."
    )


def _try(views: dict, spec: dict, vision_tower: nn.Module, processor: BaseImageProcessor, layer: Any) -> None:
    """Raises whatever error comes of pictures at the edges of the budget."""
    edge, budget = views["cell_size"], views["max_tokens"] // views["cell_tokens"]
    if getattr(processor, "max_num_patches", None) is not None:  # it pads every picture to as many
        processor.max_num_patches = budget * (edge // spec["patch"]["size"]) ** 2
    strip = max(1, min(budget, _TRIED_PATCHES * spec["patch"]["size"] ** 2 // edge**2)) * edge
    strips = [(edge, strip), (strip, edge)]
    # One by one: together the extreme ones might be padded to a huge square. Pictures of two sizes must go together, too.
    largest = plan_views(views, edge * budget, edge * budget).views[0].size
    batches = [[largest], *([size] for size in strips), *([[(edge, 2 * edge), (edge, edge)]] if budget > 1 else [])]
    prepared = [_prepare(sizes, views, spec, processor) for sizes in batches]
    device = device_of(vision_tower)
    for size, outputs in zip(strips, prepared[1:]):
        tensors = {key: value.to(device) for key, value in outputs.items()}
        pixel_values = tensors.pop("pixel_values").to(vision_tower.dtype)
        with torch.no_grad(), in_mode(vision_tower):
            features = call_vision_tower(vision_tower, spec, pixel_values, layer, tensors)
            read_features(features, spec, [image_grid(spec, *size)])


def _prepare(sizes: list[tuple[int, int]], views: dict, spec: dict, processor: BaseImageProcessor) -> dict:
    pictures = [Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in sizes]
    outputs = prepare_views(processor, pictures, spec, views)
    planned, found = [image_grid(spec, *size) for size in sizes], grids_of_outputs(spec, outputs)
    if found != planned:
        raise ValueError(f"{type(processor).__name__} makes {found} of pictures for {planned}")
    return outputs
