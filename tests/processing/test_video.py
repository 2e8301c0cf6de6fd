"""Every kind of video people pass: the same frames, or an error that says what to do. Files are written here with PyAV."""

import struct
import sys
from io import BytesIO

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import load_video
from video_files import write_video

from anyvlm.configuration.video_frames import resolve_video_frames
from anyvlm.processing.video import sample_video


def settings(**given):
    return resolve_video_frames(given)


def pixels(video):
    return np.stack([np.asarray(frame) for frame in video.frames])


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (10, 9, 7, 3), dtype=np.uint8)


def test_forms_of_one_video_agree(frames):
    expected = frames[[0, 2, 5, 7]]
    pictures = [Image.fromarray(frame) for frame in frames]
    for source in (
        frames,
        frames.transpose(0, 3, 1, 2),
        torch.from_numpy(frames),
        torch.from_numpy(frames).permute(0, 3, 1, 2) / 255,
        pictures,
        tuple(pictures),
        list(frames),
        {"frames": pictures, "fps": 5},
    ):
        video = sample_video(source, settings(num_frames=4))
        assert np.array_equal(pixels(video), expected)


def test_times():
    frames = [Image.new("RGB", (4, 4))] * 10
    assert sample_video({"frames": frames, "fps": 5}, settings(fps=1)).seconds == [0.0, 1.0]
    assert sample_video(frames, settings(num_frames=2)).seconds == [None, None]
    video = sample_video(write_video(), settings(fps=2, frame_text="{seconds:.1f}: "))
    assert video.texts(settings(frame_text="{number} {seconds:.1f}")) == ["1 0.0", "2 0.5", "3 1.0", "4 1.5"]


def test_file_is_read_as_transformers_reads_it(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(write_video())
    expected, _ = load_video(str(path), num_frames=6)
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(pixels(sample_video(source, settings(num_frames=6))), expected)


def test_file_that_states_no_number_of_frames():
    """Matroska, of which WebM is a kind."""
    video = sample_video(write_video(codec="libx264", container="matroska"), settings(num_frames=4))
    assert video.seconds == [0.0, 0.5, 1.0, 1.5]


def test_upright_camera():
    """The turn is written beside the pixels: here by a quarter to the right."""
    file = bytearray(write_video())
    start = file.find(b"tkhd") + 44
    file[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned = pixels(sample_video(bytes(file), settings(num_frames=2)))
    assert np.array_equal(turned, np.rot90(pixels(sample_video(write_video(), settings(num_frames=2))), -1, (1, 2)))


def test_file_that_shows_fewer_frames_than_it_states(caplog, tmp_path):
    """The list of frames stands at the start of the file, and the file ends after the twelfth."""
    with (
        av.open(BytesIO(write_video())) as whole,
        av.open(str(tmp_path / "video.mp4"), "w", options={"movflags": "faststart"}) as output,
    ):
        stream = output.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    file = (tmp_path / "video.mp4").read_bytes()
    sizes = file.find(b"stsz") + 16
    end = file.find(b"mdat") + 4 + sum(struct.unpack(">20i", file[sizes : sizes + 80])[:12])
    video = sample_video(file[:end], settings(num_frames=4))
    assert "states 20 frames, but only 12 can be decoded" in caplog.text
    assert np.allclose(video.seconds, [0.0, 0.3, 0.6, 0.9])


def _sound() -> bytes:
    buffer = BytesIO()
    with av.open(buffer, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "cannot be decoded"),
        (lambda: b"this is text" * 50, "cannot be decoded.*no video, or damaged"),
        (lambda: write_video()[:1000], "cannot be decoded.*cut short"),
        (_sound, "no pictures in it"),
        (list, "no frames"),
        (lambda: np.zeros((0, 4, 4, 3), dtype=np.uint8), "no frames"),
        (lambda: np.zeros((4, 4, 3), dtype=np.uint8), "not one video"),
        (lambda: np.zeros((2, 5, 5, 7), dtype=np.uint8), "not one picture"),
        (lambda: {"frames": [Image.new("RGB", (4, 4))]}, "fps"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        sample_video(make(), settings())


def test_seconds_that_are_unknown():
    video = sample_video([Image.new("RGB", (4, 4))] * 3, settings())
    with pytest.raises(ValueError, match="without a rate"):
        video.texts(settings(frame_text="{seconds}"))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.mp4"):
        sample_video(tmp_path / "nothing.mp4", settings())


def test_not_a_video():
    with pytest.raises(TypeError, match="list of pictures"):
        sample_video(42, settings())


def test_without_pyav(monkeypatch, frames):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av.*pass the frames"):
        sample_video("video.mp4", settings())
    assert len(sample_video(frames, settings()).frames) == 8
