"""Every type that transformers knows has a tiny config, and lists of types are computed, not written."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from anyvlm.compatibility import tiny_configs
from anyvlm.compatibility.tiny_tokenizer import VOCABULARY


def _part(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    part = getattr(config, name, None)
    return part if isinstance(part, PreTrainedConfig) else config


def test_types_are_those_of_transformers():
    assert set(tiny_configs.text_types()) == set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    vision_types = set(tiny_configs.vision_types())
    assert vision_types >= set(modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES)
    assert vision_types >= set(modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES)
    # In no list of transformers; each has its class beside its config.
    assert vision_types >= {"metaclip_2_vision_model", "blip_2_vision_model", "idefics2_vision", "owlvit_vision_model"}
    assert vision_types >= {"qwen2_vl_vision", "ovis2_vision", "minicpmv4_6_vision", "kosmos_2_vision_model", "clip"}
    # Text, sound, whole vision-language models, parts of a decoder.
    assert not vision_types & {"llama", "whisper", "llava", "qwen2_vl", "blip_2_qformer", "vision-encoder-decoder"}
    assert vision_types <= set(CONFIG_MAPPING)


def test_vision_types_are_told_by_what_their_class_takes():
    """The rule is about the class, not about names: it holds for a type that this transformers does not have."""

    class TowerModel(PreTrainedModel):
        def forward(self, pixel_values, **kwargs): ...

    class DecoderModel(PreTrainedModel):
        def forward(self, input_ids, pixel_values=None): ...

    class PackedTowerModel(PreTrainedModel):
        def forward(self, hidden_states, grid_thw): ...

    assert tiny_configs._takes_only_pictures(TowerModel)
    assert tiny_configs._takes_only_pictures(PackedTowerModel)
    assert not tiny_configs._takes_only_pictures(DecoderModel)


#: Types whose text part is no causal language model that transformers can build, and why.
NO_LANGUAGE_MODEL = {
    "emu3": "its text part is listed as a part of the whole alone",
    "mllama": "its text part is listed as a part of the whole alone",
    "musicgen": "the listed config is that of the whole, which its class does not take",
    "musicgen_melody": "the listed config is that of the whole, which its class does not take",
    "gemma4_assistant": "all its layers read the cache of another model",
    "gemma4_unified_assistant": "all its layers read the cache of another model",
}


@pytest.mark.parametrize("model_type", tiny_configs.text_types())
def test_text_config_is_tiny(model_type):
    config = _part(tiny_configs.text_config(model_type), "text_config")
    if model_type in NO_LANGUAGE_MODEL:
        with pytest.raises((AttributeError, ValueError)), torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert config.vocab_size == len(VOCABULARY)


@pytest.mark.parametrize("model_type", tiny_configs.vision_types())
def test_vision_config_is_tiny(model_type):
    config = _part(tiny_configs.vision_config(model_type), "vision_config")
    assert 8 <= tiny_configs.picture_size(model_type) <= 224
    try:
        with torch.device("meta"):
            if type(config) in MODEL_MAPPING:
                model = AutoModel.from_config(config)
            elif type(config) in modeling_auto.MODEL_FOR_BACKBONE_MAPPING:
                model = modeling_auto.AutoBackbone.from_config(config)
            else:
                model = tiny_configs.class_beside_config(config.model_type)(config)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
