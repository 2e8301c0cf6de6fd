"""Projectors against the projectors of transformers' own models, with the same weights."""

import math

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector
from transformers.models.cohere2_vision.modeling_cohere2_vision import Cohere2VisionMultiModalProjector
from transformers.models.fast_vlm.modeling_fast_vlm import FastVlmMultiModalProjector
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

from anyvlm.configuration.token_grids import NEED_ROWS_AND_COLUMNS, TOKEN_GRIDS, token_grid
from anyvlm.modeling.projectors import PROJECTORS, build_projector


#: Projectors with weights.
LEARNT = [name for name in PROJECTORS if name != "identity"]


WIDTH, TEXT_WIDTH, GRID = 16, 24, (8, 8)
LINEAR_1, LINEAR_2 = {"linear_1": "layers.0"}, {"linear_2": "layers.1"}
TWO_LAYERS = {**LINEAR_1, **LINEAR_2}


def native_config(model_type: str, **arguments):
    """A config of the native model with parts of our widths."""
    config = CONFIG_MAPPING[model_type]()
    config.vision_config.hidden_size = WIDTH
    config.text_config.hidden_size = TEXT_WIDTH
    for name, value in arguments.items():
        setattr(config, name, value)
    return config


def _gemma3():
    config = native_config("gemma3", mm_tokens_per_image=16)
    config.vision_config.image_size, config.vision_config.patch_size = 64, 8
    return Gemma3MultiModalProjector(config), config


def _paligemma():
    config = native_config("paligemma")
    config.vision_config.projection_dim = TEXT_WIDTH
    return PaliGemmaMultiModalProjector(config), config


def _mistral3():
    config = native_config("mistral3", vision_feature_layer=-1, spatial_merge_size=2)
    config.vision_config.patch_size, config.text_config.rms_norm_eps = 8, 1e-3
    return Mistral3MultiModalProjector(config), config


def _perception_lm():
    config = native_config("perception_lm", projector_pooling_ratio=2)
    config.vision_config.model_args = {"embed_dim": WIDTH}
    return PerceptionLMMultiModalProjector(config), config


def _got_ocr2():
    config = native_config("got_ocr2")
    config.vision_config.output_channels = WIDTH
    return GotOcr2MultiModalProjector(config), config


def _plain(projector_class, model_type, **arguments):
    def make():
        config = native_config(model_type, **arguments)
        return projector_class(config), config

    return make


def call(native, features):
    return native(features)


def call_internvl(native, features):
    """As in `InternVLModel.get_image_features`."""
    maps = features.reshape(len(features), *GRID, -1)
    maps = InternVLModel.pixel_shuffle(None, maps, scale_factor=0.5)
    return native(maps.reshape(len(features), -1, maps.shape[-1]))


def call_mistral3(native, features):
    sizes = torch.tensor([[64, 64]] * len(features))
    return native(features.flatten(0, 1), sizes).unflatten(0, (len(features), -1))


def call_got_ocr2(native, features):
    return native(features.transpose(1, 2).unflatten(2, GRID))


#: Family -> how its projector is made and called, ours, and the renames of weights (native beginning -> ours).
FAMILIES = {
    "llava": (_plain(LlavaMultiModalProjector, "llava"), call, {"type": "mlp"}, TWO_LAYERS),
    "llava, no bias, quick_gelu": (
        _plain(LlavaMultiModalProjector, "llava", multimodal_projector_bias=False, projector_hidden_act="quick_gelu"),
        call,
        {"type": "mlp", "bias": False, "hidden_act": "quick_gelu"},
        TWO_LAYERS,
    ),
    "llava_onevision": (
        _plain(LlavaOnevisionMultiModalProjector, "llava_onevision"),
        call,
        {"type": "mlp"},
        TWO_LAYERS,
    ),
    "fast_vlm": (_plain(FastVlmMultiModalProjector, "fast_vlm"), call, {"type": "mlp"}, TWO_LAYERS),
    "vipllava": (
        _plain(VipLlavaMultiModalProjector, "vipllava", vision_feature_layers=[-1], vision_feature_layer=-1),
        call,
        {"type": "mlp", "norm": "layer_norm"},
        {"projector_layernorm": "norms.0", **TWO_LAYERS},
    ),
    "paligemma": (_paligemma, call, {"type": "linear"}, {"linear": "linear"}),
    "idefics3": (
        _plain(Idefics3Connector, "idefics3", scale_factor=4),
        call,
        {"type": "pixel_shuffle", "scale_factor": 4, "num_layers": 1, "bias": False},
        {"modality_projection.proj": "layers.0"},
    ),
    "smolvlm": (
        _plain(SmolVLMConnector, "smolvlm", scale_factor=2),
        call,
        {"type": "pixel_shuffle", "num_layers": 1, "bias": False},
        {"modality_projection.proj": "layers.0"},
    ),
    "internvl": (
        _plain(InternVLMultiModalProjector, "internvl", downsample_ratio=0.5),
        call_internvl,
        {"type": "pixel_shuffle", "norm": "layer_norm"},
        {"layer_norm": "norms.0", **TWO_LAYERS},
    ),
    "aya_vision": (
        _plain(AyaVisionMultiModalProjector, "aya_vision", alignment_intermediate_size=40, downsample_factor=2),
        call,
        {
            "type": "pixel_shuffle",
            "norm": "layer_norm",
            "norm_eps": 1e-6,
            "hidden_features": 20,
            "gated": True,
            "hidden_act": "silu",
        },
        {"layernorm": "norms.0", **TWO_LAYERS},
    ),
    "cohere2_vision": (
        _plain(
            Cohere2VisionMultiModalProjector, "cohere2_vision", alignment_intermediate_size=40, downsample_factor=4
        ),
        call,
        {"type": "pixel_shuffle", "scale_factor": 4, "hidden_features": 20, "gated": True, "hidden_act": "silu"},
        TWO_LAYERS,
    ),
    "gemma3": (
        _gemma3,
        call,
        {
            "type": "avg_pool",
            "tokens_per_side": 4,
            "num_layers": 1,
            "bias": False,
            "norm": "zero_centered_rms_norm",
        },
        {"mm_soft_emb_norm": "norms.0", "mm_input_projection_weight": "layers.0.weight"},
    ),
    "mistral3": (
        _mistral3,
        call_mistral3,
        {"type": "patch_merger", "norm_eps": 1e-3, "bias": False},
        {"norm": "features_norm", "patch_merger.merging_layer": "merging_layer", **TWO_LAYERS},
    ),
    "perception_lm": (_perception_lm, call, {"type": "avg_pool", "pool_last": True}, TWO_LAYERS),
    "got_ocr2": (
        _got_ocr2,
        call_got_ocr2,
        {"type": "conv"},
        {"conv_upsampler1": "convs.0", "conv_upsampler2": "convs.1", "multimodal_projector": "linear"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_projector_of_the_family(family):
    make, call_native, projector_config, renames = FAMILIES[family]
    torch.manual_seed(0)
    native, config = make()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(0, 0.3)
    if family == "aya_vision":
        projector_config = {**projector_config, "norm_eps": config.adapter_layer_norm_eps}
    if family == "gemma3":
        projector_config = {**projector_config, "norm_eps": config.vision_config.layer_norm_eps}
    projector_config = {"in_features": WIDTH, "out_features": TEXT_WIDTH, **projector_config}
    ours = build_projector(projector_config)
    weights = {}
    for name, tensor in native.state_dict().items():
        before = max((old for old in renames if name == old or name.startswith(f"{old}.")), key=len)
        # Gemma 3 keeps a matrix, which is a linear map's weight transposed.
        weights[renames[before] + name[len(before) :]] = tensor.T if before.startswith("mm_input") else tensor
    ours.load_state_dict(weights)
    features = torch.randn(3, math.prod(GRID), WIDTH)
    with torch.no_grad():
        expected = call_native(native, features)
        tokens, grid = ours(features, GRID)
    assert grid == token_grid(projector_config, GRID)
    # Cohere2 Vision multiplies features that do not lie in memory in order, Gemma 3 a matrix that is not transposed: the
    # same numbers, summed in another order.
    tolerance = 1e-6 * expected.abs().max() if family in ("cohere2_vision", "gemma3") else 0
    assert (tokens - expected.reshape(tokens.shape)).abs().max() <= tolerance


#: Every type once with its defaults, and with arguments that change its grid.
CONFIGS = [
    *({"type": name} for name in LEARNT),
    {"type": "pixel_shuffle", "scale_factor": 3, "pad": True},
    {"type": "patch_merger", "scale_factor": 3, "pad": True, "norm": None, "num_layers": 3},
    {"type": "patch_merger", "crop": True},
    {"type": "avg_pool", "ratio": 3},
    {"type": "avg_pool", "tokens_per_side": 5, "pool_last": True},
    {"type": "conv", "num_convs": 3},
    {"type": "mlp", "num_layers": 4, "norm": "rms_norm", "norm_every_layer": True, "hidden_features": [5, 6, 7]},
]


def _name(config: dict) -> str:
    return " ".join(map(str, config.values()))


@pytest.mark.parametrize("projector_config", CONFIGS, ids=_name)
@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 5), (1, 1)], ids=str)
def test_the_model_makes_as_many_tokens_as_the_processor_expects(projector_config, grid):
    projector = build_projector({"in_features": 8, "out_features": 12, **projector_config})
    features = torch.randn(2, math.prod(grid), 8)
    try:
        expected = token_grid(projector_config, grid)
    except ValueError as refusal:
        with pytest.raises(ValueError) as error:
            projector(features, grid)
        assert str(error.value) == str(refusal)
        return
    tokens, tokens_grid = projector(features, grid)
    assert tuple(tokens_grid) == tuple(expected)
    assert tokens.shape == (2, math.prod(expected), 12)


def test_every_type_has_a_grid():
    assert PROJECTORS.keys() == TOKEN_GRIDS.keys()
    assert set(NEED_ROWS_AND_COLUMNS) <= TOKEN_GRIDS.keys()


def small(projector_type: str) -> nn.Module:
    """Without dropout, and no transformer of its full size."""
    config = {"type": projector_type, "in_features": 8, "out_features": 12}
    if projector_type == "qformer":
        config["qformer_config"] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build_projector(config).eval()


@pytest.mark.parametrize("projector_type", LEARNT)
def test_every_parameter_gets_a_gradient(projector_type):
    projector = small(projector_type)
    tokens, _ = projector(torch.randn(1, 16, 8), (4, 4))
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in projector.parameters())


@pytest.mark.parametrize("projector_type", LEARNT)
def test_the_scale_of_the_output_layer_is_the_scale_of_the_tokens(projector_type):
    torch.manual_seed(0)
    projector = small(projector_type)
    features = torch.randn(2, 16, 8)
    with torch.no_grad():
        if projector.output_layer.bias is not None:
            projector.output_layer.bias.zero_()
        before, _ = projector(features, (4, 4))
        projector.output_layer.weight.mul_(3)
        after, _ = projector(features, (4, 4))
    torch.testing.assert_close(after, 3 * before)


class TestPixelShuffle:
    @pytest.mark.parametrize("channel_order", ["places_first", "channels_first"])
    def test_padding_is_zeros_at_the_lower_and_right_edge(self, channel_order):
        config = {"type": "pixel_shuffle", "in_features": 8, "out_features": 12, "channel_order": channel_order}
        strict = build_projector(config)
        padding = build_projector({**config, "pad": True})
        padding.load_state_dict(strict.state_dict())
        maps = torch.randn(2, 3, 5, 8)
        whole = nn.functional.pad(maps, (0, 0, 0, 1, 0, 1)).flatten(1, 2)
        assert torch.equal(padding(maps.flatten(1, 2), (3, 5))[0], strict(whole, (4, 6))[0])

    def test_cropping_leaves_out_the_lower_and_right_edge(self):
        config = {"type": "pixel_shuffle", "in_features": 8, "out_features": 12}
        strict, cropping = build_projector(config), build_projector({**config, "crop": True})
        cropping.load_state_dict(strict.state_dict())
        maps = torch.randn(2, 3, 5, 8)
        whole = maps[:, :2, :4].flatten(1, 2)
        assert torch.equal(cropping(maps.flatten(1, 2), (3, 5))[0], strict(whole, (2, 4))[0])
        with pytest.raises(ValueError, match="not both"):
            build_projector({**config, "crop": True, "pad": True})

    def test_places_come_in_the_order_of_reading(self):
        """Not square, so that rows and columns cannot be mixed up: each token holds its own four places."""
        projector = build_projector(
            {"type": "pixel_shuffle", "in_features": 1, "out_features": 4, "num_layers": 1, "bias": False}
        )
        with torch.no_grad():
            projector.layers[0].weight.copy_(torch.eye(4))
        tokens, grid = projector(torch.arange(12.0).reshape(1, 12, 1), (2, 6))
        assert grid == (1, 3)
        assert tokens[0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]

    def test_a_grid_that_does_not_divide_names_what_works(self):
        with pytest.raises(ValueError, match=r"9x27 features.*2x2.*scale_factor to 3 or 9.*pad=True.*avg_pool"):
            token_grid({"type": "pixel_shuffle"}, (9, 27))


@pytest.mark.parametrize(
    ("projector_config", "message"),
    [
        ({"type": "magic"}, "avg_pool, conv, identity, linear, mlp, patch_merger, pixel_shuffle"),
        ({"type": "mlp", "num_layers": 0}, "num_layers >= 1, got 0"),
        ({"type": "mlp", "hidden_features": [4, 5]}, "2 widths, but there are 1 places"),
        ({"type": "mlp", "norm": "batch_norm"}, "layer_norm, rms_norm, zero_centered_rms_norm"),
        ({"type": "mlp", "hidden_act": "gull"}, "'gull'.*gelu"),
        ({"type": "pixel_shuffle", "scale_factor": 0}, "at least 1, got 0"),
        ({"type": "pixel_shuffle", "channel_order": "last"}, "places_first, channels_first"),
        ({"type": "avg_pool", "ratio": 2, "tokens_per_side": 4}, "not both"),
        ({"type": "avg_pool", "tokens_per_side": 0}, "at least 1, got 0"),
        ({"type": "conv", "num_convs": 0}, "num_convs >= 1, got 0"),
        ({"type": "conv", "stride": 3}, "stride"),
    ],
    ids=lambda value: _name(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(projector_config, message):
    with pytest.raises(ValueError, match=message):
        build_projector({"in_features": 8, "out_features": 12, **projector_config})
