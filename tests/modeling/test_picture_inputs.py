"""How plain pictures are cut for towers that take patches, against transformers' own image processors."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Gemma4ImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    Pix2StructImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
)

from anyvlm.modeling.picture_inputs import PICTURE_INPUTS, picture_kinds, tower_arguments


SIZE = (64, 96)  # rows and columns differ, so that none can be taken for the other
UNCHANGED = {"do_resize": False, "do_normalize": False}


@pytest.fixture
def pictures():
    """Two pictures, as Pillow's and as what a plain image processor makes of them: `(2, 3, height, width)` in 0-1."""
    arrays = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in arrays], torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


def packed(pixels, **patch) -> dict:
    spec = {"patch": {"size": 8, "frames": 1, "form": "flat", "block": 1, **patch}}
    return PICTURE_INPUTS["packed_patches"].from_pictures(pixels, spec)


@pytest.mark.parametrize(("frames", "block"), [(1, 1), (2, 2), (1, 4)])
def test_packed_patches(pictures, frames, block):
    images, pixels = pictures
    processor = Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=frames, merge_size=block, **UNCHANGED)
    expected = processor(images, return_tensors="pt")
    found = packed(pixels, frames=frames, block=block)
    torch.testing.assert_close(found["pixels"], expected["pixel_values"])
    assert torch.equal(found["grids"], expected["image_grid_thw"])


def test_padded_patches(pictures):
    images, pixels = pictures
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=96, **UNCHANGED)
    expected = processor(images, return_tensors="pt")
    found = PICTURE_INPUTS["padded_patches"].from_pictures(pixels, {"patch": {"size": 8, "block": 1}})
    torch.testing.assert_close(found["pixels"], expected["pixel_values"])
    assert torch.equal(found["shapes"], expected["spatial_shapes"])
    assert torch.equal(found["mask"], expected["pixel_attention_mask"])


def test_positioned_patches(pictures):
    images, pixels = pictures
    processor = Gemma4ImageProcessorPil(
        patch_size=8, pooling_kernel_size=1, max_soft_tokens=280, do_resize=False, do_normalize=False
    )
    expected = processor(images, return_tensors="pt")
    found = PICTURE_INPUTS["positioned_patches"].from_pictures(pixels, {"patch": {"size": 8, "block": 1}})
    count = found["pixels"].shape[1]
    assert bool((expected["image_position_ids"][:, count:] < 0).all())
    torch.testing.assert_close(found["pixels"], expected["pixel_values"][:, :count])
    assert torch.equal(found["positions"], expected["image_position_ids"][:, :count])


def test_patch_strip(pictures):
    images, pixels = pictures
    processor = MiniCPMV4_6ImageProcessorPil(patch_size=8, slice_mode=False, **UNCHANGED)
    expected = processor(images, return_tensors="pt")
    found = PICTURE_INPUTS["patch_strip"].from_pictures(pixels, {"patch": {"size": 8, "block": 1}})
    torch.testing.assert_close(found["pixels"], expected["pixel_values"])
    assert torch.equal(found["shapes"], expected["target_sizes"].int())


def test_numbered_patches_have_the_places_of_pix2struct(pictures):
    images, pixels = pictures
    rows, columns = SIZE[0] // 8, SIZE[1] // 8
    processor = Pix2StructImageProcessorPil(
        patch_size={"height": 8, "width": 8}, max_patches=rows * columns, do_normalize=False
    )
    expected = processor(images, return_tensors="pt")
    found = PICTURE_INPUTS["numbered_patches"].from_pictures(pixels, {"patch": {"size": 8, "block": 1}})
    assert torch.equal(found["pixels"][..., :2], expected["flattened_patches"][..., :2].float())
    assert torch.equal(found["mask"].float(), expected["attention_mask"].float())


class TestArguments:
    SPEC = {
        "inputs": "padded_patches",
        "arguments": {"pixels": "pixel_values", "shapes": "spatial_shapes", "mask": "pixel_attention_mask"},
        "patch": {"size": 8, "frames": 1, "form": "flat", "block": 1},
    }

    def test_the_processors_outputs_are_handed_on(self):
        outputs = {"spatial_shapes": torch.tensor([[2, 3]]), "pixel_attention_mask": torch.ones(1, 6)}
        arguments = tower_arguments(self.SPEC, torch.zeros(1, 6, 192), outputs)
        assert arguments["spatial_shapes"] is outputs["spatial_shapes"]
        assert arguments["pixel_attention_mask"] is outputs["pixel_attention_mask"]

    def test_a_part_that_was_lost_on_the_way(self):
        with pytest.raises(ValueError, match="pixel_attention_mask is missing"):
            tower_arguments(self.SPEC, torch.zeros(1, 6, 192), {"spatial_shapes": torch.tensor([[2, 3]])})

    def test_outputs_of_another_kind_of_tower(self):
        with pytest.raises(ValueError, match="image_grid_thw was passed"):
            tower_arguments(self.SPEC, torch.zeros(1, 6, 192), {"image_grid_thw": torch.tensor([[1, 2, 3]])})


def test_a_language_models_layers_take_no_pictures():
    assert picture_kinds(["hidden_states", "attention_mask"]) == {}
    assert list(picture_kinds(["hidden_states", "grid_thw"])) == ["packed_patches"]
