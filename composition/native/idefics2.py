"""Idefics2 (Laurençon et al. 2024): pictures of their own proportions padded to one size, a gated mlp and a perceiver of
few latents; optionally four quarters of each picture besides."""

import copy
from typing import Any

from transformers import Idefics2Config, Idefics2ImageProcessorPil, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .colours import colours_of
from .conditions import embedded_as_text, require_text
from .family import NativeFamily, require
from .keys import Rename, Rule, concatenated
from .pieces import example_size, read_parts, write_parts
from .projector_arguments import FREE, projector_arguments, same_projector


_FAKE = "<fake_token_around_image>"

#: These tokens are fixed in the processor's code.
_TEXT = {"start": _FAKE, "tile": "{tokens}" + _FAKE, "whole": "{tokens}" + _FAKE, "boundary": _FAKE}


def _gated(hidden_features: int, hidden_act: str) -> dict[str, Any]:
    return {"hidden_features": hidden_features, "hidden_act": hidden_act, "bias": False, "gated": True}


def _projector(width: int, hidden_act: str, input_projection: dict[str, Any], **sizes) -> dict[str, Any]:
    return {
        "type": "resampler",
        "attention_bias": False,
        "positions": None,
        "norm": "rms_norm",
        "residual": True,
        "queries_as_context": True,
        "mlp": _gated(4 * width, hidden_act),
        "input_projection": input_projection,
        "output_projection": False,
        **sizes,
    }


def _read_config(native: Idefics2Config) -> dict[str, Any]:
    text, perceiver = native.text_config, native.perceiver_config
    return {
        **read_parts(native),
        "projector_config": _projector(
            perceiver.hidden_size,
            perceiver.hidden_act,
            _gated(text.intermediate_size, text.hidden_act),
            num_queries=perceiver.resampler_n_latents,
            num_layers=perceiver.resampler_depth,
            num_attention_heads=perceiver.resampler_n_heads,
            num_key_value_heads=perceiver.num_key_value_heads,
            head_dim=perceiver.resampler_head_dim,
            norm_eps=perceiver.rms_norm_eps,
        ),
        "image_token_id": native.image_token_id,
        "image_size": example_size(native.vision_config, 1),
    }


def _write_config(config: AnyVlmConfig) -> Idefics2Config:
    views, text = config.image_views or {}, config.text_config
    require(
        *embedded_as_text(config),
        (config.projector_config["type"] == "resampler", "its projector is 'resampler'"),
        (views.get("layout") == "quarters", "it resizes pictures by layout 'quarters', cut or not"),
        (config.vision_config.model_type == "idefics2_vision", "its tower is idefics2_vision"),
        (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
    )
    found = projector_arguments(config.projector_config)
    width, hidden_act = found["out_features"], (found["mlp"] or {}).get("hidden_act", "silu")
    names = (
        "num_queries",
        "num_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "norm_eps",
    )
    projection = _gated(getattr(text, "intermediate_size", None), getattr(text, "hidden_act", None))
    # Without an output projection there are no hidden_features.
    expected = _projector(width, hidden_act, projection, **dict.fromkeys((*names, "hidden_features"), FREE))
    require(
        *same_projector(config.projector_config, expected),
        *((isinstance(found[name], (int, float)), f"its projector states {name}") for name in names),
    )
    return Idefics2Config(
        **write_parts(config),
        perceiver_config={
            "hidden_act": hidden_act,
            "hidden_size": width,
            "rms_norm_eps": found["norm_eps"],
            "resampler_n_latents": found["num_queries"],
            "resampler_depth": found["num_layers"],
            "resampler_n_heads": found["num_attention_heads"],
            "resampler_head_dim": found["head_dim"],
            "num_key_value_heads": found["num_key_value_heads"],
        },
        image_token_id=config.image_token_id,
    )


def _gated_rules(native: str, ours: str) -> list[Rule]:
    """Ours has the values and the gate in one matrix."""
    return [
        concatenated([f"{native}up_proj.weight", f"{native}gate_proj.weight"], f"{ours}layers.0.weight"),
        Rename(f"{native}down_proj.weight", f"{ours}layers.1.weight"),
    ]


def _rules(native: Idefics2Config) -> list[Rule]:
    perceiver, projector = "model.connector.perceiver_resampler.", "multi_modal_projector."
    layer, ours = f"{perceiver}layers.*.", f"{projector}layers.*."
    return [
        Rename("model.vision_model.", "vision_tower."),
        *_gated_rules("model.connector.modality_projection.", f"{projector}input_projection."),
        Rename(f"{perceiver}latents", f"{projector}queries"),
        Rename(f"{perceiver}norm.", f"{projector}norm."),
        Rename(f"{layer}input_latents_norm.", f"{ours}queries_norm."),
        Rename(f"{layer}input_context_norm.", f"{ours}context_norm."),
        Rename(f"{layer}self_attn.", f"{ours}attention."),
        Rename(f"{layer}post_attention_layernorm.", f"{ours}mlp_norm."),
        *_gated_rules(f"{layer}mlp.", f"{ours}mlp."),
    ]


def _read_views(native: Idefics2Config, processor: ProcessorMixin) -> dict[str, Any]:
    settings = processor.image_processor
    edges = dict(settings.size or {})
    if not settings.do_resize or not settings.do_pad or set(edges) != {"shortest_edge", "longest_edge"}:
        raise CompositionError(
            f"{type(settings).__name__} must bring the edges of pictures between shortest_edge and longest_edge and pad "
            f"them: it has do_resize={settings.do_resize}, size={edges}, do_pad={settings.do_pad}."
        )
    return {
        "type": "tiles",
        "layout": "quarters",
        "cut": bool(settings.do_image_splitting),
        "shortest_edge": edges["shortest_edge"],
        "longest_edge": edges["longest_edge"],
    }


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    image_processor = copy.deepcopy(native.image_processor)
    image_processor.do_image_splitting = False  # its views are cut already
    return {"image_processor": image_processor, "image_token": native.image_token, "image_text": _TEXT}


def _write_processor(processor: AnyVlmProcessor, native: Idefics2Config, config: AnyVlmConfig) -> dict[str, Any]:
    require_text(processor, _TEXT, processor.image_token == "<image>")
    views = processor.image_views
    edges = {name: views.get(name) for name in ("shortest_edge", "longest_edge")}
    require((None not in edges.values(), "it brings the edges of pictures between shortest_edge and longest_edge"))
    return {
        "image_processor": Idefics2ImageProcessorPil(
            size=edges,
            do_image_splitting=views.get("cut", True),
            **colours_of(processor.image_processor),
        ),
        "image_seq_len": native.perceiver_config.resampler_n_latents,
    }


FAMILIES = (
    NativeFamily(
        model_type="idefics2",
        model_class="Idefics2ForConditionalGeneration",
        processor_class="Idefics2Processor",
        read_config=_read_config,
        read_views=_read_views,
        write_config=_write_config,
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
        base_prefix="model.text_model.",
    ),
)
