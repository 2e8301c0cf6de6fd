"""Towers taken out of saved models of several parts: with every weight as it was, whatever the whole calls them."""

import pytest
import torch
from tiny_parts import text_config, tiny_tokenizer
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModel, AutoModelForImageTextToText

import anyvlm
from anyvlm.compatibility import tiny_configs


#: Composite -> types of its tiny parts; `None`: the tiny composite of the table of compatibility.
COMPOSITES = {
    "clip": None,
    "siglip2": None,
    "owlvit": None,
    "altclip": None,
    "llava": ("clip_vision_model", "llama"),
    "idefics3": ("idefics3_vision", "llama"),
    "internvl": ("internvl_vision", "qwen2"),
    "gemma3": ("siglip_vision_model", "gemma3_text"),
}


@pytest.mark.parametrize("composite", COMPOSITES)
def test_weights_are_kept(composite, tmp_path):
    parts = COMPOSITES[composite]
    if parts is None:
        config = tiny_configs.vision_config(composite)
    else:
        config = CONFIG_MAPPING[composite](
            vision_config=tiny_configs.vision_config(parts[0]).to_dict(),
            text_config=tiny_configs.text_config(parts[1]).to_dict(),
        )
    image_text = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    whole = (AutoModelForImageTextToText if image_text else AutoModel).from_config(config)
    whole.save_pretrained(tmp_path)
    size = tiny_configs.picture_size(composite if parts is None else parts[0])
    model, _ = anyvlm.compose(tmp_path, text_config("llama"), tokenizer=tiny_tokenizer(), image_size=size)
    weights = whole.state_dict()
    for name, weight in model.vision_tower.state_dict().items():
        ending = ".".join(name.split(".")[-2:])  # what stands before it differs between the whole and the part
        assert any(torch.equal(weight, weights[key]) for key in weights if key.endswith(ending)), name
