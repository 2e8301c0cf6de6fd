"""Which parts of a picture become views: as in transformers' own processors, for pictures of any size."""

import inspect
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
from native_source import native_functions
from picture_sizes import random_sizes
from transformers import (
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    MiniCPMV4_6ImageProcessorPil,
)
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from anyvlm.configuration.image_views import check_image_views, num_joined_tokens, plan_views


SIZES = random_sizes()


def empty(height, width):
    """A picture that takes no memory."""
    return np.broadcast_to(np.uint8(0), (3, height, width))


def merged_tokens(image_views, grid, height, width):
    plan = plan_views(image_views, height, width)
    return num_joined_tokens(image_views, plan, [grid] * len(plan.views), height, width)


def native_counter(processor_class, pinpoints, **attributes):
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints), **attributes)
    processor._get_unpadded_features = MethodType(processor_class._get_unpadded_features, processor)
    return MethodType(processor_class._get_number_of_features, processor)


def test_merged_tiles_are_counted_as_by_llava_next():
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    native = native_counter(LlavaNextProcessor, pinpoints, patch_size=14, num_additional_image_tokens=0)
    views = {"type": "tiles", "layout": "anyres", "tile_size": [336, 336], "pinpoints": pinpoints, "join": "spatial"}
    for size in SIZES:
        assert merged_tokens(views, (24, 24), *size) == native(*size, 336, 336), size


def test_merged_tiles_are_counted_as_by_llava_onevision():
    pinpoints = [[rows * 384, columns * 384] for rows in range(1, 7) for columns in range(1, 7)]
    attributes = {"num_image_tokens": 27 * 27, "vision_aspect_ratio": "anyres_max_9"}
    native = native_counter(LlavaOnevisionProcessor, pinpoints, **attributes)
    views = {"type": "tiles", "layout": "anyres", "tile_size": [384, 384], "pinpoints": pinpoints, "join": "spatial"}
    views["max_merged_tiles"] = 9
    for size in SIZES:
        assert merged_tokens(views, (27, 27), *size) == native(*size, 384, 384), size


@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 6), (1, 1), (4, 4)])
def test_dynamic_tiles_are_those_of_got_ocr2(least, most):
    native = GotOcr2ImageProcessorPil(
        crop_to_patches=True, min_patches=least, max_patches=most, size={"height": 448, "width": 448}
    )
    views = {"type": "tiles", "layout": "dynamic", "tile_size": [448, 448], "min_tiles": least, "max_tiles": most}
    for size in SIZES:
        assert len(plan_views(views, *size).views) == native.get_number_of_image_patches(*size), size


def test_dynamic_tiles_by_scale_are_those_of_cohere2_vision():
    native = native_functions(
        "cohere2_vision.image_processing_cohere2_vision", "get_optimal_tiled_canvas", "get_all_supported_aspect_ratios"
    ).get_optimal_tiled_canvas
    views = {"type": "tiles", "layout": "dynamic", "tile_size": [512, 512], "min_tiles": 1, "max_tiles": 12}
    views["fit"] = "scale"
    for size in SIZES:
        plan = plan_views(views, *size)
        assert (max(plan.columns, 1), max(plan.rows, 1)) == native(size, (512, 512), 1, 12), size


@pytest.mark.parametrize(("edge", "longest_edge"), [(364, 1456), (512, 2048), (512, 512), (100, 5000)])
def test_split_tiles_are_those_of_idefics3(edge, longest_edge):
    native = Idefics3ImageProcessorPil()

    def resize(image, size, resample=None):
        new = (
            get_resize_output_image_size(image, size.longest_edge) if size.longest_edge else (size.height, size.width)
        )
        return empty(*new)

    native.resize = resize  # the sizes without the pixels
    views = {"type": "tiles", "layout": "split", "tile_size": [edge, edge], "longest_edge": longest_edge}
    for size in SIZES:
        plan = plan_views(views, *size)
        resized = native.resize(empty(*size), SizeDict(longest_edge=longest_edge))
        resized = native.resize_for_vision_encoder(resized, edge)
        frames, rows, columns = native.split_images(resized, {"longest_edge": edge})
        assert (plan.rows, plan.columns) == (rows, columns), size
        assert [view.size for view in plan.views] == [frame.shape[1:] for frame in frames], size


@pytest.mark.parametrize(("min_crop_size", "most", "min_ratio"), [(256, 4, 1.2), (16, 8, 1.0), (3, 9, 1.5)])
def test_crops_are_those_of_gemma3(min_crop_size, most, min_ratio):
    native = Gemma3ImageProcessorPil()
    views = {"type": "tiles", "layout": "pan_and_scan", "min_crop_size": min_crop_size, "max_tiles": most}
    views["min_ratio"] = min_ratio
    for size in SIZES:
        crops = native.pan_and_scan(empty(*size), min_crop_size, most, min_ratio)
        # transformers keeps crops in which nothing is left, and fails on them.
        shapes = [crop.shape[1:] for crop in crops if 0 not in crop.shape]
        assert [view.size for view in plan_views(views, *size).views] == [size, *shapes], size


@pytest.mark.parametrize("most", [36, 4, 1])
def test_canvas_tiles_are_those_of_perception_lm(most):
    names = ("_factors", "_find_supported_aspect_ratios", "_get_image_height_width")
    names += ("_fit_image_to_canvas", "_find_closest_aspect_ratio")
    functions = native_functions("perception_lm.image_processing_perception_lm", *names)
    native = SimpleNamespace(max_num_tiles=most, _factors=functions._factors)
    for name in names[1:]:
        setattr(native, name, MethodType(getattr(functions, name), native))
    ratios = native._find_supported_aspect_ratios()
    native._find_supported_aspect_ratios = lambda: ratios  # computed anew for every picture there
    views = {"type": "tiles", "layout": "canvas", "tile_size": [448, 448], "max_tiles": most}
    for height, width in SIZES:
        plan = plan_views(views, height, width)
        expected = native._fit_image_to_canvas(width, height, 448) or native._find_closest_aspect_ratio(
            width, height, 448
        )
        assert (plan.columns, plan.rows) == expected, (height, width)


@pytest.mark.parametrize(
    ("area_edge", "most", "mode"), [(448, 9, "16x"), (448, 4, "4x"), (200, 9, "16x"), (448, 1, "16x")]
)
def test_slices_are_those_of_minicpmv(area_edge, most, mode):
    native = MiniCPMV4_6ImageProcessorPil()
    modes = [mode] if "downsample_mode" in inspect.signature(native.find_best_resize).parameters else []
    if mode == "4x" and not modes:
        pytest.skip("this version of transformers knows only the mode 16x")
    unit = 14 * {"16x": 4, "4x": 2}[mode]
    views = {"type": "slices", "slice_size": area_edge, "unit": unit, "max_slices": most}
    for size in SIZES:
        plan = plan_views(views, *size)
        grid = native.get_sliced_grid(size, most, area_edge)
        sizes = [native.find_best_resize(size, area_edge, 14, *modes, allow_upscale=grid is None)]
        if grid is not None:
            assert [plan.rows, plan.columns] == grid, size
            height, width = native.get_refine_size(size, grid, area_edge, 14, *modes, allow_upscale=True)
            sizes += [(height // grid[0], width // grid[1])] * (grid[0] * grid[1])
        assert [view.size for view in plan.views] == sizes, size


@pytest.mark.parametrize(
    ("image_views", "message"),
    [
        ({"type": "tile"}, "Unknown views 'tile'"),
        ({"type": "tiles", "layout": "mosaic"}, "Unknown layout of tiles 'mosaic'"),
        ({"type": "tiles", "layout": "dynamic", "tile_size": [32, 32]}, "lacks 'min_tiles'"),
        (
            {"type": "slices", "slice_size": 448, "unit": 56, "max_slices": 9, "join": "add"},
            "Unknown join of views 'add'",
        ),
    ],
)
def test_wrong_settings_are_refused(image_views, message):
    with pytest.raises(ValueError, match=message):
        check_image_views(image_views)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0x5 pixels"):
        plan_views(None, 0, 5)
