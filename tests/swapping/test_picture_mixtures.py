"""Pictures made of others."""

import random

import numpy as np
from PIL import Image

from anyvlm.swapping.picture_mixtures import mixture


def test_size_and_chance():
    red, blue = Image.new("RGB", (40, 24), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    one, same, another = (mixture(red, blue, random.Random(seed)) for seed in (0, 0, 1))
    assert one.size == (40, 24) and one.mode == "RGB"
    assert np.array_equal(one, same) and not np.array_equal(one, another)


def test_half_of_them_have_a_half_of_the_other_picture():
    red, blue = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))
    made = [np.asarray(mixture(red, blue, random.Random(seed))).astype(int) for seed in range(200)]
    blues = np.array([(one[..., 2] > one[..., 0] + 50).mean() for one in made])
    mixed = blues > 0.05
    assert 0.4 < mixed.mean() < 0.6
    assert (blues[~mixed] == 0).all()
    assert 0.3 < blues[mixed].mean() <= 0.5


def test_pictures_are_mirrored_and_moved_but_not_away():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[15:25, 5:15] = 255  # on the left
    picture, black = Image.fromarray(pixels), Image.new("RGB", (40, 40))
    made = [np.asarray(mixture(picture, picture, random.Random(seed)))[..., 0] > 60 for seed in range(100)]
    seen = [one for one in made if one.any()]  # in some, halves without it are put together
    assert len(seen) > 70
    right = [one[:, 20:].sum() > one[:, :20].sum() for one in seen]
    assert 0.3 < np.mean(right) < 0.7
    assert np.asarray(mixture(black, black, random.Random(0))).max() == 0
