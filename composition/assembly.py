"""Parts into one model, around the weights that they have."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.image_views import has_newline
from ..modeling.fusion import build_fusion
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.projectors import build_projector
from .model_sizes import embedding_width


def assemble(
    config: AnyVlmConfig,
    vision_tower: nn.Module,
    language_model: nn.Module,
    fusion: nn.Module | None = None,
    image_newline: nn.Parameter | None = None,
) -> AnyVlmForConditionalGeneration:
    """The model around the parts as they are, without a second copy of their weights.

    Args:
        fusion, image_newline: Those of another model with the same language model, to be used as they are; what is left
            out and what the config has is new.
    """
    with torch.device("meta"):
        model = AnyVlmForConditionalGeneration(config)
    model.vision_tower, model.config.vision_config = vision_tower, vision_tower.config
    model.language_model, model.config.text_config = language_model, language_model.config
    projector = build_projector(config.projector_config)
    new_fusion = build_fusion(config.fusion, config.image_fusion_config) if fusion is None else None
    for part in (projector, new_fusion):
        for module in part.modules() if part is not None else ():
            model._init_weights(module)
    model.multi_modal_projector = projector.to(language_model.device, config.dtype)
    if new_fusion is not None:
        fusion = new_fusion.to(language_model.device, config.dtype)
    if fusion is not None:
        model.fusion = fusion
        model.attach_fusion()
    if image_newline is not None:
        model.image_newline = image_newline
    elif has_newline(config.image_views):
        model.image_newline = nn.Parameter(
            model.image_newline.new_empty(len(model.image_newline), dtype=config.dtype, device=language_model.device)
        )
        model._init_weights(model)
    model.generation_config = language_model.generation_config
    return model


def trial_model(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    vision_tower_spec: dict,
    language_model_spec: dict,
    **settings: Any,
) -> AnyVlmForConditionalGeneration:
    """A model around parts, usually small copies, whose tokenizer and projector are not known: what joining shows can be
    learned from it.

    Args:
        settings: Of `AnyVlmConfig`, beyond the parts and a linear projector.
    """
    width = embedding_width(language_model)
    config = AnyVlmConfig(
        vision_config=copy.deepcopy(vision_tower.config),
        text_config=copy.deepcopy(language_model.config),
        vision_tower_spec=vision_tower_spec,
        language_model_spec=language_model_spec,
        projector_config={"type": "linear", "in_features": vision_tower_spec["hidden_size"], "out_features": width},
        # Some have rows of their own beyond the vocabulary (moshi), which they cannot generate.
        image_token_id=min(language_model.get_input_embeddings().weight.shape[0], language_model.config.vocab_size)
        - 1,
        dtype=language_model.dtype,
        **settings,
    )
    return assemble(config, vision_tower, language_model).eval()


def cast_as_loaded(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights as loading them in `dtype` would: buffers that are computed (rotary frequencies) and modules that
    the part keeps in fp32 stay as they are. `Module.to` would round them, and a reloaded model would differ."""
    kept = set(part._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(part._keep_in_fp32_modules or ())
    for name, tensor in part.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)
