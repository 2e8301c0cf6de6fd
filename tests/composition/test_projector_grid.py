"""Every projector composed with towers of all makes, or refused with the reason and what works."""

import pytest
import torch
from model_tester import ComposedModelTester, picture
from tiny_parts import compose, text_config, tiny_tokenizer
from transformers import Qwen2VLImageProcessorPil, Siglip2ImageProcessorPil

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.modeling.projectors import PROJECTORS


#: Projectors with weights.
LEARNT = [name for name in PROJECTORS if name != "identity"]


GRID_PROJECTORS = ["pixel_shuffle", "patch_merger", "avg_pool", "conv"]


#: Towers of one picture size with that size, and towers that take pictures of their own sizes with their image processor.
TOWERS = {
    "clip_vision_model": {"image_size": 32},
    "resnet": {"image_size": 64},
    "qwen2_vl_vision": {"image_processor": Qwen2VLImageProcessorPil(patch_size=8)},
    "siglip2_vision_model": {"image_processor": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)},
}


@pytest.mark.parametrize("projector", LEARNT)
@pytest.mark.parametrize("vision", TOWERS)
def test_tokens_and_placeholders_agree(vision, projector):
    arguments = {"pad": True} if projector in ("pixel_shuffle", "patch_merger") else {}
    if projector == "qformer":  # without this it has its full size
        arguments = {"qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}}
    model, processor = anyvlm.compose(
        vision=tiny_configs.vision_config(vision),
        text=text_config("llama"),
        tokenizer=tiny_tokenizer(),
        projector={"type": projector, **arguments},
        **TOWERS[vision],
    )
    pictures = [picture(0, (70, 90)), picture(1, (200, 64))]
    inputs = processor(text=["w1 <image> w2 <image>"], images=pictures, return_tensors="pt")
    with torch.no_grad():
        model(**inputs)  # refused if the counts disagree
        features = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        tokens = model.get_image_features(**features).pooler_output
    sizes = [sample.size[::-1] for sample in pictures]
    assert [len(sample) for sample in tokens] == processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]


@pytest.mark.parametrize("projector", GRID_PROJECTORS)
def test_composed_model_passes_the_checks(projector, tmp_path):
    tester = ComposedModelTester(projector=projector)
    tester.check_picture_order_matters()
    tester.check_loss_is_the_language_models_own()
    inputs = tester.inputs(["w1 <image> w2", "<image> w3 w4 w5"], [picture(0), picture(1)])
    tester.model.save_pretrained(tmp_path)
    reloaded = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(tester.model(**inputs).logits, reloaded(**inputs).logits)


class TestIdentity:
    def test_tokens_are_the_towers_features(self, tmp_path):
        tower = tiny_configs.vision_config("qwen2_vl_vision")
        tower.hidden_size = 32
        model, processor = anyvlm.compose(
            vision=tower,
            text=text_config("llama"),
            tokenizer=tiny_tokenizer(),
            projector="identity",
            **TOWERS["qwen2_vl_vision"],
        )
        inputs = processor(text=["w1 <image>"], images=[picture(0, (70, 90))], return_tensors="pt")
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        assert torch.equal(torch.cat(features.pooler_output), features.last_hidden_state.flatten(0, -2))
        model.save_pretrained(tmp_path)
        reloaded = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, reloaded(**inputs).logits)

    def test_other_widths_are_refused(self):
        with pytest.raises(anyvlm.CompositionError, match='40 wide.*32.*projector="mlp"'):
            compose("resnet", projector="identity", image_size=64)


class TestRefusals:
    def test_odd_grid_names_what_works(self):
        with pytest.raises(anyvlm.CompositionError, match=r"3x3 features.*scale_factor to 3.*pad=True.*image_size"):
            compose("siglip_vision_model", projector="pixel_shuffle", image_size=24)

    def test_odd_grid_with_padding_works(self):
        _, processor = compose("siglip_vision_model", projector={"type": "pixel_shuffle", "pad": True}, image_size=24)
        inputs = processor(text=["<image>"], images=[picture(0, (24, 24))], return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 4

    def test_pictures_of_their_own_sizes_need_padding(self):
        with pytest.raises(anyvlm.CompositionError, match=r"pad=True.*own sizes"):
            anyvlm.compose(
                vision=tiny_configs.vision_config("qwen2_vl_vision"),
                text=text_config("llama"),
                tokenizer=tiny_tokenizer(),
                image_processor=TOWERS["qwen2_vl_vision"]["image_processor"],
                projector="pixel_shuffle",
            )

    @pytest.mark.parametrize("projector", GRID_PROJECTORS)
    def test_features_without_places(self, projector):
        with pytest.raises(anyvlm.CompositionError, match=r"17 features.*not in rows and columns.*linear, mlp"):
            compose(projector=projector, vision_feature_select_strategy="full")
