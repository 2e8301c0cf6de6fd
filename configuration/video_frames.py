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
from typing import Any

from .image_tokens import Grid, token_grid
from .image_views import feature_grids, has_planned_views, plan_views
from .tile_layouts import PictureViews, whole_picture


#: What holds where nothing is said. Tokens that are no places of a picture are not pooled.
DEFAULT_VIDEO_FRAMES = {"num_frames": 8, "fps": None, "max_frames": 64, "frame_pool": 2, "frame_text": None}

#: A grid that every projector can cut, of whatever factor: 720720 is a multiple of all numbers to 16.
_LARGE_GRID = (720720, 720720)


def video_settings(config: Any, **changes: Any) -> dict:
    """The `video_frames` of a model, with every key.

    A tower of clips takes as many frames as it was made for, and gives tokens of the whole clip. Tokens of queries, of a
    projector or a detector, have no neighbours that could be averaged.

    Args:
        config: Anything with `vision_tower_spec`, `projector_config`, `video_frames` and, unless it is `"embed"`,
            `fusion`: the model's config or the processor.
        changes: In place of what `video_frames` says.

    Raises:
        ValueError: as `resolve_video_frames`; or something that this tower or projector cannot do.
    """
    spec, stated = config.vision_tower_spec, dict(config.video_frames or {})
    if getattr(config, "fusion", "embed") != "embed" and stated.get("frame_text"):
        raise ValueError(
            "video_frames has a frame_text, but with this fusion a video has one token in the text, and nothing can be "
            "written between its frames. Leave it out."
        )
    if changes.get("fps") is not None:
        stated.pop("num_frames", None)
    if changes.get("num_frames") is not None:
        stated.pop("fps", None)
    given = {**stated, **{key: value for key, value in changes.items() if value is not None}}
    if takes_clips(spec):
        fixed = {"num_frames": spec["num_frames"], "fps": None, "max_frames": spec["num_frames"]}
        return _with_fixed(given, {**fixed, "frame_pool": 1, "frame_text": None}, "the vision tower takes clips")
    if not has_rows_and_columns(spec, config.projector_config):
        return _with_fixed(given, {"frame_pool": 1}, "the tokens of a picture are not in rows and columns")
    return resolve_video_frames(given)


def has_rows_and_columns(vision_tower_spec: dict, projector_config: dict) -> bool:
    """Whether the tokens of a picture have neighbours, and are not those of queries."""
    one_row = vision_tower_spec["grid"][0] == 1 and not vision_tower_spec["any_size"]
    return not one_row and token_grid(projector_config, _LARGE_GRID)[0] > 1


def takes_clips(vision_tower_spec: dict) -> bool:
    """Whether the tower takes clips, so that a video is one of them."""
    return vision_tower_spec["inputs"] == "frames"


def _with_fixed(given: dict, fixed: dict, reason: str) -> dict:
    for key, value in fixed.items():
        if given.get(key) not in (None, value):
            raise ValueError(
                f"video_frames[{key!r}] is {given[key]!r}, but {reason}, so it can only be {value!r}. Leave it out."
            )
    if fixed.get("num_frames"):
        given = {key: value for key, value in given.items() if key != "fps"}
    return resolve_video_frames({**given, **fixed})


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
    if (resolved["num_frames"] or 0) > resolved["max_frames"]:
        raise ValueError(
            f"num_frames={resolved['num_frames']} is more than max_frames={resolved['max_frames']}. Raise max_frames in "
            "video_frames, or ask for fewer."
        )
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


def sampled_frames(video_frames: dict, total: int, video_fps: float | None = None, is_clip: bool = False) -> list[int]:
    """Indices of the frames that are looked at, rising and each once, of a video of `total` frames.

    Frame `i` of `n` is that at `i * total // n`, as in transformers.

    Args:
        is_clip: The tower takes no fewer than `num_frames`: those of a shorter video are shown several times.

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
    number = max(1, min(number, video_frames["max_frames"], number if is_clip else total))
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


def frame_view(image_views: dict | None, height: int, width: int) -> PictureViews:
    """A frame as one view: the whole of it, whatever views a picture of this size has."""
    if not has_planned_views(image_views) or image_views.get("view_size") is not None:
        return whole_picture(height, width)
    plan = plan_views(image_views, height, width)
    return PictureViews((plan.views[plan.whole],))


def num_video_tokens(config: Any, num_frames: int, height: int, width: int) -> int:
    """Number of tokens of a video of which `num_frames` frames of `height` x `width` pixels are looked at.

    Args:
        config: Anything with `vision_tower_spec`, `projector_config`, `image_views`, `video_frames` and, unless it is
            `"embed"`, `fusion`: the model's config or the processor.
    """
    if getattr(config, "fusion", "embed") != "embed":
        return 1
    grid = feature_grids(config, frame_view(config.image_views, height, width))[0]
    tokens = num_frame_tokens(video_settings(config), token_grid(config.projector_config, grid))
    return tokens if takes_clips(config.vision_tower_spec) else num_frames * tokens
