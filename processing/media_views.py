"""Pictures and videos to the views that the image processor makes ready for the tower, and to their text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..configuration.image_tokens import Grid, image_grid, token_grid
from ..configuration.image_views import has_planned_views, num_joined_tokens, plan_views
from ..configuration.tile_layouts import PictureViews, Size, whole_picture
from ..configuration.video_frames import frame_grid, frame_view, takes_clips, video_settings
from .image_text import has_text_between_views, joined_text, picture_text
from .seen_pictures import SeenPicture
from .video import Video
from .view_cutting import cut_views


@dataclass(frozen=True)
class Medium:
    """A picture or a video, taken apart.

    Args:
        views: Of a picture, or one of each frame.
        plan: Of a picture; `None` for a video.
        size: Pixels `(height, width)` of a picture before it was cut; `None` for a video.
        video: `None` for a picture.
        pictures: How many pictures the text of a picture has.
        seen: A picture whose features are known, which has no views to look at.
    """

    views: list[Image.Image]
    plan: PictureViews | None = None
    size: Size | None = None
    video: Video | None = None
    pictures: int = 1
    seen: SeenPicture | None = None


def take_apart(
    medium: Image.Image | SeenPicture | Video, image_views: dict | None, resample: int | None, pictures: int = 1
) -> Medium:
    """The views of a picture, or of a video: one of each frame.

    Args:
        image_views: As in the config.
        resample: Pillow's filter.
        pictures: How many pictures its text has.
    """
    if isinstance(medium, Video):
        views = [
            view
            for frame in medium.frames
            for view in cut_views(frame, frame_view(image_views, frame.height, frame.width), resample)
        ]
        return Medium(views, video=medium)
    plan = plan_views(image_views, medium.height, medium.width, pictures)
    if isinstance(medium, SeenPicture):
        return Medium([], plan, (medium.height, medium.width), pictures=pictures, seen=medium)
    return Medium(cut_views(medium, plan, resample), plan, (medium.height, medium.width), pictures=pictures)


def check_grids(config: Any, views: Sequence[Image.Image], grids: Sequence[Grid]) -> None:
    """That the image processor makes of each view what was planned.

    Raises:
        ValueError: another size.
    """
    if not has_planned_views(config.image_views):
        return
    for view, grid in zip(views, grids, strict=True):
        size = config.image_views.get("view_size") or (view.height, view.width)
        planned = image_grid(config.vision_tower_spec, *size)
        if grid != planned:
            raise ValueError(
                f"A view of {size[0]}x{size[1]} pixels (height x width) was to give {planned[0]}x{planned[1]} features, but "
                f"the image processor makes {grid[0]}x{grid[1]} of it. Leave the processor's sizes as they were saved."
            )


def clips_of(pixel_values: torch.Tensor, media: Sequence[Medium]) -> torch.Tensor:
    """Views of pictures and frames of videos `(all of them, C, H, W)` to clips `(clips, frames, C, H, W)`: one of each
    video, and one of each view of a picture, which stands still in it."""
    number = next(len(medium.views) for medium in media if medium.video is not None)
    clips = []
    for views, medium in zip(pixel_values.split([len(medium.views) for medium in media]), media):
        clips.append(views[None] if medium.video else views[:, None].expand(-1, number, -1, -1, -1))
    return torch.cat(clips)


def picture_tokens_text(
    config: Any, image_text: dict | None, token: str, plan: PictureViews, size: Size, grids: Sequence[Grid]
) -> str:
    """What the text has in the place of a picture, whose views have features in `grids`."""
    tokens = [token_grid(config.projector_config, grid) for grid in grids]
    if has_text_between_views(image_text):
        return picture_text(image_text, token, plan, tokens)
    number = 1 if config.fusion != "embed" else num_joined_tokens(config.image_views, plan, tokens, *size)
    return joined_text(image_text, token, number)


def video_tokens_text(config: Any, image_text: dict | None, token: str, video: Video, grids: Sequence[Grid]) -> str:
    """What the text has in the place of a video, whose frames have features in `grids`, or all in one for a clip.

    Each frame is written as a picture that is not cut, behind its own text (`frame_text`). With a fusion other than
    `"embed"`, the whole video is one picture.
    """
    if config.fusion != "embed":
        return joined_text(image_text, token, 1)
    settings = video_settings(config)
    whole = whole_picture(1, 1)
    frames = [
        picture_text(image_text, token, whole, [frame_grid(settings, token_grid(config.projector_config, grid))])
        for grid in grids
    ]
    before = [""] if takes_clips(config.vision_tower_spec) else video.texts(settings)
    return "".join(text + frame for text, frame in zip(before, frames, strict=True))
