"""Pictures made of those at hand, for a teacher that answers about any picture: moved, mirrored, lit otherwise, and halves
of two put together (CutMix, Yun et al. 2019). No label has to stay true: the teacher is asked about the new picture.
"""

import math
import random

from PIL import Image, ImageEnhance, ImageOps


#: Farthest that a picture is moved, as a share of its sides; turned, in degrees; and enlarged or made smaller, as a factor.
LARGEST_SHIFT, LARGEST_TURN, LARGEST_ZOOM = 0.1, 10.0, 1.2


def mixture(picture: Image.Image, other: Image.Image, chance: random.Random) -> Image.Image:
    """A picture of the first one's size: it, changed, or with one half of the other one, changed likewise.

    Args:
        picture, other: In RGB.
        chance: What is random.
    """
    made = _moved(picture, chance)
    if chance.random() < 0.5:
        width, height = made.size
        half = (0, 0, width, height // 2) if chance.random() < 0.5 else (0, 0, width // 2, height)
        made.paste(_moved(other.resize(picture.size), chance).crop(half), half[:2])
    made = ImageEnhance.Brightness(made).enhance(chance.uniform(0.7, 1.3))
    return ImageEnhance.Contrast(made).enhance(chance.uniform(0.7, 1.3))


def _moved(picture: Image.Image, chance: random.Random) -> Image.Image:
    """Mirrored or not, turned, enlarged and shifted; what comes in from outside is black."""
    if chance.random() < 0.5:
        picture = ImageOps.mirror(picture)
    width, height = picture.size
    angle = math.radians(chance.uniform(-LARGEST_TURN, LARGEST_TURN))
    zoom = LARGEST_ZOOM ** chance.uniform(-1, 1)
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = (width - 1) / 2, (height - 1) / 2
    x_in = x + chance.uniform(-LARGEST_SHIFT, LARGEST_SHIFT) * width
    y_in = y + chance.uniform(-LARGEST_SHIFT, LARGEST_SHIFT) * height
    # PIL asks where in the picture each place of the result comes from.
    matrix = (cosine, sine, x_in - cosine * x - sine * y, -sine, cosine, y_in + sine * x - cosine * y)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)
