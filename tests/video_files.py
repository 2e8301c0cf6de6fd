"""Small video files, written with PyAV."""

from io import BytesIO

import av
import numpy as np


def write_video(num_frames=20, size=(48, 64), rate=10, codec="mpeg4", container="mp4") -> bytes:
    """A video whose frames grow redder, with a white square at the upper left."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for index in range(num_frames):
            frame = np.full((*size, 3), (index * 250 // num_frames, 20, 20), dtype=np.uint8)
            frame[: size[0] // 2, : size[1] // 2] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()
