"""Projectors of learned queries against transformers' own modules and plain torch, with the same weights."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Idefics2Config,
    IdeficsConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)
from transformers.models.aimv2.modeling_aimv2 import build_2d_sinusoidal_position_embedding
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from anyvlm.configuration.token_grids import token_grid
from anyvlm.modeling.projectors import build_projector
from anyvlm.modeling.query_projectors import sincos_positions_2d


def make_random(module: nn.Module) -> nn.Module:
    """Weights that differ from one another everywhere, norms and latents included."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def copy_weights(projector: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    projector.load_state_dict(weights, strict=True)
    return projector.eval()


def reference_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """MiniCPM-V's definition, number by number."""
    positions = torch.empty(rows, columns, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for channel in range(width):
                half, place = divmod(channel, width // 2)
                function, index = divmod(place, quarter)
                angle = (row if half else column) / 10000 ** (index / quarter)
                positions[row, column, channel] = math.cos(angle) if function else math.sin(angle)
    return positions.flatten(0, 1).float()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2)])
def test_positions_are_those_of_the_definition(grid):
    torch.testing.assert_close(sincos_positions_2d(grid, 16), reference_positions(*grid, 16), rtol=0, atol=1e-7)


def test_positions_are_those_of_aimv2():
    """Which has the row in the first half of the channels."""
    ours, theirs = sincos_positions_2d((3, 5), 16), build_2d_sinusoidal_position_embedding(3, 5, 16)
    torch.testing.assert_close(ours, theirs.roll(8, dims=1), rtol=0, atol=1e-7)


def test_resampler_of_minicpm_equals_plain_torch():
    """Keys of features with positions, values without; torch's own multi-head attention."""
    projector = make_random(
        build_projector({"type": "resampler", "in_features": 12, "out_features": 16, "num_queries": 5})
    )
    layer = projector.layers[0]
    oracle = nn.MultiheadAttention(16, layer.attention.num_heads, batch_first=True)
    parts = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
    oracle.in_proj_weight.data = torch.cat([part.weight for part in parts])
    oracle.in_proj_bias.data = torch.cat([part.bias for part in parts])
    oracle.out_proj.load_state_dict(layer.attention.o_proj.state_dict())
    features, grid = torch.randn(2, 15, 12), (3, 5)

    context = layer.context_norm(features @ projector.input_projection.layers[0].weight.T)
    queries = layer.queries_norm(projector.queries).expand(2, -1, -1)
    attended, _ = oracle(queries, context + reference_positions(*grid, 16), context)
    expected = projector.norm(attended) @ projector.output_projection.weight.T

    tokens, tokens_grid = projector(features, grid)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    assert tokens_grid == (1, 5)
    transposed, _ = projector(features, (5, 3))
    assert (transposed - tokens).abs().max() > 1e-2


def test_resampler_of_idefics2_equals_its_connector():
    config = Idefics2Config(
        vision_config={"hidden_size": 24},
        text_config={"model_type": "mistral", "hidden_size": 32, "intermediate_size": 40, "hidden_act": "silu"},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
        },
    )
    native = make_random(Idefics2Connector(config))
    projector = build_projector(
        {
            "type": "resampler",
            "in_features": 24,
            "out_features": 32,
            "num_queries": 5,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "attention_bias": False,
            "positions": None,
            "norm": "rms_norm",
            "residual": True,
            "queries_as_context": True,
            "mlp": {"hidden_features": 128, "hidden_act": "silu", "bias": False, "gated": True},
            "input_projection": {"hidden_features": 40, "hidden_act": "silu", "bias": False, "gated": True},
            "output_projection": False,
        }
    )
    weights = native.state_dict()

    def mlp(ours, theirs):
        gate_and_up = torch.cat([weights[f"{theirs}.up_proj.weight"], weights[f"{theirs}.gate_proj.weight"]])
        return {
            f"{ours}.layers.0.weight": gate_and_up,
            f"{ours}.layers.1.weight": weights[f"{theirs}.down_proj.weight"],
        }

    perceiver = "perceiver_resampler"
    ours = mlp("input_projection", "modality_projection")
    ours["queries"], ours["norm.weight"] = weights[f"{perceiver}.latents"], weights[f"{perceiver}.norm.weight"]
    for index in range(2):
        here, there = f"layers.{index}", f"{perceiver}.layers.{index}"
        ours |= mlp(f"{here}.mlp", f"{there}.mlp")
        for name, native_name in {
            "queries_norm": "input_latents_norm",
            "context_norm": "input_context_norm",
            "mlp_norm": "post_attention_layernorm",
            **{f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"},
        }.items():
            ours[f"{here}.{name}.weight"] = weights[f"{there}.{native_name}.weight"]
    copy_weights(projector, ours)
    features = torch.randn(3, 12, 24)
    expected = native(features, torch.ones(3, 12, dtype=torch.long))
    torch.testing.assert_close(projector(features, (3, 4))[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_resampler_of_idefics_equals_its_perceiver(qk_norm):
    config = IdeficsConfig(
        vision_config={"embed_dim": 16, "intermediate_size": 64},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm},
    )
    native = make_random(IdeficsPerceiverResampler(config, 16, depth=2, n_heads=2, head_dim=8, n_latents=5))
    projector = build_projector(
        {
            "type": "resampler",
            "in_features": 16,
            "out_features": 16,
            "num_queries": 5,
            "num_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 8,
            "attention_bias": False,
            "positions": None,
            "norm_eps": 1e-5,
            "residual": True,
            "queries_as_context": True,
            "qk_norm": qk_norm,
            "mlp": {"hidden_features": 64, "hidden_act": "relu", "bias": False},
            "output_projection": False,
        }
    )
    renames = {
        "latents": "queries",
        "layer_norm": "norm",
        "blocks.{}.0.context_layer_norm": "layers.{}.context_norm",
        "blocks.{}.0.latents_layer_norm": "layers.{}.queries_norm",
        "blocks.{}.0.q_layer_norm": "layers.{}.attention.q_norm",
        "blocks.{}.0.k_layer_norm": "layers.{}.attention.k_norm",
        "blocks.{}.0.q_proj": "layers.{}.attention.q_proj",
        "blocks.{}.0.k_proj": "layers.{}.attention.k_proj",
        "blocks.{}.0.v_proj": "layers.{}.attention.v_proj",
        "blocks.{}.0.output_proj": "layers.{}.attention.o_proj",
        "blocks.{}.1.ln": "layers.{}.mlp_norm",
        "blocks.{}.1.fc": "layers.{}.mlp.layers.0",
        "blocks.{}.1.c_proj": "layers.{}.mlp.layers.1",
    }
    prefixes = {theirs.format(i): ours.format(i) for i in range(2) for theirs, ours in renames.items()}
    weights = {}
    for key, value in native.state_dict().items():
        prefix = next(prefix for prefix in prefixes if key == prefix or key.startswith(prefix + "."))
        weights[prefixes[prefix] + key[len(prefix) :]] = value
    copy_weights(projector, weights)
    features = torch.randn(3, 12, 16)
    torch.testing.assert_close(projector(features, (3, 4))[0], native(features), rtol=0, atol=1e-6)


QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "model_type": "opt",
    "vocab_size": 40,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def qformer_of(native, reads_text=False):
    """Our projector with the weights of a native model's, and that model's features of two pictures."""
    make_random(native)
    projector = build_projector(
        {
            "type": "qformer",
            "in_features": 24,
            "out_features": 32,
            "num_queries": 5,
            "qformer_config": QFORMER,
            "reads_text": reads_text,
        }
    )
    beginnings = ("query_tokens", "qformer.", "language_projection.")
    copy_weights(projector, {k: v for k, v in native.state_dict().items() if k.startswith(beginnings)})
    pictures = torch.randn(2, 3, 16, 16)
    return projector, pictures, native.vision_model(pixel_values=pictures).last_hidden_state


def test_qformer_equals_that_of_blip_2():
    config = Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=5)
    native = Blip2ForConditionalGeneration(config)
    projector, pictures, features = qformer_of(native)
    tokens, grid = projector(features, (1, 5))
    assert grid == (1, 5)
    torch.testing.assert_close(tokens, native.get_image_features(pictures).pooler_output, rtol=0, atol=1e-6)


def test_qformer_that_reads_text_equals_that_of_instructblip():
    config = InstructBlipConfig(vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=5)
    native = InstructBlipForConditionalGeneration(config)
    projector, pictures, features = qformer_of(native, reads_text=True)
    ids = torch.randint(1, 40, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for attention_mask in (None, mask):
        expected = native.get_image_features(
            pictures, qformer_input_ids=ids, qformer_attention_mask=attention_mask
        ).pooler_output
        tokens, _ = projector(features, (1, 5), qformer_input_ids=ids, qformer_attention_mask=attention_mask)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    other, _ = projector(features, (1, 5), qformer_input_ids=ids.flip(0))
    assert (other - tokens).abs().max() > 1e-3


@pytest.mark.parametrize(
    "projector_config",
    [
        {"type": "resampler"},
        {"type": "resampler", "num_queries": 3},
        {"type": "qformer", "qformer_config": QFORMER},
        {"type": "qformer", "qformer_config": QFORMER, "num_queries": 3},
    ],
)
def test_the_number_of_tokens_is_that_of_the_configuration(projector_config):
    projector = build_projector({"in_features": 8, "out_features": 30, **projector_config})
    tokens, grid = projector(torch.randn(2, 12, 8), (3, 4))
    assert grid == token_grid(projector_config, (3, 4))
    assert tokens.shape == (2, grid[0] * grid[1], 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"type": "resampler", "positions": "learned"}, "Unknown positions 'learned'"),
        ({"type": "resampler", "hidden_features": 18}, "multiple of 4"),
        ({"type": "resampler", "hidden_features": 16, "num_attention_heads": 3}, "3 heads do not divide"),
        ({"type": "resampler", "num_attention_heads": 4, "num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"type": "resampler", "hidden_features": 64, "output_projection": False}, "output_projection=True"),
        ({"type": "resampler", "num_queries": 0}, "num_queries must be at least 1"),
        ({"type": "resampler", "mlp": {"width": 3}}, "cannot be built"),
        ({"type": "qformer", "qformer_config": {"num_layers": 3}}, "has num_layers, which Blip2QFormerConfig"),
        ({"type": "qformer", "qformer_config": {"encoder_hidden_size": 3}}, "Leave it out: it is the width"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_projector({"in_features": 8, "out_features": 32, **arguments})
