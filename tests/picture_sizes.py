"""Sizes of pictures, for tests that must hold for pictures of any size."""

import random


def random_sizes(number: int = 1000, largest: int = 4096, seed: int = 0) -> list[tuple[int, int]]:
    """Heights and widths from 1 to `largest`: the extreme ones, evenly drawn ones, and long thin ones."""
    draw = random.Random(seed).randint
    sizes = [(1, 1), (1, 2), (2, 1), (1, largest), (largest, 1), (largest, largest)]
    while len(sizes) < number:
        longest = (largest, largest, 60, largest)[len(sizes) % 4]
        other = (largest, largest, largest, 60)[len(sizes) % 4]
        sizes.append((draw(1, longest), draw(1, other)))
    return sizes[:number]
