"""Joining the tokens of views: equal to LLaVA-NeXT's and LLaVA-OneVision's own, for pictures of any size."""

from types import SimpleNamespace

import pytest
import torch
from picture_sizes import random_sizes
from transformers import LlavaNextModel, LlavaOnevisionModel

from anyvlm.configuration.image_views import num_joined_tokens, plan_views
from anyvlm.modeling.view_joining import check_views, join_views


ARRANGEMENTS = {
    "llava_next": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    "llava_onevision": [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)],
}
SIZES = random_sizes(200)


def both(family, tile_edge=32, patch=8, width=6):
    """Tokens of pictures of all sizes as joined by us and by the native class, and our plans."""
    pinpoints = [[rows * tile_edge, columns * tile_edge] for rows, columns in ARRANGEMENTS[family]]
    views = {
        "type": "tiles",
        "layout": "anyres",
        "tile_size": [tile_edge] * 2,
        "pinpoints": pinpoints,
        "join": "spatial",
    }
    side = tile_edge // patch
    newline = torch.randn(width)
    native = SimpleNamespace(
        config=SimpleNamespace(
            image_grid_pinpoints=pinpoints, vision_config=SimpleNamespace(image_size=tile_edge, patch_size=patch)
        )
    )
    if family == "llava_onevision":
        views["max_merged_tiles"] = 4
        pack, extra = LlavaOnevisionModel.pack_image_features, {"vision_aspect_ratio": "anyres_max_4"}
    else:
        pack, extra = LlavaNextModel.pack_image_features, {"vision_feature_select_strategy": "default"}
    plans = [plan_views(views, *size) for size in SIZES]
    tokens = [torch.randn(len(plan.views), side * side, width) for plan in plans]
    flat = [view for picture in tokens for view in picture]
    ours = join_views(flat, [(side, side)] * len(flat), views, plans, SIZES, newline)
    theirs, _ = pack(native, tokens, torch.tensor(SIZES), image_newline=newline, **extra)
    counts = [num_joined_tokens(views, plan, [(side, side)] * len(plan.views), *s) for plan, s in zip(plans, SIZES)]
    return ours, theirs, counts


@pytest.mark.parametrize("family", ARRANGEMENTS)
def test_tiles_are_merged_as_by_the_native_class(family):
    ours, theirs, counts = both(family)
    for size, own, native, count in zip(SIZES, ours, theirs, counts):
        assert torch.equal(own, native), size
        assert len(own) == count


def test_views_are_concatenated_in_order():
    views = {"type": "tiles", "layout": "quarters"}
    sizes = [(1, 9), (4, 4)]
    plans = check_views(views, torch.tensor(sizes), 6)
    tokens = [torch.full((2, 1), float(index)) for index in range(6)]
    one, five = join_views(tokens, [(1, 2)] * 6, views, plans, sizes)
    assert one.flatten().tolist() == [0, 0]
    assert five.flatten().tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_wrong_number_of_views_is_refused():
    with pytest.raises(ValueError, match="have 6 views, but pixel_values has 5"):
        check_views({"type": "tiles", "layout": "quarters"}, torch.tensor([[1, 9], [4, 4]]), 5)
