"""A video as people pass it, to the few frames of it that are looked at: RGB pictures and their times.

Files are read with PyAV, which need not be installed for anything else. transformers' video processors are not used: they
need torchvision, and each resizes and cuts frames for one model, which here is the image processor's affair.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ..configuration.video_frames import frame_text, sampled_frames
from .pictures import to_rgb_picture


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Video:
    """The frames that are looked at.

    Args:
        frames: RGB pictures, in order.
        seconds: The time of each, from the start; `None` where the video has no clock.
    """

    frames: list[Image.Image]
    seconds: list[float | None]

    def texts(self, video_frames: dict) -> list[str]:
        """What stands in front of each frame in the text.

        Raises:
            ValueError: the text asks for seconds that are unknown.
        """
        if None in self.seconds and "{seconds" in (video_frames["frame_text"] or ""):
            raise ValueError(
                "The text of the frames asks for {seconds}, but these frames come without a rate. Pass a file, or the "
                'frames as {"frames": …, "fps": …}.'
            )
        return [frame_text(video_frames, number, time) for number, time in enumerate(self.seconds, start=1)]


def sample_video(source: Any, video_frames: dict, is_clip: bool = False) -> Video:
    """The frames of a video that are looked at.

    Args:
        source: A list of pictures (anything that `to_rgb_picture` takes); an array or tensor shaped
            `(frames, height, width, channels)` or `(frames, channels, height, width)`; either of them with its rate, as
            `{"frames": …, "fps": …}`; or a video file, as a path, a URL, or bytes.
        video_frames: As in the config, with every key (`configuration/video_frames.py`).
        is_clip: Frames of a video that has fewer are shown several times.

    Raises:
        ImportError: a file, and PyAV is not installed.
        ValueError: no frames, frames that are no pictures, or a file that is no video, or damaged.
        TypeError: something that is no video.
    """
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        return _sample_file(source, video_frames, is_clip)
    rate = None
    if isinstance(source, Mapping):
        if "frames" not in source or not source.get("fps"):
            raise ValueError('A video given by its frames and their rate is {"frames": [picture, …], "fps": 2.0}.')
        source, rate = source["frames"], float(source["fps"])
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if not isinstance(source, (list, tuple, np.ndarray)):
        raise TypeError(
            "A video must be a list of pictures, an array or tensor of them, a path, a URL or bytes, not "
            f"{type(source).__name__}."
        )
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise ValueError(
            f"An array of shape {source.shape} is not one video. Pass (frames, height, width, channels) or (frames, "
            "channels, height, width), and several videos as a list."
        )
    if len(source) == 0:
        raise ValueError("The video has no frames. Leave it out.")
    indices = sampled_frames(video_frames, len(source), rate, is_clip)
    return Video(
        frames=[to_rgb_picture(source[index]) for index in indices],
        seconds=[index / rate if rate else None for index in indices],
    )


def _sample_file(source: Any, video_frames: dict, is_clip: bool) -> Video:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading video files needs PyAV. Install it with: pip install av (or pip install 'anyvlm[video]'). Without "
            "it, pass the frames: a list of pictures, or an array."
        ) from error
    name = "the video" if isinstance(source, (bytes, bytearray)) else str(source)
    try:
        total, rate = _count_frames(av, source, name)
        indices = sampled_frames(video_frames, total, rate, is_clip)
        found, decoded = _decode(av, source, indices)
        if decoded < total and len(found) < len(indices):
            logger.warning(
                f"{name} states {total} frames, but only {decoded} can be decoded: it may be cut short. Frames are taken "
                "from those."
            )
            indices = sampled_frames(video_frames, decoded, rate, is_clip) if decoded else []
            found, _ = _decode(av, source, indices)
    except av.FFmpegError as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"There is no video file {name}.") from error
        raise ValueError(
            f"{name} cannot be decoded ({error}). It is no video, or damaged, or cut short: fetch it again, or encode it "
            "again with ffmpeg."
        ) from error
    if not found:
        raise ValueError(f"{name} has no frames that can be decoded. Leave it out, or fetch it again.")
    return Video(frames=[picture for picture, _ in found], seconds=[time for _, time in found])


def _open(av, source: Any):
    return av.open(BytesIO(source) if isinstance(source, (bytes, bytearray)) else str(source))


def _count_frames(av, source: Any, name: str) -> tuple[int, float | None]:
    """Number of frames and frames per second, as the file states them; counted where it states no number (Matroska)."""
    with _open(av, source) as container:
        if not container.streams.video:
            raise ValueError(f"{name} has no pictures in it, as a file of sound. Leave it out.")
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return total, float(rate) if rate else None


def _decode(av, source: Any, indices: list[int]) -> tuple[list[tuple[Image.Image, float | None]], int]:
    """The frames at `indices` with their times, and how many frames were decoded up to the last of them."""
    found, decoded, start = [], 0, None
    wanted = set(indices)
    with _open(av, source) as container:
        for frame in container.decode(container.streams.video[0]):
            start = (
                frame.time if start is None else start
            )  # the clock of a stream that was cut out of another is not 0
            if decoded in wanted:
                # Cameras that are held upright write the turn beside the pixels, as in pictures.
                picture = frame.to_image()
                picture = picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
                time = None if frame.time is None else frame.time - start
                found.extend([(picture, time)] * indices.count(decoded))
            decoded += 1
            if len(found) == len(indices):
                break
    return found, decoded
