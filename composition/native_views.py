"""Pictures of their own size and proportions, within a budget of tokens: which towers take them, and in what steps."""

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
from ..processing.image_outputs import image_outputs
from ..processing.processing_anyvlm import grids_of_outputs
from .errors import CompositionError
from .running import device_of, in_mode


#: A budget where none is given: 512 x 512 pixels with patches of 16, as many as the largest NaFlex SigLIP 2 was trained on.
_MAX_TOKENS = 1024
_KEYS = ("type", "max_tokens", "min_tokens")
#: The most patches that are run through the tower to see whether it takes a picture of extreme proportions.
_TRIED_PATCHES = 1024
#: Grids by which is seen how many features along each side become one token.
_GRIDS = ((1, 1), (2, 3), (7, 5), (40, 41))
_LARGEST_FACTOR = 64


def native_settings(settings: dict, spec: dict, projector_config: dict) -> dict:
    """`image_views` of type `"native"`, with every key.

    Args:
        settings: `max_tokens` and `min_tokens`, both optional.
        spec: The `vision_tower_spec`.
        projector_config: With its `type`.

    Raises:
        CompositionError: the tower takes pictures of one size, the projector makes more tokens than the budget, or a
            setting is unknown.
    """
    unknown = [key for key in settings if key not in _KEYS]
    if unknown:
        raise CompositionError(
            f'views of type "native" have no {", ".join(map(repr, unknown))}. They take max_tokens and min_tokens.'
        )
    if not spec["any_size"] or not PICTURE_INPUTS[spec["inputs"]].from_processor:
        height, width = spec["image_size"]
        raise CompositionError(
            f'This vision tower takes pictures of {height}x{width} pixels, so views="native" cannot be used. Use '
            'views="tiles" or views="slices", which show large pictures in several views of that size; or a tower that '
            "takes patches of any size, such as siglip2_vision_model (NaFlex), qwen2_5_vl_vision or minicpmv4_6_vision."
        )
    found = {"max_tokens": _MAX_TOKENS, "min_tokens": 1, **settings}
    factor = _features_along_a_token(projector_config)
    if factor is None:
        # Queries: their number does not follow from the picture, so the budget is for what they look at.
        fixed = max(_num_tokens(projector_config, grid) for grid in _GRIDS)
        if fixed > found["max_tokens"]:
            raise CompositionError(
                f"Projector {projector_config['type']!r} makes up to {fixed} tokens of any picture, more than max_tokens="
                f"{found['max_tokens']}. Raise max_tokens, which with this projector is a budget of features, or let the "
                "projector make fewer."
            )
    edge = spec["patch"]["size"] * spec["merge_size"] * (factor or 1)
    return {**found, "view_size": None, "cell_size": edge}


def _features_along_a_token(projector_config: dict) -> int | None:
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
) -> None:
    """Let the image processor make room for the budget, and see that it and the tower take what is planned: a picture as
    large as the budget, and two of extreme proportions.

    Raises:
        CompositionError: one of them does not.
    """
    edge, budget = image_views["cell_size"], image_views["max_tokens"]
    if getattr(processor, "max_num_patches", None) is not None:  # it pads every picture to as many
        processor.max_num_patches = budget * (edge // spec["patch"]["size"]) ** 2
    strip = max(1, min(budget, _TRIED_PATCHES * spec["patch"]["size"] ** 2 // edge**2)) * edge
    sizes = [plan_views(image_views, edge * budget, edge * budget).views[0].size, (edge, strip), (strip, edge)]
    views = [Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in sizes]
    # One by one: together the extreme ones might be padded to a huge square. Pictures of two sizes must go together, too.
    batches = [[view] for view in views]
    if budget > 1:
        batches.append(
            [Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)) for size in ((edge, 2 * edge), (edge, edge))]
        )
    try:
        for batch in batches:
            outputs = image_outputs(processor, batch, do_resize=False, return_tensors="pt")
            planned = [image_grid(spec, view.height, view.width) for view in batch]
            if grids_of_outputs(spec, outputs) != planned:
                raise CompositionError(_processor_message(processor))
    except CompositionError:
        raise
    except Exception as error:  # noqa: BLE001 - a processor may fail in any way; what it said is reported
        raise CompositionError(f"{_processor_message(processor)} ({_first_line(error)})") from error
    device = device_of(vision_tower)
    try:
        for view in views[1:]:
            outputs = image_outputs(processor, [view], do_resize=False, return_tensors="pt")
            tensors = {
                key: outputs[key].to(device)
                for key in PICTURE_INPUTS[spec["inputs"]].from_processor.values()
                if key in outputs
            }
            pixel_values = outputs["pixel_values"].to(device, vision_tower.dtype)
            with torch.no_grad(), in_mode(vision_tower):
                read_features(
                    call_vision_tower(vision_tower, spec, pixel_values, layer, tensors),
                    spec,
                    [image_grid(spec, view.height, view.width)],
                )
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported
        raise CompositionError(
            f"{type(vision_tower).__name__} does not take a picture of {strip}x{edge} pixels, which a budget of {budget} "
            f"tokens allows ({_first_line(error)}). Lower max_tokens in views=…."
        ) from error


def _processor_message(processor: BaseImageProcessor) -> str:
    return (
        f'{type(processor).__name__} does not take pictures in the sizes that views="native" plans. Leave image_size and '
        "image_processor out, or pass an image_processor that cuts patches for this tower, such as its family's."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
