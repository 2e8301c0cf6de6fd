"""Cut pictures: pixel for pixel what transformers' own processors make, and the planned number and sizes for any picture."""

import numpy as np
import pytest
import torch
from picture_sizes import random_sizes
from PIL import Image
from transformers import (
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    SmolVLMImageProcessorPil,
    ViTImageProcessorPil,
)

from anyvlm.configuration.image_views import plan_views
from anyvlm.processing.view_cutting import cut_views


EDGE = 28
SIZE = {"height": EDGE, "width": EDGE}
TILE = [EDGE, EDGE]
PINPOINTS = [[rows * EDGE, columns * EDGE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
PICTURE_SIZES = [(1, 1), (2, 3), (28, 28), (200, 300), (31, 250), (250, 31), (90, 91), (1, 80), (80, 1), (500, 400)]

VIEWS = {
    "anyres": {"type": "tiles", "layout": "anyres", "tile_size": TILE, "pinpoints": PINPOINTS},
    "dynamic": {"type": "tiles", "layout": "dynamic", "tile_size": TILE, "min_tiles": 1, "max_tiles": 12},
    "split": {"type": "tiles", "layout": "split", "tile_size": TILE, "longest_edge": 4 * EDGE},
    "quarters": {"type": "tiles", "layout": "quarters"},
    "pan_and_scan": {
        "type": "tiles",
        "layout": "pan_and_scan",
        "min_crop_size": 20,
        "max_tiles": 4,
        "min_ratio": 1.2,
    },
    "canvas": {"type": "tiles", "layout": "canvas", "tile_size": TILE, "max_tiles": 12},
    "slices": {"type": "slices", "slice_size": 4 * EDGE, "unit": EDGE, "max_slices": 9},
}


def noise(size):
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8))


#: Native processor, our views, and which of its pixel values are the views.
NATIVE = {
    "llava_next": (
        LlavaNextImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS),
        VIEWS["anyres"],
        lambda values: values[0],
    ),
    "llava_onevision": (
        LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=PINPOINTS),
        VIEWS["anyres"],
        lambda values: values[0],
    ),
    "got_ocr2": (GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True), VIEWS["dynamic"], lambda values: values),
    "idefics3": (
        Idefics3ImageProcessorPil(size={"longest_edge": 4 * EDGE}, max_image_size={"longest_edge": EDGE}),
        VIEWS["split"],
        lambda values: values[0],
    ),
    "smolvlm": (
        SmolVLMImageProcessorPil(size={"longest_edge": 4 * EDGE}, max_image_size={"longest_edge": EDGE}),
        VIEWS["split"],
        lambda values: values[0],
    ),
    "gemma3": (
        Gemma3ImageProcessorPil(
            size=SIZE,
            do_pan_and_scan=True,
            pan_and_scan_min_crop_size=20,
            pan_and_scan_max_num_crops=4,
            pan_and_scan_min_ratio_to_activate=1.2,
        ),
        VIEWS["pan_and_scan"],
        lambda values: values,
    ),
}


@pytest.mark.parametrize("family", NATIVE)
def test_pixels_are_those_of_the_native_processor(family):
    native, image_views, views_of = NATIVE[family]
    plain = ViTImageProcessorPil(
        size=SIZE, image_mean=native.image_mean, image_std=native.image_std, resample=native.resample
    )
    for size in PICTURE_SIZES:
        picture = noise(size)
        expected = torch.as_tensor(np.array(views_of(native(picture, return_tensors="pt")["pixel_values"])))
        views = cut_views(picture, plan_views(image_views, *size), native.resample)
        assert torch.equal(plain(views, return_tensors="pt")["pixel_values"], expected), size


def test_quarters_are_those_of_idefics2():
    """Idefics2 resizes each quarter by its own proportions, so the quarters are compared before that."""
    native = Idefics2ImageProcessorPil()
    for size in [size for size in PICTURE_SIZES if min(size) > 1]:
        picture = noise(size)
        expected = native.split_images(np.asarray(picture).transpose(2, 0, 1))
        found = cut_views(picture, plan_views(VIEWS["quarters"], *size))
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            assert np.array_equal(np.asarray(ours).transpose(2, 0, 1), theirs)


def test_slices_are_those_of_minicpmv():
    native = MiniCPMV4_6ImageProcessorPil(scale_resolution=4 * EDGE, patch_size=7)
    unsliced = MiniCPMV4_6ImageProcessorPil(scale_resolution=4 * EDGE, patch_size=7, slice_mode=False)
    for size in PICTURE_SIZES:
        picture = noise(size)
        expected = native(picture, return_tensors="pt")
        views = cut_views(picture, plan_views(VIEWS["slices"], *size), native.resample)
        found = unsliced(views, do_resize=False, return_tensors="pt")
        for key in ("pixel_values", "target_sizes"):
            assert torch.equal(found[key], expected[key]), size


@pytest.mark.parametrize("kind", VIEWS)
def test_views_have_the_planned_number_and_sizes(kind):
    """1,000 sizes; in grey and by the nearest pixel, as the size of a view does not depend on that."""
    for height, width in random_sizes():
        plan = plan_views(VIEWS[kind], height, width)
        views = cut_views(Image.new("L", (width, height)), plan, Image.Resampling.NEAREST)
        assert [(view.height, view.width) for view in views] == [view.size for view in plan.views], (height, width)
        assert plan.whole is not None
        assert len(plan.views) == plan.rows * plan.columns + 1
        assert min(min(view.size) for view in plan.views) > 0
