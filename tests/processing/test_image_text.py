"""The text that stands for a picture: as transformers' own processors write it."""

from types import SimpleNamespace

import numpy as np
import pytest
from native_source import native_functions
from transformers import (
    AyaVisionProcessor,
    Cohere2VisionProcessor,
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    MiniCPMV4_6Processor,
)

from anyvlm.configuration.image_views import plan_views
from anyvlm.configuration.tile_layouts import PictureViews, View
from anyvlm.processing.image_text import check_image_text, joined_text, picture_prefix, picture_text


def plan_of(rows, columns, whole):
    number = rows * columns + 1
    return PictureViews((View((1, 1)),) * number, rows, columns, 0 if whole == "first" else number - 1)


GRIDS = [(0, 0), (1, 1), (1, 2), (3, 1), (2, 3)]


def written(image_text, token, rows, columns, whole="last", grid=(2, 2)):
    plan = plan_of(rows, columns, whole)
    return picture_text(image_text, token, plan, [grid] * len(plan.views))


@pytest.mark.parametrize("grid", GRIDS)
def test_idefics3(grid):
    native = SimpleNamespace(
        fake_image_token="<fake>", global_image_tag="<global-img>", image_token="<image>", image_seq_len=4
    )
    expected = Idefics3Processor.replace_image_token(native, {"rows": [[grid[0]]], "cols": [[grid[1]]]}, 0)
    image_text = {
        "tile": "<fake><row_{row}_col_{column}>{tokens}",
        "row_end": "\n",
        "whole": "\n<fake><global-img>{tokens}<fake>",
        "whole_alone": "<fake><global-img>{tokens}<fake>",
    }
    assert written(image_text, "<image>", *grid) == expected


@pytest.mark.parametrize("grid", GRIDS)
def test_aya_vision(grid):
    native = SimpleNamespace(
        img_size=28,
        patch_size=14,
        start_of_img_token="<s>",
        end_of_img_token="</s>",
        img_patch_token="<p>",
        tile_token="TILE",
        tile_global_token="TILE_GLOBAL",
    )
    expected = AyaVisionProcessor.replace_image_token(native, {"num_patches": [grid[0] * grid[1] + 1]}, 0)
    image_text = {"start": "<s>", "end": "</s>", "tile": "TILE_{index}{tokens}", "whole": "TILE_GLOBAL{tokens}"}
    assert written(image_text, "<p>", *grid) == expected


@pytest.mark.parametrize("grid", GRIDS)
def test_cohere2_vision(grid):
    native = SimpleNamespace(
        patch_size=2, image_token="<p>", img_line_break_token="<br>", boi_token="<boi>", eoi_token="<eoi>"
    )
    expected = Cohere2VisionProcessor.replace_image_token(native, {"num_patches": [grid[0] * grid[1] + 1]}, 0)
    image_text = {"start": "<boi>", "end": "<eoi>", "tile": "{tokens}<br>", "whole": "{tokens}<br>"}
    assert written(image_text, "<p>", *grid) == expected


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 1)])
def test_gemma3(grid):
    sequence = "\n\n<boi><soft><soft><soft><soft><eoi>\n\n"
    native = SimpleNamespace(full_image_sequence=sequence)
    expected = Gemma3Processor.replace_image_token(native, {"num_crops": [grid[0] * grid[1]]}, 0)
    one = "\n\n<boi>{tokens}<eoi>\n\n"
    image_text = {
        "whole_alone": one,
        "whole": f"Here is the original image {one} and here are some crops to help you see better ",
        "tile": one,
        "tile_separator": " ",
        "row_separator": " ",
    }
    assert written(image_text, "<soft>", *grid, whole="first") == expected


@pytest.mark.parametrize("grid", GRIDS[:2] + GRIDS[3:])
def test_minicpmv(grid):
    rows, columns = grid
    native = SimpleNamespace(
        image_token="<unk>",
        image_start_token="<image>",
        image_end_token="</image>",
        slice_start_token="<slice>",
        slice_end_token="</slice>",
        image_id_start_token="<image_id>",
        image_id_end_token="</image_id>",
        slice_mode=True,
    )
    number = rows * columns + 1
    inputs = {
        "grids": [[rows, columns]],
        "num_patches_per_image": [number],
        "target_sizes": np.array([[8, 8]] * number),
    }
    expected = MiniCPMV4_6Processor.replace_image_token(native, inputs, 0, image_token_divisor=16)
    image_text = {
        "prefix": "<image_id>{number}</image_id>",
        "whole": "<image>{tokens}</image>",
        "tile": "<slice>{tokens}</slice>",
        "row_separator": "\n",
    }
    assert written(image_text, "<unk>", rows, columns, whole="first") == expected
    numbered = MiniCPMV4_6Processor._prepend_local_ids(native, ["<unk> <unk>", "<unk>"], ["a", "b", "c"], "<unk>")
    assert numbered == [picture_prefix(image_text, n) + text for n, text in ((0, "a"), (1, "b"), (0, "c"))]


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (1, 4)])
def test_rows_of_pixtral(grid):
    native = SimpleNamespace(
        patch_size=2, spatial_merge_size=2, image_token="[IMG]", image_break_token="[B]", image_end_token="[E]"
    )
    replace_image_token = native_functions("pixtral.processing_pixtral", "replace_image_token").replace_image_token
    expected = replace_image_token(native, {"image_sizes": [(grid[0] * 4, grid[1] * 4)]}, 0)
    image_text = {"line_end": "[B]", "last_line_end": "[E]"}
    assert written(image_text, "[IMG]", 0, 0, grid=grid) == expected


def test_start_and_end_of_internvl():
    native = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<c>", image_seq_length=4
    )
    expected = InternVLProcessor.replace_image_token(native, {"num_patches": [3]}, 0)
    assert joined_text({"start": "<img>", "end": "</img>"}, "<c>", 12) == expected


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="Unknown keys in image_text: rows"):
        check_image_text({"rows": "x"})
    with pytest.raises(ValueError, match="'tile'.*must have {tokens}"):
        check_image_text({"tile": "<slice>"})


def test_plain_pictures_are_their_tokens():
    assert picture_text(None, "<i>", plan_views(None, 5, 5), [(2, 3)]) == joined_text(None, "<i>", 6) == "<i>" * 6
