"""Videos and their placeholders: the ways to pass them, what stands in the text, what is refused."""

import numpy as np
import pytest
import torch
from model_tester import picture
from tiny_parts import compose
from video_files import write_video

import anyvlm


@pytest.fixture(scope="module")
def processor():
    return compose(video_frames={"num_frames": 2})[1]


def frames(number, first=0):
    return [picture(first + index, (40, 50)) for index in range(number)]


def array(number, first=0):
    return np.stack([np.asarray(frame) for frame in frames(number, first)])


def test_flat_and_nested_videos_agree(processor, tmp_path):
    texts = ["w1 <video>", "w2", "<video> w3 <video>"]
    for index in range(3):
        (tmp_path / f"{index}.mp4").write_bytes(write_video(num_frames=4 + index))
    paths = [str(tmp_path / f"{index}.mp4") for index in range(3)]
    files = [(tmp_path / f"{index}.mp4").read_bytes() for index in range(3)]
    lists, arrays = ([make(4, 5 * index) for index in range(3)] for make in (frames, array))
    for forms in ([paths, files], [lists, arrays, torch.from_numpy(np.stack(arrays))]):
        expected = processor(text=texts, videos=forms[0], padding=True, return_tensors="pt")
        assert expected["num_video_frames"].tolist() == [2, 2, 2]
        for a, b, c in forms:
            for videos in ([a, b, c], [[a], [], [b, c]], [[a], None, [b, c]]):
                found = processor(text=texts, videos=videos, padding=True, return_tensors="pt")
                for key in expected:
                    assert torch.equal(found[key], expected[key])


def test_one_video(processor):
    expected = processor(text="<video>", videos=[frames(4)], return_tensors="pt")
    for video in (frames(4), array(4), {"frames": frames(4), "fps": 2}):
        found = processor(text="<video>", videos=video, return_tensors="pt")
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_frames_as_files(processor, tmp_path):
    """In the list of a text a list of paths can only be frames, as for transformers."""
    for index, frame in enumerate(frames(4)):
        frame.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    found = processor(text="<video>", videos=[[paths]], return_tensors="pt")
    expected = processor(text="<video>", videos=frames(4), return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ({}, 2),
        ({"num_frames": 3}, 3),
        ({"fps": 1}, 4),
        ({"videos_kwargs": {"fps": 2.5}}, 10),
        ({"do_sample_frames": False}, 20),
    ],
)
def test_a_call_says_which_frames(processor, asked, number):
    video = {"frames": frames(20), "fps": 5}
    assert processor(text="<video>", videos=video, **asked)["num_video_frames"].tolist() == [number]


def test_text_of_frames():
    _, processor = compose(video_frames={"frame_text": "w{number} w{seconds:.0f} ", "frame_pool": 4})
    video = {"frames": frames(3), "fps": 0.5}
    ids = processor(text="w8 <video> w9", videos=video)["input_ids"]
    expected = processor.tokenizer("w8 w1 w0 <image>w2 w2 <image>w3 w4 <image> w9")["input_ids"]
    assert ids == [expected]


def test_chat_with_a_file(processor, tmp_path):
    (tmp_path / "video.mp4").write_bytes(write_video())
    content = [
        {"type": "video", "path": str(tmp_path / "video.mp4")},
        {"type": "image", "image": picture(3)},
        {"type": "text", "text": " w1"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 3},
    )
    expected = processor(
        text=["User: <video><image> w1\n"],
        images=[picture(3)],
        videos=[(tmp_path / "video.mp4").read_bytes()],
        num_frames=3,
        return_tensors="pt",
    )
    assert set(inputs) == set(expected)
    for key in expected:
        assert torch.equal(inputs[key], expected[key])


@pytest.mark.parametrize(
    ("texts", "videos", "message"),
    [
        (["w1"], [frames(2)], "'<video>' stands 0 times, but 1 videos"),
        (["<video> <video>"], [frames(2)], "stands 2 times, but 1 videos"),
        (["<video>"], None, "stands 1 times, but 0 videos"),
        (["<video>", "<video>"], [[frames(2)], []], "text 1 of the batch.*stands 1 times, but 0 videos"),
        (["<video>", "w1"], [[frames(2)]], "2 texts but 1 lists of videos"),
        (["<video>"], [42], None),
        (["<image> <video>"], [frames(2)], "'<image>' stands 1 times, but 0 pictures"),
    ],
)
def test_refused(processor, texts, videos, message):
    with pytest.raises(ValueError if message else TypeError, match=message or "A video must be"):
        processor(text=texts, videos=videos)


def test_videos_without_text(processor):
    with pytest.raises(ValueError, match="need a text"):
        processor(videos=frames(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"video_frames": {"frames": 3}}, "no 'frames'"),
        ({"video_frames": {"frame_pool": 2}, "projector": "resampler"}, "not in rows and columns"),
        ({"vision": "vivit", "video_frames": {"num_frames": 7}}, "takes clips"),
        ({"vision": "vivit", "video_frames": {"frame_text": "{number}"}}, "takes clips"),
    ],
)
def test_settings_that_cannot_work(arguments, message):
    with pytest.raises(anyvlm.CompositionError, match=message):
        compose(**arguments)


def test_same_placeholder_for_both():
    with pytest.raises(ValueError, match="told apart"):
        compose(video_token="<image>")
