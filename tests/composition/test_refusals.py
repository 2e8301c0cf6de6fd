"""compose(): what is refused, and with what reason."""

import pytest
import torch
from tiny_parts import compose, text_config, vision_config
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.utils import is_timm_available

import anyvlm
from anyvlm.compatibility import tiny_configs


class TestRefusals:
    def test_a_folder_without_a_tokenizer(self, tmp_path):
        """transformers makes one of the right class that knows no word; every text would be empty."""
        AutoModelForCausalLM.from_config(text_config("qwen2")).save_pretrained(tmp_path)
        with pytest.raises(anyvlm.CompositionError, match="has no tokenizer"):
            anyvlm.compose(vision=vision_config("dinov2"), text=tmp_path)

    def test_tower_that_is_a_language_model(self):
        with pytest.raises(anyvlm.CompositionError, match="language model.*vision tower such as"):
            compose(vision=text_config("llama"))

    def test_language_model_that_is_a_tower(self):
        with pytest.raises(anyvlm.CompositionError, match="no causal language model"):
            compose(text=vision_config("dinov2"))

    def test_language_model_without_a_head(self):
        with pytest.raises(anyvlm.CompositionError, match="AutoModelForCausalLM"):
            compose(text=AutoModel.from_config(text_config("llama")))

    def test_tower_that_needs_more_than_a_picture(self):
        config = tiny_configs.vision_config("seggpt")
        with pytest.raises(anyvlm.CompositionError, match="needs prompt_pixel_values, prompt_masks"):
            compose(vision=config)

    def test_tower_of_codes(self):
        with pytest.raises(anyvlm.CompositionError, match="no gradient"):
            compose(vision=tiny_configs.vision_config("flava_image_codebook"), image_size=32)

    def test_tower_that_takes_a_batch_for_a_clip(self):
        config = tiny_configs.vision_config("xclip_vision_model")
        with pytest.raises(anyvlm.CompositionError, match="takes the batch for one clip"):
            compose(vision=config, image_size=tiny_configs.picture_size("xclip_vision_model"))

    def test_head_for_a_task(self):
        with pytest.raises(anyvlm.CompositionError, match="head for a task"):
            compose(vision=tiny_configs.vision_config("mgp-str"), image_size=tiny_configs.picture_size("mgp-str"))

    def test_library_that_is_not_installed(self):
        if is_timm_available():
            pytest.skip("timm is installed here")
        with pytest.raises(anyvlm.CompositionError, match="needs a library that is not installed.*timm"):
            compose(vision=CONFIG_MAPPING["timm_wrapper"](architecture="resnet18"))

    def test_weights_that_are_missing_in_a_part(self, saved_parts, tmp_path):
        from safetensors.torch import load_file, save_file

        tower = AutoModel.from_pretrained(saved_parts / "tower")
        tower.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["encoder.layer.1.norm1.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(anyvlm.CompositionError, match="encoder.layer.1.norm1.weight"):
            compose(vision=tmp_path, image_size=32)

    def test_no_tokenizer(self):
        with pytest.raises(anyvlm.CompositionError, match="tokenizer="):
            anyvlm.compose(vision=vision_config("dinov2"), text=text_config("llama"))

    def test_unknown_fusion(self):
        with pytest.raises(anyvlm.CompositionError, match="embed"):
            compose(fusion="telepathy")

    @pytest.mark.parametrize("part", ["vision", "text"])
    def test_something_that_is_no_part(self, part):
        with pytest.raises(TypeError, match="Hub id"):
            compose(**{part: 42})

    def test_weights_that_are_not_finite(self):
        language_model = AutoModelForCausalLM.from_config(text_config("llama"))
        with torch.no_grad():
            language_model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(anyvlm.CompositionError, match="finite"):
            compose(text=language_model)

    def test_audio(self):
        with pytest.raises(anyvlm.CompositionError, match="not supported yet"):
            compose(audio=CONFIG_MAPPING["whisper"]())
