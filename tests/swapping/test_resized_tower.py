"""The same tower for another size of pictures or patches.

The oracles: what transformers' own interpolation gives at that size, and the property that FlexiViT's resize has.
"""

import pytest
import torch
from model_tester import picture
from tiny_parts import compose, vision_config
from torch import nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel

import anyvlm
from anyvlm.modeling.vision_towers import build_vision_tower
from anyvlm.swapping.patch_kernels import resampled_kernel, resize_matrix
from anyvlm.swapping.resized_tower import fit_to_size, resized_tower


#: Towers that interpolate their positions themselves: in every call, if asked to, or by the nearest position.
INTERPOLATING = {
    "clip_vision_model": {"interpolate_pos_encoding": True},
    "siglip_vision_model": {"interpolate_pos_encoding": True},
    "vit": {"interpolate_pos_encoding": True},
    "deit": {"interpolate_pos_encoding": True},
    "dinov2_with_registers": {},
    "dinov2": {},
    "yolos": {},
    "idefics2_vision": {},
}
#: Towers of one size -> that one, and tensors of positions that change.
OF_ONE_SIZE = {
    "aimv2_vision_model": (32, ("embeddings.position_embedding.weight",)),
    "vitpose_backbone": (32, ("embeddings.position_embeddings",)),
    "llama4_vision_model": (32, ("positional_embedding_vlm",)),
    "mllama_vision_model": (
        32,
        (
            "gated_positional_embedding.embedding",
            "gated_positional_embedding.tile_embedding.weight",
        ),
    ),
    "pvt": (64, tuple(f"encoder.patch_embeddings.{stage}.position_embeddings" for stage in range(4))),
    "molmo2_vision": (32, ("positional_embedding",)),
}


def tower_of(model_type: str, **settings) -> nn.Module:
    """With positions that matter: some families start with zeros."""
    config = vision_config(model_type)
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    tower = build_vision_tower(config).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "position" in name or "pos_" in name or "gate" in name:
                parameter.normal_()
    return tower


def pictures(edge: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def assert_rest_is_kept(tower: nn.Module, new_tower: nn.Module, changed: tuple[str, ...]):
    old, new = tower.state_dict(), new_tower.state_dict()
    assert {key for key in old if old[key].shape != new[key].shape} == set(changed)
    for key in old.keys() - set(changed):
        assert torch.equal(old[key], new[key]), key


@pytest.mark.parametrize("edge", [48, 16])
@pytest.mark.parametrize("tower_type", INTERPOLATING)
def test_gives_what_the_towers_own_interpolation_gives(tower_type, edge):
    tower = tower_of(tower_type)
    new_tower, notes = resized_tower(tower, edge)
    assert type(new_tower) is type(tower) and new_tower.config.image_size in (edge, [edge, edge])
    assert len(notes) == (2 if tower_type == "yolos" else 1)
    with torch.no_grad():
        expected = tower(pictures(edge), **INTERPOLATING[tower_type]).last_hidden_state
        found = new_tower(pictures(edge)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        again = resized_tower(new_tower, edge)[0](pictures(edge)).last_hidden_state
    assert torch.equal(found, again)


def test_offsets_of_beit():
    """Of its positions BEiT learns biases for the offset between two places, and three more for CLS."""
    tower = tower_of("beit", use_relative_position_bias=True, use_absolute_position_embeddings=True)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_()
    new_tower, notes = resized_tower(tower, 64)
    tables = [key for key in tower.state_dict() if key.endswith("relative_position_bias_table")]
    assert_rest_is_kept(tower, new_tower, (*tables, "embeddings.position_embeddings"))
    for key in tables:
        assert any(key in note and "offsets 7x7 interpolated to 15x15, 3 beside them kept" in note for note in notes)
        assert torch.equal(new_tower.state_dict()[key][-3:], tower.state_dict()[key][-3:])
    with torch.no_grad():
        expected = tower(pictures(64), interpolate_pos_encoding=True).last_hidden_state
        found = new_tower(pictures(64)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_offsets_of_sam_are_those_that_its_attention_makes_of_them():
    tower = tower_of("sam_vision_model")
    new_tower, _ = resized_tower(tower, 64)
    changed = [f"vision_encoder.layers.1.attn.rel_pos_{axis}" for axis in "hw"]
    assert_rest_is_kept(tower, new_tower, (*changed, "vision_encoder.pos_embed"))
    with torch.no_grad():
        for axis in "hw":
            old, new = (getattr(part.vision_encoder.layers[1].attn, f"rel_pos_{axis}") for part in (tower, new_tower))
            attention = tower.vision_encoder.layers[1].attn
            torch.testing.assert_close(attention.get_rel_pos(8, 8, old), attention.get_rel_pos(8, 8, new))
        old, new = (part.vision_encoder.pos_embed.permute(0, 3, 1, 2) for part in (tower, new_tower))
        expected = nn.functional.interpolate(old, size=(8, 8), mode="bicubic")
    torch.testing.assert_close(new, expected)
    assert torch.isfinite(new_tower(pictures(64)).last_hidden_state).all()


@pytest.mark.parametrize("tower_type", OF_ONE_SIZE)
def test_towers_of_one_size(tower_type):
    """Each of them refuses the size before. A table of equal rows stays one, and its rows beside the places stay."""
    edge, changed = OF_ONE_SIZE[tower_type]
    tower = tower_of(tower_type)
    new_tower, _ = resized_tower(tower, 2 * edge)
    assert_rest_is_kept(tower, new_tower, changed)
    for key in changed:
        old, new = tower.state_dict()[key], new_tower.state_dict()[key]
        assert not torch.equal(new, torch.zeros_like(new))
        if tower_type == "llama4_vision_model":  # CLS is the last of its tokens
            assert torch.equal(old[-1], new[-1])
        if tower_type == "mllama_vision_model":
            tiles = [table.reshape(-1, count, 32) for table, count in ((old, 17), (new, 65))]
            assert torch.equal(tiles[0][:, 0], tiles[1][:, 0])
            places = tiles[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            expected = nn.functional.interpolate(places, size=(8, 8), mode="bicubic").flatten(2).transpose(1, 2)
            torch.testing.assert_close(tiles[1][:, 1:], expected)


def test_height_and_width():
    tower = tower_of("vit")
    new_tower, notes = resized_tower(tower, (32, 48))
    assert new_tower.config.image_size == [32, 48] and "places 4x4 interpolated to 4x6" in notes[0]
    oblong = pictures(48)[:, :, :32]
    with torch.no_grad():
        expected = tower(oblong, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(new_tower(oblong).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("patch", "new_patch"), [(8, 16), (14, 16), (7, 7)])
def test_larger_patches_give_the_same_tokens(patch, new_patch):
    """Equation 3 of Beyer et al. 2023: a resized patch under the resampled kernel is the patch under the kernel."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, patch, patch, generator=generator, dtype=torch.float64)
    patches = torch.randn(4, 3, patch, patch, generator=generator, dtype=torch.float64)
    resized = nn.functional.interpolate(patches, size=(new_patch, new_patch), mode="bicubic", antialias=True)
    found = nn.functional.conv2d(resized, resampled_kernel(kernel, (new_patch, new_patch)))
    torch.testing.assert_close(found, nn.functional.conv2d(patches, kernel), rtol=1e-9, atol=1e-9)
    matrix = resize_matrix((patch, patch), (new_patch, new_patch))
    torch.testing.assert_close(patches.flatten(2) @ matrix.T, resized.flatten(2))


def test_smaller_patches_keep_what_smooth_pictures_give():
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 2, 16), indexing="ij")
    smooth = torch.stack([torch.sin(rows + columns), rows * columns / 6, torch.cos(rows)])[None]
    kernel = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = nn.functional.interpolate(smooth, size=(8, 8), mode="bicubic", antialias=True)
    expected = nn.functional.conv2d(smooth, kernel)
    found = nn.functional.conv2d(small, resampled_kernel(kernel, (8, 8)))
    naive = nn.functional.conv2d(small, nn.functional.interpolate(kernel, size=(8, 8), mode="bilinear"))
    error, naive_error = ((part - expected).norm() / expected.norm() for part in (found, naive))
    assert error < 0.02 < 20 * error < naive_error


@pytest.mark.parametrize("tower_type", ["clip_vision_model", "dinov2", "siglip2_vision_model", "qwen2_5_vl_vision"])
def test_tower_with_larger_patches(tower_type):
    """Convolutions, and layers of flat patches, whose values each family orders in its own way."""
    tower = tower_of(tower_type)
    edge = 64 if tower_type in ("clip_vision_model", "dinov2") else None
    new_tower, notes = resized_tower(tower, edge, patch_size=16)
    assert new_tower.config.patch_size == 16 and "by pseudo-inverse" in notes[0] and len(notes) == 1
    patches = pictures(32).unfold(2, 8, 8).unfold(3, 8, 8)
    resized = nn.functional.interpolate(patches.reshape(-1, 1, 8, 8), size=(16, 16), mode="bicubic", antialias=True)
    resized = resized.reshape(2, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)
    found, expected = (
        compose(part)[0].get_image_features(values).last_hidden_state
        for part, values in ((new_tower, resized), (tower, pictures(32)))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sizes_that_a_tower_takes_leave_it_as_it_is():
    tower = tower_of("clip_vision_model")
    assert fit_to_size(tower, 48) is tower
    resnet = tower_of("resnet")
    assert resized_tower(resnet, 96) == (resnet, ["ResNetModel takes pictures of 96x96 pixels as it is."])


def test_resized_tower_in_a_model(tmp_path):
    tower = tower_of("aimv2_vision_model")
    with pytest.raises(anyvlm.CompositionError, match="could not be run on single pictures of 48x48"):
        compose(tower, image_size=48)
    model, processor = compose(fit_to_size(tower, 48), image_size=48)
    assert model.config.vision_config.image_size == 48 and model.config.vision_tower_spec["grid"] == [6, 6]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = processor(text="<image> w1", images=[picture(0, (70, 90))], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_dtype_mode_and_frozen_weights_are_kept():
    tower = tower_of("clip_vision_model").to(torch.bfloat16).train()
    tower.embeddings.requires_grad_(False)
    new_tower, _ = resized_tower(tower, 64)
    assert new_tower.dtype == torch.bfloat16 and new_tower.training
    frozen = {name for name, parameter in tower.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in new_tower.named_parameters() if not parameter.requires_grad}
    assert tower.config.image_size == 32


class MixingTower(ViTModel):
    """Mixes places by a learned matrix, as MLP-Mixer does."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        places = (config.image_size // config.patch_size) ** 2
        self.mixing = nn.Parameter(torch.eye(places))


@pytest.mark.parametrize(
    ("tower", "arguments", "message"),
    [
        (
            "mixing",
            {"image_size": 64},
            r"tensor mixing of shape \(16, 16\).*would be of shape \(64, 64\).*Keep the size",
        ),
        ("clip_vision_model", {"image_size": (32, 64)}, "cannot be built for pictures of 32x64.*squares"),
        ("resnet", {"patch_size": 4}, "ResNetConfig states no patch_size"),
        ("convnext", {"image_size": 16}, "does not run with pictures of 16x16"),
        ("gemma4_vision", {"image_size": 64}, "multiple of 24 pixels"),
    ],
)
def test_refused(tower, arguments, message):
    tower = MixingTower(vision_config("vit")) if tower == "mixing" else tower_of(tower)
    with pytest.raises(anyvlm.CompositionError, match=message):
        resized_tower(tower, **arguments)
