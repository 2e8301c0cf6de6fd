"""Towers of one size that come to take each picture in its own."""

import pytest
import torch
from model_tester import picture
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


class TestSwap:
    """anyvlm.swap of a model's own tower, or of one for another size of pictures."""

    @pytest.mark.parametrize("tower_type", ["siglip_vision_model", "clip_vision_model"])
    @pytest.mark.parametrize("layer", [None, -2])
    def test_pictures_keep_their_size(self, tower_type, layer):
        """A square of the tower's size gives the logits that it gave; everything else is the same tensors."""
        model, processor = compose(tower_of(tower_type), vision_feature_layer=layer)
        native, native_processor, report = anyvlm.swap(model, processor, views="native")
        assert native.config.vision_feature_layer == layer
        assert native.config.image_views["max_tokens"] == 16, "as many as before"
        for name, tensor in model.multi_modal_projector.state_dict().items():
            assert torch.equal(native.multi_modal_projector.state_dict()[name], tensor)
        assert native.language_model is model.language_model
        what = {part["name"]: part["what"] for part in report.parts}
        assert what["multi_modal_projector"] == what["vision_tower"] == "kept"
        image, wide = picture(0, (32, 32)), picture(1, (30, 120))
        with torch.no_grad():
            expected = model(**processor(text="w1 <image> w2", images=[image], return_tensors="pt")).logits
            found = native(**native_processor(text="w1 <image> w2", images=[image], return_tensors="pt")).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        inputs = native_processor(text="<image> <image>", images=[image, wide], return_tensors="pt")
        images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        assert native.get_image_features(**images).token_grids == [(4, 4), (2, 8)]

    def test_budget_of_queries_is_one_of_features(self):
        model, processor = compose("clip_vision_model", projector={"type": "resampler", "num_queries": 5})
        native, _, _ = anyvlm.swap(model, processor, views="native")
        assert native.config.image_views["max_tokens"] == 16

    def test_budget_follows_the_tiles_before(self):
        views = {"type": "tiles", "layout": "dynamic", "max_tiles": 3, "thumbnail": True}
        model, processor = compose("clip_vision_model", views=views)
        native, _, _ = anyvlm.swap(model, processor, views={"type": "native", "min_tokens": 4})
        assert native.config.image_views["max_tokens"] == 4 * 16 and native.config.image_views["min_tokens"] == 4

    def test_new_tower_of_one_size_is_resized(self, caplog):
        model, processor = compose("clip_vision_model")
        tower = tower_of("aimv2_vision_model")
        swapped, new_processor, _ = anyvlm.swap(model, processor, vision=tower, image_size=64)
        assert swapped.config.vision_tower_spec["grid"] == [8, 8]
        assert swapped.vision_tower.embeddings.position_embedding.weight.shape[0] == 64
        assert "Aimv2VisionModel is resized: embeddings.position_embedding.weight" in caplog.text
        inputs = new_processor(text="w1 <image>", images=[picture(0, (50, 40))], return_tensors="pt")
        assert torch.isfinite(swapped(**inputs).logits).all()

    def test_tower_that_cannot_be_resized(self):
        model, processor = compose("clip_vision_model")
        with pytest.raises(anyvlm.CompositionError, match="could not be run on single pictures of 16x16"):
            anyvlm.swap(model, processor, vision=tower_of("convnext"), image_size=16)
