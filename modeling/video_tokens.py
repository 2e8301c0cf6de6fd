"""Tokens of videos: those of their frames, averaged over squares of neighbours, one frame after another."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..configuration.image_tokens import Grid
from ..configuration.video_frames import frame_grid


def pool_frame(tokens: torch.Tensor, grid: Grid, video_frames: dict) -> torch.Tensor:
    """Tokens `(rows * columns, width)` of one frame to fewer, `(num_frame_tokens, width)`, in the same order."""
    pooled = frame_grid(video_frames, grid)
    if pooled == tuple(grid):
        return tokens
    places = tokens.T.unflatten(1, tuple(grid))
    return adaptive_avg_pool2d(places, pooled).flatten(1).T


def join_pictures_and_videos(
    tokens: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    num_video_frames: torch.Tensor,
    views_per_picture: Sequence[int],
    video_frames: dict,
    join_pictures: Callable[[list[torch.Tensor], list[Grid]], list[torch.Tensor]],
) -> list[torch.Tensor]:
    """Tokens of each picture and video `(num_tokens, width)`, in their order.

    Args:
        tokens: Of each view, `(rows * columns, width)`: of pictures and frames as they stand in the text.
        grids: Rows and columns of the tokens of each view.
        num_video_frames: `(num_images + num_videos,)`, int64: the frames of each video, 0 for a picture.
        views_per_picture: For each picture, in order.
        video_frames: As in the config.
        join_pictures: Tokens and grids of the views of all pictures to the tokens of each picture.

    Raises:
        ValueError: `pixel_values` has more or fewer views than these pictures and videos.
    """
    counts = num_video_frames.tolist()
    remaining = iter(views_per_picture)
    views = [count or next(remaining, 1) for count in counts]
    if sum(views) != len(tokens) or next(remaining, None) is not None:
        raise ValueError(
            f"num_video_frames stands for {sum(views)} views of pictures and frames of videos, but pixel_values has "
            f"{len(tokens)}. Pass everything that the processor returned in one call: model(**inputs)."
        )
    ends = [sum(views[: index + 1]) for index in range(len(views))]
    spans = [range(end - number, end) for end, number in zip(ends, views)]
    of_pictures = [view for span, count in zip(spans, counts) if not count for view in span]
    pictures = iter(join_pictures([tokens[view] for view in of_pictures], [grids[view] for view in of_pictures]))
    return [
        torch.cat([pool_frame(tokens[view], grids[view], video_frames) for view in span]) if count else next(pictures)
        for span, count in zip(spans, counts)
    ]
