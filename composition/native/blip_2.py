"""BLIP-2 (Li et al. 2023) and InstructBLIP (Dai et al. 2023): a Q-Former looks at every token of the tower, CLS included,
and its tokens come before the text, bos and padding included."""

import copy
from typing import Any

from transformers import Blip2Config, InstructBlipConfig, PreTrainedConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...configuration.instructions import reads_instruction
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .conditions import plain_embedding, whole_pictures
from .family import NativeFamily, require
from .keys import Rename


def _read_config(native: Blip2Config | InstructBlipConfig) -> dict[str, Any]:
    if not native.use_decoder_only_language_model:
        raise CompositionError(
            f"The language model of this checkpoint, {native.text_config.model_type!r}, is an encoder and a decoder. "
            "Checkpoints with a decoder alone can be converted (blip2-opt, instructblip-vicuna); with another language "
            "model, compose anew and train the projector."
        )
    qformer_config = native.qformer_config.to_diff_dict()
    for key in ("model_type", "encoder_hidden_size", "transformers_version", "dtype", "architectures"):
        qformer_config.pop(key, None)
    return {
        "vision_config": copy.deepcopy(native.vision_config),
        "text_config": copy.deepcopy(native.text_config),
        "projector_config": {
            "type": "qformer",
            "num_queries": native.num_query_tokens,
            "qformer_config": qformer_config,
            "reads_text": isinstance(native, InstructBlipConfig),
        },
        "image_token_id": native.image_token_index,
        "vision_feature_select_strategy": "full",
    }


def _write_config(config_class: type[PreTrainedConfig], config: AnyVlmConfig) -> PreTrainedConfig:
    projector, spec = config.projector_config, config.vision_tower_spec
    reads_text = config_class is InstructBlipConfig
    require(
        *plain_embedding(config),
        (projector["type"] == "qformer", f"its projector is a Q-Former, not {projector['type']!r}"),
        (
            reads_instruction(projector) == reads_text,
            f"its Q-Former reads {'the' if reads_text else 'no'} instruction",
        ),
        (config.vision_feature_select_strategy == "full", "its Q-Former sees every token of the tower"),
        (config.vision_feature_layer is None, "its Q-Former sees the tower's last hidden state"),
        *whole_pictures(spec),
        (
            type(config.vision_config) is config_class.sub_configs["vision_config"],
            f"its tower is a {config_class.sub_configs['vision_config'].model_type}",
        ),
    )
    return config_class(
        vision_config=copy.deepcopy(config.vision_config),
        qformer_config=dict(projector.get("qformer_config") or {}),
        text_config=copy.deepcopy(config.text_config),
        num_query_tokens=projector.get("num_queries", 32),
        image_token_index=config.image_token_id,
    )


def _rules(native: PreTrainedConfig) -> list[Rename]:
    return [
        Rename("vision_model.", "vision_tower."),
        *(
            Rename(name, f"multi_modal_projector.{name}")
            for name in ("query_tokens", "qformer.", "language_projection.")
        ),
    ]


def _read_processor(native, config: AnyVlmConfig) -> dict[str, Any]:
    arguments = {"image_token": str(native.image_token), "pictures_first": True}
    if reads_instruction(config.projector_config):
        arguments["qformer_tokenizer"] = copy.deepcopy(native.qformer_tokenizer)
    return arguments


def _write_processor(processor: AnyVlmProcessor, native, config: AnyVlmConfig) -> dict[str, Any]:
    require(
        (processor.pictures_first, "its image tokens come before the text and bos (the processor's pictures_first)")
    )
    arguments: dict[str, Any] = {"num_query_tokens": native.num_query_tokens}
    if reads_instruction(config.projector_config):
        arguments["qformer_tokenizer"] = copy.deepcopy(processor.qformer_tokenizer)
    return arguments


def _family(model_type: str, name: str, config_class: type[PreTrainedConfig]) -> NativeFamily:
    return NativeFamily(
        model_type=model_type,
        model_class=f"{name}ForConditionalGeneration",
        processor_class=f"{name}Processor",
        read_config=_read_config,
        write_config=lambda config: _write_config(config_class, config),
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
        causal_prefix="language_model.",
        plain_logits=False,
    )


FAMILIES = (
    _family("blip-2", "Blip2", Blip2Config),
    _family("instructblip", "InstructBlip", InstructBlipConfig),
)
