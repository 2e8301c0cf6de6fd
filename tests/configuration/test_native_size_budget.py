"""The size of a picture with a budget of tokens, for any picture: whole cells, within the budget, of its proportions."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyvlm.configuration.native_size import native_size


def check(height, width, edge, max_cells, min_cells=1):
    found = native_size(height, width, edge, max_cells, min_cells)
    rows, columns = (pixels / edge for pixels in found)
    assert rows == int(rows) >= 1 and columns == int(columns) >= 1
    assert max_cells is None or rows * columns <= max_cells
    # The longer side sets the scale; what the shorter one would be by it is at most a cell away.
    scale = max(found) / max(height, width)
    assert abs(min(height, width) * scale - min(found)) <= edge
    return found


def test_a_thousand_sizes():
    generator = random.Random(0)
    for _ in range(1000):
        height, width = generator.randint(1, 4096), generator.randint(1, 4096)
        check(height, width, generator.choice([14, 16, 28, 56]), generator.choice([1, 7, 64, 256, 1024, None]))


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 300), st.integers(1, 300))
def test_any_size(height, width, edge, budget, least):
    least, budget = sorted((least, budget))
    check(height, width, edge, budget, least)


@pytest.mark.parametrize("size", [(1, 1), (1, 4096), (4096, 1), (2, 4095), (4096, 4096)])
@pytest.mark.parametrize("budget", [1, 2, 3, 256])
def test_extreme_proportions(size, budget):
    check(*size, 16, budget)


def test_size_that_fits_is_kept_to_half_a_cell():
    generator = random.Random(0)
    for _ in range(1000):
        size = generator.randint(8, 512), generator.randint(8, 512)
        found = native_size(*size, 16, 33 * 33)
        assert all(abs(was - now) <= 8 for was, now in zip(size, found))


def test_budget_is_used():
    """No larger grid of the same proportions would fit: with one cell more along the longer side there are too many."""
    generator = random.Random(0)
    for _ in range(1000):
        height, width = generator.randint(500, 4096), generator.randint(500, 4096)
        found = max(check(height, width, 16, 256)) // 16 + 1
        assert found * max(1, math.floor(found * min(height, width) / max(height, width) + 0.5)) > 256


def test_small_pictures_are_enlarged():
    assert native_size(10, 20, 16, 256, 32) == (64, 128)
    assert native_size(1, 1, 16, 256, 4) == (32, 32)
    assert native_size(40, 40, 16, 7, 7) == (32, 32)  # 3 x 3 would be too many


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5, 16, 4), "no pixels"), ((5, 5, 16, 0), "at least one"), ((5, 5, 16, 4, 5), "must not exceed")],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        native_size(*arguments)
