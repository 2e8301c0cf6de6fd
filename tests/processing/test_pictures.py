"""Every kind of picture people pass: the same RGB pixels, or an error that says what to do."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from anyvlm.processing.pictures import to_rgb_picture


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def pixels(picture) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_forms_of_one_picture_agree(rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "picture.png")
    file = (tmp_path / "picture.png").read_bytes()
    for image in (
        Image.fromarray(rgb),
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        file,
        rgb,
        rgb.transpose(2, 0, 1),
        torch.from_numpy(rgb.transpose(2, 0, 1).copy()),
        rgb.astype(np.float32) / 255,
        rgb.astype(np.float64) / 255,
    ):
        assert np.array_equal(pixels(to_rgb_picture(image)), rgb), type(image)


def test_greyscale(rgb):
    grey = rgb[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    for image in (Image.fromarray(grey), grey, grey[..., None], grey[None]):
        assert np.array_equal(pixels(to_rgb_picture(image)), expected)
    black_and_white = pixels(to_rgb_picture(grey > 127))
    assert set(np.unique(black_and_white)) == {0, 255}


def test_transparent_is_laid_on_white(rgb):
    alpha = np.zeros((9, 7, 1), dtype=np.uint8)
    alpha[:4] = 255
    seen = pixels(to_rgb_picture(np.concatenate([rgb, alpha], axis=-1)))
    assert np.array_equal(seen[:4], rgb[:4])
    assert (seen[4:] == 255).all()


def test_palette_with_a_transparent_colour():
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30] + [0, 0, 0] * 255)
    picture.putpixel((0, 0), 1)
    picture.info["transparency"] = 1
    seen = pixels(to_rgb_picture(picture))
    assert tuple(seen[0, 0]) == (255, 255, 255)
    assert tuple(seen[1, 1]) == (10, 20, 30)


def test_cmyk(rgb):
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert np.abs(pixels(to_rgb_picture(cmyk)).astype(int) - rgb).max() <= 2


def test_orientation_tag_is_applied(rgb):
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(rgb).save(buffer, "PNG", exif=exif)
    assert np.array_equal(pixels(to_rgb_picture(buffer.getvalue())), np.rot90(rgb, -1))


def test_one_pixel():
    assert pixels(to_rgb_picture(Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]
    assert pixels(to_rgb_picture(np.full((1, 1, 3), 7, dtype=np.uint8))).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "no pixels.*0x5.*Leave it out"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "no pixels"),
        (Image.new("I;16", (4, 4)), "more than 8 bits.*I;16.*window"),
        (Image.new("I", (4, 4)), "more than 8 bits"),
        (Image.new("F", (4, 4)), "more than 8 bits"),
        (np.zeros((4, 4), dtype=np.uint16), "uint16.*window"),
        (np.zeros((4, 4), dtype=np.int64), "int64"),
        (np.full((4, 4, 3), 200.0), "from 0 to 1"),
        (np.full((4, 4, 3), np.nan), "finite"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "not one picture"),
        (np.zeros((5, 4, 7), dtype=np.uint8), "not one picture"),
        (b"this is text", "not a picture"),
    ],
)
def test_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb_picture(image)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_truncated_file(rgb, tmp_path, file_format):
    buffer = BytesIO()
    Image.fromarray(rgb).resize((200, 200)).save(buffer, file_format)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    for image in (path, path.read_bytes(), Image.open(path)):
        with pytest.raises(ValueError, match="cut short"):
            to_rgb_picture(image)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        to_rgb_picture(tmp_path / "nothing.png")


def test_not_a_picture():
    with pytest.raises(TypeError, match="PIL.Image"):
        to_rgb_picture(42)
