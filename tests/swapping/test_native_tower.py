"""Towers of one size that come to take each picture in its own."""

import pytest
import torch
from test_resized_tower import pictures, tower_of
from tiny_parts import compose
from transformers import Siglip2VisionModel

import anyvlm
from anyvlm.modeling.plain_pictures import padded_patches
from anyvlm.swapping.native_tower import native_tower


def naflex_inputs(values: torch.Tensor, patch: int = 8) -> dict:
    cut = padded_patches(values, {"patch": {"size": patch, "block": 1}})
    return {
        "pixel_values": cut["pixels"],
        "spatial_shapes": cut["shapes"],
        "pixel_attention_mask": cut["mask"],
    }


@pytest.mark.parametrize("edge", [32, 36])
def test_siglip_becomes_naflex(edge):
    """Also of a size that is no multiple of its patches, whose rest the convolution leaves out."""
    tower = tower_of("siglip_vision_model", image_size=edge)
    tower.embeddings.requires_grad_(False)
    native = native_tower(tower)
    assert isinstance(native, Siglip2VisionModel) and native.config.num_patches == 16
    assert not native.embeddings.patch_embedding.weight.requires_grad
    values = pictures(edge)
    with torch.no_grad():
        expected = tower(values)
        found = native(**naflex_inputs(values[..., :32, :32].contiguous()))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    old = {key: tensor for key, tensor in tower.state_dict().items() if "patch_embedding.weight" not in key}
    assert all(torch.equal(native.state_dict()[key], tensor) for key, tensor in old.items())


def test_naflex_in_a_model_sees_pictures_as_they_are():
    model, processor = compose(
        native_tower(tower_of("siglip_vision_model")), views={"type": "native", "max_tokens": 24}
    )
    values = pictures(32)[:, :, :16]
    features = model.get_image_features(**naflex_inputs(values))
    assert features.token_grids == [(2, 4), (2, 4)]


@pytest.mark.parametrize(
    "tower_type", ["clip_vision_model", "dinov2", "resnet", "qwen2_5_vl_vision", "idefics2_vision"]
)
def test_towers_that_take_any_size_stay(tower_type):
    tower = tower_of(tower_type)
    assert native_tower(tower) is tower


@pytest.mark.parametrize("tower_type", ["aimv2_vision_model", "sam_vision_model", "mllama_vision_model"])
def test_refused(tower_type):
    with pytest.raises(anyvlm.CompositionError, match=r"takes pictures of 32x32 pixels.*Use views=\"tiles\""):
        native_tower(tower_of(tower_type))
