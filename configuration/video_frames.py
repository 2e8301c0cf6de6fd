"""Which frames of a video are looked at, and how many tokens they take: one answer for the processor and the model.

A video is a row of pictures to the vision tower. To stay within the language model's context, few frames are looked at,
and the tokens of each are averaged over squares of neighbours, as LLaVA-Video (Zhang et al. 2024) does with 2 x 2.

`video_frames`, in the config of the model and of the processor, has these keys:

| key | meaning |
|---|---|
| `num_frames` | frames that are looked at, spread evenly over the video; a shorter video gives all it has |
| `fps` | in place of `num_frames`: frames for each second of the video, at most `max_frames` |
| `max_frames` | the most frames of any video |
| `frame_pool` | edge of the squares of tokens that become one; 1 for none |
| `frame_text` | text in front of each frame, with `{number}` (from 1) and `{seconds}`, such as `"Frame {number}: "` |
"""

import math

from .image_tokens import Grid


#: What holds where nothing is said.
DEFAULT_VIDEO_FRAMES = {"num_frames": 8, "fps": None, "max_frames": 64, "frame_pool": 2, "frame_text": None}


def resolve_video_frames(video_frames: dict | None) -> dict:
    """`video_frames` with every key.

    Raises:
        ValueError: an unknown key, a number that is not positive, both ways of sampling, or a text that cannot be
            filled in.
    """
    given = dict(video_frames or {})
    unknown = [key for key in given if key not in DEFAULT_VIDEO_FRAMES]
    if unknown:
        raise ValueError(
            f"video_frames has no {', '.join(map(repr, unknown))}. It takes: {', '.join(DEFAULT_VIDEO_FRAMES)}."
        )
    if given.get("fps") is not None and given.get("num_frames") is not None:
        raise ValueError(
            "video_frames takes num_frames or fps, not both: one of them decides how many frames there are."
        )
    resolved = {**DEFAULT_VIDEO_FRAMES, **given}
    if resolved["fps"] is not None:
        resolved["num_frames"] = None
    for key in ("num_frames", "max_frames", "frame_pool"):
        value = resolved[key]
        if not (value is None and key == "num_frames") and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"video_frames[{key!r}] must be a whole number from 1 on, not {value!r}.")
    if resolved["num_frames"] is None and not (isinstance(resolved["fps"], (int, float)) and resolved["fps"] > 0):
        raise ValueError(f"video_frames['fps'] must be a number above 0, not {resolved['fps']!r}.")
    try:
        frame_text(resolved, 1, 0.0)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"video_frames['frame_text'] is a text with {{number}} and {{seconds}}, such as 'Frame {{number}}: ' or "
            f"'{{seconds:.1f}} s: ', not {resolved['frame_text']!r} ({error})."
        ) from error
    return resolved


def frame_text(video_frames: dict, number: int, seconds: float) -> str:
    """What stands in front of a frame in the text."""
    text = video_frames["frame_text"]
    return text.format(number=number, seconds=seconds) if text else ""


def sampled_frames(video_frames: dict, total: int, video_fps: float | None = None) -> list[int]:
    """Indices of the frames that are looked at, rising and each once, of a video of `total` frames.

    Frame `i` of `n` is that at `i * total // n`, as in transformers.

    Raises:
        ValueError: `fps` is asked for, and the video's own rate is unknown.
    """
    number = video_frames["num_frames"]
    if number is None:
        if not video_fps:
            raise ValueError(
                "The frames of this video have no rate, so a number for each second (fps) cannot be chosen. Pass "
                "num_frames=…, or a video file."
            )
        number = int(total / video_fps * video_frames["fps"])
    number = max(1, min(number, video_frames["max_frames"], total))
    return [index * total // number for index in range(number)]


def frame_grid(video_frames: dict, grid: Grid) -> Grid:
    """Rows and columns of tokens of one frame, whose tokens before pooling are a `grid`.

    Rows and columns that are no multiple are rounded up, so that every token counts and none is filled in: the squares
    are then those of adaptive average pooling, which overlap.
    """
    pool = video_frames["frame_pool"]
    return -(-grid[0] // pool), -(-grid[1] // pool)


def num_frame_tokens(video_frames: dict, grid: Grid) -> int:
    """Tokens of one frame, whose tokens before pooling are a `grid`."""
    return math.prod(frame_grid(video_frames, grid))
