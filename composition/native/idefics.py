"""Idefics (Laurençon et al. 2023), the open Flamingo: gated cross-attention before decoder layers of a Llama, with or
without a perceiver between them and a CLIP."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import CLIPVisionConfig, IdeficsConfig, LlamaConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ..errors import CompositionError
from .family import NativeFamily, require
from .idefics_processor import call_processor, read_processor, write_processor
from .keys import Rename, Rule, concatenated, reshaped
from .projector_arguments import FREE, same_projector


#: `CLIPVisionConfig` and `LlamaConfig` are these parts of Idefics, whose own are no models by themselves.
_VISION = (
    "image_size",
    "intermediate_size",
    "patch_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
_TEXT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)

_PERCEIVER = {
    "type": "resampler",
    "positions": None,
    "norm": "layer_norm",
    "norm_eps": 1e-5,
    "residual": True,
    "queries_as_context": True,
    "attention_bias": False,
    "output_projection": False,
}


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _mlp(width: int) -> dict[str, Any]:
    return {"num_layers": 2, "hidden_features": 4 * width, "hidden_act": "relu", "bias": False}


def _taken(config: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in names}


def _end_of_text(config: Any) -> int | None:
    """The token after which the processor of Idefics hides pictures from what follows."""
    end = config.eos_token_id
    return end[0] if isinstance(end, (list, tuple)) else end


def _cross_attention(config: Any, every: int, qk_norm: bool, gate: str, image_features: int) -> dict[str, Any]:
    """The `image_fusion_config`, of a config with Llama's names."""
    return {
        "decoder_layers": "model.layers",
        "num_decoder_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "image_features": image_features,
        "num_heads": config.num_attention_heads,
        "every": every,
        "see": "latest",
        "forget_after": _end_of_text(config),
        "mlp": "gated",
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "mlp_everywhere": True,
        "gate": gate,
        "norm": "rms_norm",
        "norm_eps": config.rms_norm_eps,
        "image_norm": False,
        "qk_norm": qk_norm,
    }


def _read_config(native: IdeficsConfig) -> dict[str, Any]:
    if native.dropout or native.num_hidden_layers % native.cross_layer_interval:
        raise CompositionError(
            "Idefics is converted without dropout in its language model, which a Llama has not, and with a number of layers "
            f"that is a multiple of cross_layer_interval; here dropout={native.dropout}, {native.num_hidden_layers} layers, "
            f"cross_layer_interval={native.cross_layer_interval}. Set config.dropout to 0 if that is all."
        )
    width = native.vision_config.embed_dim
    projector = {"type": "identity", "out_features": width}
    if native.use_resampler:
        perceiver = native.perceiver_config
        projector = {
            **_PERCEIVER,
            "out_features": width,
            "num_queries": perceiver.resampler_n_latents,
            "num_layers": perceiver.resampler_depth,
            "num_attention_heads": perceiver.resampler_n_heads,
            "head_dim": perceiver.resampler_head_dim,
            "qk_norm": perceiver.qk_layer_norms_perceiver,
            "mlp": _mlp(width),
        }
    return {
        "vision_config": CLIPVisionConfig(hidden_size=width, **_taken(native.vision_config, _VISION)),
        "text_config": LlamaConfig(
            vocab_size=native.vocab_size + native.additional_vocab_size,
            # For the way back: how many of the last rows are a matrix of their own.
            additional_vocab_size=native.additional_vocab_size,
            **_taken(native, _TEXT),
        ),
        "projector_config": projector,
        "image_size": (native.vision_config.image_size,) * 2,
        "vision_feature_select_strategy": "full",
        "fusion": "cross_attention",
        "image_fusion_config": _cross_attention(
            native,
            native.cross_layer_interval,
            native.qk_layer_norms,
            {"float": "scalar", "vector": "vector"}[native.alpha_type],
            width,
        ),
    }


def _write_config(config: AnyVlmConfig) -> IdeficsConfig:
    require(
        (config.fusion == "cross_attention", f"its fusion is 'cross_attention', not {config.fusion!r}"),
        (type(config.vision_config) is CLIPVisionConfig, "its tower is CLIP's"),
        (type(config.text_config) is LlamaConfig, "its language model is a Llama"),
        (config.image_views is None, "a picture is one view"),
        (config.vision_feature_layer is None, "it reads the tower's last hidden state"),
        (config.vision_feature_select_strategy == "full", "it reads every token of the tower"),
    )
    text, vision, projector = config.text_config, config.vision_config, config.projector_config
    width = vision.hidden_size
    fusion = {"every": 4, "qk_norm": False, "gate": "scalar", **config.image_fusion_config}
    expected = _cross_attention(text, fusion["every"], fusion["qk_norm"], fusion["gate"], width)
    require(
        *(
            (fusion.get(name) == value, f"its cross-attention has {name} {value!r}")
            for name, value in expected.items()
        ),
        *((name in expected, f"its cross-attention knows no {name}") for name in fusion),
        (text.num_hidden_layers % fusion["every"] == 0, "it has a multiple of cross_layer_interval layers"),
        (text.num_key_value_heads == text.num_attention_heads, "its Llama has as many key-value heads as heads"),
        (text.head_dim * text.num_attention_heads == text.hidden_size, "its Llama's heads share the width"),
        (not (text.attention_bias or text.mlp_bias or text.attention_dropout), "its Llama has no biases or dropout"),
    )
    if projector["type"] == "identity":
        perceiver = {}
    else:
        free = ("num_queries", "num_layers", "num_attention_heads", "head_dim", "qk_norm")
        own = dict.fromkeys((*free, "num_key_value_heads", "hidden_features"), FREE)
        require(
            *same_projector(projector, {**_PERCEIVER, "mlp": _mlp(width), **own}),
            (
                projector.get("num_key_value_heads") in (None, projector.get("num_attention_heads")),
                "its perceiver has as many key-value heads as heads",
            ),
            (projector["out_features"] == width, "its perceiver is as wide as the tower"),
        )
        require(*((projector.get(name) is not None, f"{name} of its perceiver is stated") for name in free))
        perceiver = {
            "use_resampler": True,
            "resampler_n_latents": projector["num_queries"],
            "resampler_depth": projector["num_layers"],
            "resampler_n_heads": projector["num_attention_heads"],
            "resampler_head_dim": projector["head_dim"],
            "qk_layer_norms_perceiver": projector["qk_norm"],
        }
    additional = getattr(text, "additional_vocab_size", 0)
    return IdeficsConfig(
        vocab_size=text.vocab_size - additional,
        additional_vocab_size=additional,
        cross_layer_interval=fusion["every"],
        qk_layer_norms=fusion["qk_norm"],
        alpha_type={"scalar": "float", "vector": "vector"}[fusion["gate"]],
        use_resampler=bool(perceiver),
        perceiver_config=perceiver,
        vision_config={"embed_dim": width, **_taken(vision, _VISION)},
        **_taken(text, _TEXT),
    )


def _rules(native: IdeficsConfig) -> list[Rule]:
    cross, fusion = "model.gated_cross_attn_layers.*.", "fusion.layers.*."
    block, layer = "model.perceiver_resampler.blocks.*.", "multi_modal_projector.layers.*."
    sizes = (native.vocab_size, native.additional_vocab_size)
    rules: list[Rule] = [
        Rename("model.vision_model.", "vision_tower."),
        *(Rename(f"{cross}cross_attn.{name}.", f"{fusion}attention.{name}.") for name in _ATTENTION),
        Rename(f"{cross}cross_attn.q_layer_norm.", f"{fusion}attention.q_norm."),
        Rename(f"{cross}cross_attn.k_layer_norm.", f"{fusion}attention.k_norm."),
        Rename(f"{cross}mlp.", f"{fusion}mlp."),
        Rename(f"{cross}input_layernorm.", f"{fusion}attention_norm."),
        Rename(f"{cross}post_attention_layernorm.", f"{fusion}mlp_norm."),
        Rename("model.perceiver_resampler.latents", "multi_modal_projector.queries"),
        Rename("model.perceiver_resampler.layer_norm.", "multi_modal_projector.norm."),
        Rename(f"{block}0.context_layer_norm.", f"{layer}context_norm."),
        Rename(f"{block}0.latents_layer_norm.", f"{layer}queries_norm."),
        Rename(f"{block}0.q_layer_norm.", f"{layer}attention.q_norm."),
        Rename(f"{block}0.k_layer_norm.", f"{layer}attention.k_norm."),
        *(Rename(f"{block}0.{name}.", f"{layer}attention.{name}.") for name in _ATTENTION[:3]),
        Rename(f"{block}0.output_proj.", f"{layer}attention.o_proj."),
        Rename(f"{block}1.ln.", f"{layer}mlp_norm."),
        Rename(f"{block}1.fc.", f"{layer}mlp.layers.0."),
        Rename(f"{block}1.c_proj.", f"{layer}mlp.layers.1."),
    ]
    for alpha, gate in (("alpha_cross_attn", "attention_gate.gate"), ("alpha_dense", "mlp_gate.gate")):
        if native.alpha_type == "vector":
            rules.append(reshaped(f"{cross}{alpha}", f"{fusion}{gate}", (1, 1, -1), (-1,)))
        else:
            rules.append(Rename(f"{cross}{alpha}", f"{fusion}{gate}"))
    if native.additional_vocab_size:
        rules += [
            concatenated(
                ["model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"],
                "language_model.model.embed_tokens.weight",
                sizes=sizes,
            ),
            concatenated(
                ["lm_head.weight", "lm_head.additional_fc.weight"], "language_model.lm_head.weight", sizes=sizes
            ),
        ]
    return rules


FAMILIES = (
    NativeFamily(
        model_type="idefics",
        model_class="IdeficsForVisionText2Text",
        processor_class="IdeficsProcessor",
        read_config=_read_config,
        write_config=_write_config,
        rules=_rules,
        read_processor=read_processor,
        write_processor=write_processor,
        call_processor=call_processor,
        base_prefix="model.",
        plain_logits=False,
    ),
)
