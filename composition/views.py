"""How pictures are cut into views for a tower: what is left out of `views=` follows from the tower and the projector."""

import logging
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.image_views import VIEWS, check_image_views, feature_grids, num_image_tokens, plan_views
from ..configuration.tile_layouts import TILE_LAYOUTS
from ..configuration.token_grids import token_grid
from ..configuration.video_frames import video_settings
from ..modeling.picture_inputs import PICTURE_INPUTS
from ..processing.prepared_views import grids_of_outputs
from .errors import CompositionError
from .native_views import native_settings


logger = logging.getLogger(__name__)

#: What LLaVA-NeXT, InternVL, Idefics3, Gemma 3, Perception LM and MiniCPM-V have, in tiles of the tower's own size.
_ANYRES_ARRANGEMENTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_DEFAULTS = {
    "dynamic": {"min_tiles": 1, "max_tiles": 12, "thumbnail": True},
    "quarters": {},
    "pan_and_scan": {"max_tiles": 4, "min_ratio": 1.2},
    "canvas": {"max_tiles": 36},
}
#: Heights and widths of the pictures, in all pairs, that stand for all there are.
TRIED_EDGES = (32, 128, 384, 512, 683, 1024, 1366, 2048, 4096)
_MAX_SLICES = 9
_SPLIT_TILES = 4


@dataclass
class Measured:
    """What counting tokens takes of a config, before there is one."""

    vision_tower_spec: dict
    projector_config: dict
    image_views: dict | None
    video_frames: dict | None = None
    fusion: str = "embed"


def views_settings(views: str | dict | None) -> dict | None:
    """`views=` as a dict; `None` for one view, resized.

    Raises:
        CompositionError: unknown type or layout.
    """
    if views is None or views == "resize":
        return None
    settings = {"type": views} if isinstance(views, str) else dict(views)
    if settings.get("type") not in VIEWS:
        raise CompositionError(
            f"Unknown views {settings.get('type')!r}. Choose one of: {', '.join(sorted(VIEWS))}; or a dict with that as "
            '"type", such as {"type": "tiles", "layout": "dynamic", "max_tiles": 6}.'
        )
    if settings["type"] == "resize":
        return None
    if settings["type"] == "tiles" and settings.setdefault("layout", "anyres") not in TILE_LAYOUTS:
        raise CompositionError(
            f"Unknown layout of tiles {settings['layout']!r}. Choose one of: {', '.join(sorted(TILE_LAYOUTS))}."
        )
    return settings


def complete_views(
    settings: dict | None, spec: dict, projector_config: dict, processor: BaseImageProcessor, size: tuple[int, int]
) -> dict | None:
    """`image_views` for the config: `settings`, and what they leave out.

    Args:
        settings: What `views_settings` gives.
        spec: The `vision_tower_spec`.
        projector_config: With its `type`.
        processor: The image processor that will see the views.
        size: Pixels `(height, width)` that it makes, or an example of them.

    Raises:
        CompositionError: the settings cannot work with this tower.
    """
    if settings is None:
        return None
    if settings["type"] == "tiles":
        found = {"view_size": list(size), **_tile_settings(settings, size, spec, projector_config), **settings}
        if found.get("several") and "background" not in found:
            found["background"] = [int(colour * 255) for colour in processor.image_mean]
    elif settings["type"] == "slices":
        found = {**_slice_settings(spec, projector_config, size), **settings}
        found.setdefault(
            "view_size",
            None
            if _takes_planned_sizes(Measured(spec, projector_config, {**found, "view_size": None}), processor)
            else list(size),
        )
    else:
        found = native_settings(settings, spec, projector_config)
    try:
        check_image_views(found)
    except ValueError as error:
        raise CompositionError(str(error)) from error
    return found


def complete_video_frames(video_frames: dict | None, spec: dict, projector_config: dict, fusion: str) -> dict:
    """`video_frames` for the config, with every key.

    Raises:
        CompositionError: something that this tower, projector or fusion cannot do, or an unknown setting.
    """
    try:
        return video_settings(Measured(spec, projector_config, None, video_frames, fusion))
    except ValueError as error:
        raise CompositionError(str(error)) from error


def _tile_settings(settings: dict, size: tuple[int, int], spec: dict, projector_config: dict) -> dict:
    height, width = settings.get("tile_size", size)
    layout = settings["layout"]
    if layout == "anyres":
        pinpoints = [[rows * height, columns * width] for rows, columns in _ANYRES_ARRANGEMENTS]
        # Tokens of queries have no places that could be merged into one map.
        rows, _ = token_grid(projector_config, tuple(spec["grid"]))
        join = "spatial" if rows > 1 else "concat"
        return {"tile_size": [height, width], "pinpoints": pinpoints, "join": join}
    if layout == "split":
        edge = max(height, width)
        return {"tile_size": [edge, edge], "longest_edge": _SPLIT_TILES * edge}
    if layout == "canvas":
        return {"tile_size": [max(height, width)] * 2, **_DEFAULTS[layout]}
    if layout == "pan_and_scan":
        return {"min_crop_size": max(height, width), **_DEFAULTS[layout]}
    if layout == "quarters":
        return {}
    return {"tile_size": [height, width], **_DEFAULTS[layout]}


def _slice_settings(spec: dict, projector_config: dict, size: tuple[int, int]) -> dict:
    """Slices have the area of the picture that the tower was measured with."""
    unit = 1
    if spec["any_size"]:
        unit = spec["patch"]["size"] * spec["merge_size"]
        # The smallest square of features that the projector takes.
        while not _takes_grid(projector_config, unit // spec["patch"]["size"] // spec["merge_size"]):
            unit += spec["patch"]["size"] * spec["merge_size"]
    return {"slice_size": round(math.sqrt(size[0] * size[1])), "unit": unit, "max_slices": _MAX_SLICES}


def _takes_grid(projector_config: dict, edge: int) -> bool:
    try:
        token_grid(projector_config, (edge, edge))
    except ValueError:
        return edge > 64  # it takes none of these; composing says so
    return True


def fewest_and_most_tokens(measured: Measured) -> tuple[int, int]:
    """Tokens of the pictures that take fewest and most, among pictures of several sizes and proportions."""
    counts = [num_image_tokens(measured, height, width) for height in TRIED_EDGES for width in TRIED_EDGES]
    return min(counts), max(counts)


def _takes_planned_sizes(measured: Measured, processor: BaseImageProcessor) -> bool:
    """Whether the image processor leaves views of any multiple of patches as they are."""
    spec = measured.vision_tower_spec
    if not spec["any_size"] or not PICTURE_INPUTS[spec["inputs"]].from_processor:
        return False
    plans = [plan_views(measured.image_views, height, width) for height, width in ((300, 300), (900, 700), (60, 1500))]
    views = [Image.fromarray(np.zeros((*view.size, 3), dtype=np.uint8)) for plan in plans for view in plan.views]
    try:
        found = grids_of_outputs(spec, processor(views, do_resize=False, return_tensors="pt"))
    except Exception as error:  # noqa: BLE001 - whatever fails there, the views are brought to one size
        logger.warning("%s cannot take views of their own sizes (%s).", type(processor).__name__, error)
        return False
    return found == [grid for plan in plans for grid in feature_grids(measured, plan)]
