"""Small changes by a key alone; what a text says stays true."""

import numpy as np
import pytest
from model_tester import picture
from PIL import Image, ImageChops, ImageDraw, ImageEnhance

from anyvlm.training.data import Augmentation, augmentation_sheet


NOTHING = {
    "crop": 0.0,
    "rotation": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "blur_probability": 0.0,
    "jpeg_probability": 0.0,
}


@pytest.fixture
def scene():
    """Red on the left, blue on the right, upper half brighter."""
    image = Image.new("RGB", (60, 40), (40, 40, 160))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 29, 39), fill=(160, 40, 40))
    return Image.composite(image.point(lambda value: min(value + 60, 255)), image, _upper(image.size))


def _upper(size):
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0], size[1] // 2))
    return mask


def values(image):
    return np.asarray(image, dtype=np.int64)


def test_the_key_alone_decides(scene):
    augment = Augmentation()
    first = [augment(scene, (0, epoch, 5, 0)) for epoch in range(6)]
    again = [Augmentation()(scene, (0, epoch, 5, 0)) for epoch in range(6)]
    assert all(np.array_equal(values(one), values(other)) for one, other in zip(first, again))
    assert len({one.tobytes() for one in first}) == 6
    assert augment(scene, (1, 0, 5, 0)).tobytes() != first[0].tobytes()


def test_left_stays_left_and_up_stays_up(scene):
    for epoch in range(50):
        changed = values(Augmentation()(scene, (0, epoch, 0, 0)))
        assert changed.shape == (40, 60, 3)
        left, right = changed[:, :24].mean((0, 1)), changed[:, 36:].mean((0, 1))
        assert left[0] > left[2] and right[2] > right[0]
        assert changed[:16].mean() > changed[24:].mean()


def test_only_asked_for_it_mirrors(scene, caplog):
    flipped = Augmentation(**NOTHING, horizontal_flip=1.0)(scene, (0,))
    assert np.array_equal(values(flipped), values(scene)[:, ::-1])
    assert "left and right" in caplog.text
    turned = Augmentation(**NOTHING, vertical_flip=1.0)(scene, (0,))
    assert np.array_equal(values(turned), values(scene)[::-1])


def test_nothing_changes_nothing(scene):
    assert ImageChops.difference(Augmentation(**NOTHING)(scene, (3,)), scene).getbbox() is None
    assert Augmentation(probability=0.0)(scene, (3,)) is scene


def test_brightness_as_pillow(scene):
    """Within the two pictures of the strongest change, and reaching near both."""
    settings = {**NOTHING, "brightness": 0.5}
    means = [values(Augmentation(**settings)(scene, (epoch,))).mean() for epoch in range(60)]
    darkest, brightest = (values(ImageEnhance.Brightness(scene).enhance(factor)).mean() for factor in (0.5, 1.5))
    assert darkest <= min(means) < darkest + 10 and brightest - 10 < max(means) <= brightest


def test_each_kind_changes(scene):
    strong = {
        "crop": 0.5,
        "rotation": 20.0,
        "contrast": 0.8,
        "saturation": 0.9,
        "blur_probability": 1.0,
        "jpeg_probability": 1.0,
    }
    for name, value in strong.items():
        augment = Augmentation(**{**NOTHING, name: value, "jpeg_quality": 5, "blur": 10})
        changed = [augment(scene, (epoch,)) for epoch in range(4)]
        assert all(one.size == scene.size for one in changed)
        assert any(one.tobytes() != scene.tobytes() for one in changed), name


def test_one_pixel_survives():
    for epoch in range(20):
        assert Augmentation(blur_probability=1.0)(Image.new("RGB", (1, 1)), (epoch,)).size == (1, 1)


def test_settings_of_a_recipe():
    assert Augmentation.from_settings(None) is None and Augmentation.from_settings(False) is None
    assert Augmentation.from_settings(True) == Augmentation()
    assert Augmentation.from_settings({"crop": 0.2}).crop == 0.2
    with pytest.raises(ValueError, match="flip is not known.*horizontal_flip"):
        Augmentation.from_settings({"flip": 0.5})
    with pytest.raises(ValueError, match="brightness is from 0 to 1, not 2"):
        Augmentation(brightness=2)


def test_sheet(tmp_path):
    pictures = [picture(0, (80, 40)), tmp_path / "gone.png", picture(2, (40, 80))]
    path = augmentation_sheet(pictures, Augmentation(**NOTHING), tmp_path / "out" / "sheet.png", columns=3, edge=40)
    sheet = values(Image.open(path))
    assert sheet.shape == (2 * 44, 3 * 44, 3)
    assert np.array_equal(sheet[:, :44], sheet[:, 44:88]) and np.array_equal(sheet[:, :44], sheet[:, 88:])
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["sheet.png"]
