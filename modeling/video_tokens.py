"""Tokens of videos: those of their frames, averaged over squares of neighbours, one frame after another."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..configuration.image_tokens import Grid
from ..configuration.video_frames import frame_grid


def pool_frame(tokens: torch.Tensor, grid: Grid, video_frames: dict) -> tuple[torch.Tensor, Grid]:
    """Tokens `(rows * columns, width)` of one frame to fewer, `(num_frame_tokens, width)`, row by row; and their grid."""
    pooled = frame_grid(video_frames, grid)
    if pooled == tuple(grid):
        return tokens, pooled
    places = tokens.T.unflatten(1, tuple(grid))
    return adaptive_avg_pool2d(places, pooled).flatten(1).T, pooled


def check_frames(num_video_frames: torch.Tensor | None, views_of_pictures: Sequence[int], num_views: int) -> list[int]:
    """The views of each picture, and the frames of each video, in order.

    Args:
        num_video_frames: `(num_images + num_videos,)`, int64: the frames of each video, 0 for a picture; `None` without
            videos.
        views_of_pictures: The views of each picture, for models that cut them; else empty.
        num_views: Of all pictures and videos together.

    Raises:
        ValueError: they have more or fewer views than that.
    """
    if num_video_frames is None:
        return list(views_of_pictures) or [1] * num_views
    of_pictures = iter(views_of_pictures)
    views = [count or next(of_pictures, 1) for count in num_video_frames.tolist()]
    if sum(views) != num_views or next(of_pictures, None) is not None:
        raise ValueError(
            f"num_video_frames stands for {sum(views)} views of pictures and frames of videos, but pixel_values has "
            f"{num_views}. Pass everything that the processor returned in one call: model(**inputs)."
        )
    return views


def join_frames(
    tokens: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    views: Sequence[int],
    num_video_frames: torch.Tensor,
    video_frames: dict,
    join_pictures: Callable[[list[torch.Tensor], list[Grid]], tuple[list[torch.Tensor], list[Grid | None]]],
    as_one: bool = False,
) -> tuple[list[torch.Tensor], list[Grid | None]]:
    """Tokens `(num_tokens, width)` of each picture and of each frame, in their order, and their grids.

    Args:
        tokens: Of each view, `(rows * columns, width)`: of pictures and frames as they stand in the text.
        grids: Rows and columns of the tokens of each view.
        views: As `check_frames` gives them.
        num_video_frames: As there.
        video_frames: As in the config, with every key.
        join_pictures: Tokens and grids of the views of all pictures to the tokens of each picture, and their grids.
        as_one: A video is one picture, whose tokens are those of its frames one after another.
    """
    is_video = [count > 0 for count in num_video_frames.tolist()]
    views_of_each = [span.tolist() for span in torch.arange(len(tokens)).split(list(views))]
    of_pictures = [view for span, video in zip(views_of_each, is_video) if not video for view in span]
    pictures = zip(*join_pictures([tokens[view] for view in of_pictures], [grids[view] for view in of_pictures]))
    joined = []
    for span, video in zip(views_of_each, is_video):
        if not video:
            joined.append(next(pictures))
            continue
        frames = [pool_frame(tokens[view], grids[view], video_frames) for view in span]
        joined.extend([(torch.cat([frame for frame, _ in frames]), None)] if as_one else frames)
    return [found for found, _ in joined], [grid for _, grid in joined]
