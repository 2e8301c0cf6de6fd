"""Which frames are looked at, and how many tokens they take. The oracle for the frames is transformers."""

import pytest
import torch
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from anyvlm.configuration.video_frames import frame_grid, frame_text, resolve_video_frames, sampled_frames


@pytest.mark.parametrize("total", [25, 26, 63, 100, 7919])
@pytest.mark.parametrize("settings", [{"num_frames": 1}, {"num_frames": 8}, {"fps": 1}, {"fps": 2.5}])
def test_frames_are_those_of_transformers(total, settings):
    metadata = VideoMetadata(total_num_frames=total, fps=25.0, duration=total / 25)
    expected = default_sample_indices_fn(metadata, **settings).tolist()
    found = sampled_frames(resolve_video_frames({**settings, "max_frames": 10_000}), total, 25.0)
    assert found == expected


def test_never_more_than_there_are_nor_than_the_cap():
    assert sampled_frames(resolve_video_frames({"num_frames": 8}), 3) == [0, 1, 2]
    assert sampled_frames(resolve_video_frames({"fps": 100, "max_frames": 4}), 80, 10.0) == [0, 20, 40, 60]
    assert sampled_frames(resolve_video_frames({"fps": 0.01}), 80, 10.0) == [0]


@pytest.mark.parametrize("pool", [1, 2, 3, 5])
def test_grid_is_that_of_adaptive_pooling_and_never_empty(pool):
    for rows in range(1, 12):
        for columns in (1, 2, 7, 16):
            found = frame_grid(resolve_video_frames({"frame_pool": pool}), (rows, columns))
            assert torch.nn.functional.adaptive_avg_pool2d(torch.ones(1, rows, columns), found).shape[1:] == found
            assert found == (max(1, -(-rows // pool)), max(1, -(-columns // pool)))


def test_text_of_a_frame():
    settings = resolve_video_frames({"frame_text": "Frame {number} ({seconds:.1f} s): "})
    assert frame_text(settings, 2, 0.75) == "Frame 2 (0.8 s): "
    assert frame_text(resolve_video_frames(None), 2, 0.75) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 8}, "no 'frames'. It takes: num_frames, fps"),
        ({"num_frames": 0}, "num_frames'. must be a whole number"),
        ({"num_frames": None}, "fps'. must be a number above 0"),
        ({"fps": -1}, "above 0"),
        ({"fps": 1, "num_frames": 8}, "not both"),
        ({"frame_pool": 1.5}, "frame_pool"),
        ({"max_frames": None}, "max_frames"),
        ({"frame_text": "{frame}"}, "number.*seconds"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve_video_frames(settings)


def test_rate_is_needed_for_frames_of_each_second():
    with pytest.raises(ValueError, match="no rate.*num_frames"):
        sampled_frames(resolve_video_frames({"fps": 1}), 10)
