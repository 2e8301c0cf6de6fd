"""How pictures and videos come to a tower, and how many tokens they take: what `compose` sets up and `check` reports."""

import logging
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..processing.prepared_views import makes_one_size, tokens_of_sizes
from .errors import CompositionError
from .image_processors import load_image_processor
from .model_sizes import num_positions
from .native_views import fit_to_budget, spec_for_native_views
from .parts import PartSource
from .projector_grid import check_projector_grid
from .views import Measured, complete_video_frames, complete_views, fewest_and_most_tokens
from .vision_part import VisionPart


logger = logging.getLogger(__name__)


@dataclass
class PicturePlan:
    """How pictures come to a tower.

    Args:
        image_processor: It makes the tower's inputs of views.
        measured: What counting tokens takes, with complete `image_views` and `video_frames`.
        fewest, most: Tokens in the text that a picture takes; of pictures of their own sizes without a plan, those of an
            example.
    """

    image_processor: BaseImageProcessor
    measured: Measured
    fewest: int
    most: int

    def num_tokens(self, image_sizes: list[tuple[int, int]]) -> list[int]:
        """Tokens in the text of pictures of these `(height, width)`."""
        return tokens_of_sizes(self.measured, self.image_processor, image_sizes)


def plan_pictures(
    part: VisionPart,
    source: PartSource,
    *,
    settings: dict | None,
    projector_config: dict,
    fusion: str,
    video_frames: dict | None,
    image_processor: Any,
    image_size: int | tuple[int, int] | None,
    trust_remote_code: bool,
) -> PicturePlan:
    """Complete what `compose` was told about views and videos, by what the tower and its image processor do.

    Args:
        part: Its spec becomes one of pictures of any size, where they keep their own.
        source: What the tower was loaded from.
        settings: What `views_settings` gives.
        projector_config: With its `type`.
        image_processor, image_size, video_frames: As for `compose`.

    Raises:
        CompositionError: they cannot work with this tower and this projector.
    """
    if (settings or {}).get("type") == "native":
        part.spec = spec_for_native_views(part.spec, part.tower, part.layer)
    spec, processor = part.spec, part.image_processor
    check_projector_grid(projector_config, spec, any_grid=spec["any_size"] and settings is None)
    image_views = complete_views(settings, spec, projector_config, processor, part.size)
    if image_views and image_views["type"] == "native":
        if image_size is not None:
            raise CompositionError(
                'image_size brings every picture to one size, and views="native" keeps their own. Leave out either.'
            )
        processor, image_views = fit_to_budget(image_views, spec, part.tower, processor, part.layer)
    frames = complete_video_frames(video_frames, spec, projector_config, fusion)
    view_size = (image_views or {}).get("view_size")
    if view_size and not makes_one_size(processor, spec):
        processor, _ = load_image_processor(image_processor, source, part.tower, tuple(view_size), trust_remote_code)
    return counted_plan(processor, Measured(spec, projector_config, image_views, frames, fusion), part.size)


def counted_plan(image_processor: BaseImageProcessor, measured: Measured, size: tuple[int, int]) -> PicturePlan:
    """The plan with its numbers of tokens.

    Args:
        size: Pixels `(height, width)` that the image processor makes, or an example of them.
    """
    plan = PicturePlan(image_processor, measured, 1, 1)
    if measured.image_views is None:
        plan.fewest = plan.most = plan.num_tokens([size])[0]
    else:
        plan.fewest, plan.most = fewest_and_most_tokens(measured)
    return plan


def check_context(config: PreTrainedConfig, plan: PicturePlan, spec: dict) -> None:
    """Warn where a picture leaves a text less room than it takes itself.

    Args:
        config: The language model's.
        spec: The `vision_tower_spec`.

    Raises:
        CompositionError: one picture alone takes all positions. (Not where pictures keep their own sizes.)
    """
    positions, fewest, most = num_positions(config), plan.fewest, plan.most
    if positions and fewest >= positions and not spec["any_size"]:
        height, width = spec["image_size"]
        picture = f"One picture of {height}x{width} pixels" if fewest == most else "Even a small picture"
        fewer_tiles = "" if fewest == most else ", fewer tiles (views=…)"
        raise CompositionError(
            f"{picture} takes {fewest} tokens, and the language "
            f"model has {positions} positions, so no text would fit beside it. Pass a smaller image_size=…{fewer_tiles}, or "
            "a tower with larger patches."
        )
    if positions and 2 * most > positions:
        logger.warning(
            "One picture takes %s%d of the %d positions that the language model was made for. Pass a smaller image_size=…%s "
            "for fewer tokens.",
            "up to " if most > fewest else "",
            most,
            positions,
            " or fewer tiles (views=…)" if most > fewest else "",
        )
