"""Towers that take patches, with their own image processor: pictures of their own size, and tokens to match.

The oracle is the bare tower, called with what transformers' image processor makes.
"""

import inspect

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    Idefics2ImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    ViTImageProcessorPil,
)

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.modeling.vision_towers import build_vision_tower


PICTURES = [picture(0, (70, 90)), picture(1, (200, 64))]

#: Tower -> its image processor, what it makes beside `pixel_values` -> the tower's argument.
TOWERS = {
    "qwen2_vl_vision": (Qwen2VLImageProcessorPil(patch_size=8), {"image_grid_thw": "grid_thw"}),
    "qwen2_5_vl_vision": (Qwen2VLImageProcessorPil(patch_size=8), {"image_grid_thw": "grid_thw"}),
    "qwen3_vl_vision": (Qwen2VLImageProcessorPil(patch_size=8), {"image_grid_thw": "grid_thw"}),
    "siglip2_vision_model": (
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24),
        {"spatial_shapes": "spatial_shapes", "pixel_attention_mask": "pixel_attention_mask"},
    ),
    "minicpmv4_6_vision": (
        MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=64, slice_mode=False),
        {"target_sizes": "target_sizes"},
    ),
    "pixtral": (PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 64}), {"image_sizes": "image_sizes"}),
}


def compose(vision, **kwargs):
    return anyvlm.compose(vision=vision, text=text_config("llama"), tokenizer=tiny_tokenizer(), **kwargs)


def encode(processor, texts=("w1 <image> w2 <image>",), images=PICTURES, **kwargs):
    return processor(text=list(texts), images=images, return_tensors="pt", padding=True, **kwargs)


def image_inputs(inputs) -> dict:
    return {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("tower_type", TOWERS)
def test_features_are_the_towers_own(tower_type):
    image_processor, arguments = TOWERS[tower_type]
    torch.manual_seed(0)
    tower = build_vision_tower(tiny_configs.vision_config(tower_type)).eval()
    model, processor = compose(tower, image_processor=image_processor)
    inputs = encode(processor)
    features = model.get_image_features(**image_inputs(inputs))

    outputs = image_processor(PICTURES, return_tensors="pt")
    pixels = next(name for name in ("hidden_states", "pixel_values") if name in _parameters(tower))
    with torch.no_grad():
        expected = tower(
            **{pixels: outputs["pixel_values"]}, **{name: outputs[key] for key, name in arguments.items()}
        )
    merged = expected.pooler_output
    tokens = merged if merged is not None and merged.ndim == 2 and len(merged) > 2 else expected.last_hidden_state
    if "pixel_attention_mask" in arguments:
        tokens = tokens[outputs["pixel_attention_mask"].bool()]
    assert torch.equal(features.last_hidden_state, tokens.reshape(-1, tokens.shape[-1]))
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == sum(map(len, features.pooler_output))
    shapes = outputs[next(iter(arguments))].tolist()
    assert shapes[0] != shapes[1], "the pictures keep their proportions"
    sizes = [(image.height, image.width) for image in PICTURES]
    assert processor._get_num_multimodal_tokens(sizes).num_image_tokens == list(map(len, features.pooler_output))


def _parameters(tower):
    return inspect.signature(tower.forward).parameters


@pytest.mark.parametrize("tower_type", TOWERS)
def test_checkpoint_keeps_the_pictures_sizes(tower_type, tmp_path):
    """After loading: equal logits in a padded batch of pictures of several sizes, each as alone, and beams."""
    model, processor = compose(tiny_configs.vision_config(tower_type), image_processor=TOWERS[tower_type][0])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    texts, images = ["w1 <image> w2", "w3 w4 w5 <image> w6"], [[PICTURES[0]], [PICTURES[1]]]
    batch = encode(loaded_processor, texts, images)
    with torch.no_grad():
        expected = model(**encode(processor, texts, images)).logits
        found = loaded(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for row in range(2):
            alone = model(**encode(processor, [texts[row]], [images[row]])).logits[0]
            torch.testing.assert_close(found[row][batch["attention_mask"][row].bool()], alone, rtol=1e-4, atol=1e-5)
    beams = loaded.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
    for row in range(2):
        alone = encode(processor, [texts[row]], [images[row]])
        expected = model.generate(**alone, max_new_tokens=4, num_beams=2, do_sample=False)[0]
        assert torch.equal(beams[row][-4:], expected[-4:])


def test_tower_of_a_native_model():
    """The tower of a Qwen2.5-VL is taken out of it, and its pictures become what its own language model would get."""
    config = Qwen2_5_VLForConditionalGeneration.config_class(
        vision_config=tiny_configs.vision_config("qwen2_5_vl_vision").to_dict(),
        text_config={
            **text_config("qwen2").to_dict(),
            "model_type": "qwen2_5_vl_text",
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
    )
    torch.manual_seed(0)
    native = Qwen2_5_VLForConditionalGeneration(config).eval()
    image_processor = Qwen2VLImageProcessorPil(patch_size=8)
    model, processor = compose(native, image_processor=image_processor)
    outputs = image_processor(PICTURES, return_tensors="pt")
    with torch.no_grad():
        expected = native.model.get_image_features(outputs["pixel_values"], outputs["image_grid_thw"]).pooler_output
        found = model.get_image_features(**image_inputs(encode(processor))).last_hidden_state
    assert torch.equal(found, torch.cat(list(expected)))


class TestDefaults:
    def test_the_family_has_an_image_processor(self):
        _, processor = compose(tiny_configs.vision_config("qwen2_5_vl_vision"))
        assert isinstance(processor.image_processor, Qwen2VLImageProcessorPil)
        assert processor.image_processor.patch_size == 8

    def test_pictures_are_no_larger_than_the_tower_takes(self):
        _, processor = compose(tiny_configs.vision_config("pixtral"))
        assert isinstance(processor.image_processor, PixtralImageProcessorPil)
        assert dict(processor.image_processor.size) == {"longest_edge": 32}

    def test_image_size_gives_every_picture_one_size(self):
        model, processor = compose(tiny_configs.vision_config("qwen2_5_vl_vision"), image_size=64)
        assert isinstance(processor.image_processor, ViTImageProcessorPil)
        tokens = model.get_image_features(**image_inputs(encode(processor))).pooler_output
        assert [len(picture_tokens) for picture_tokens in tokens] == [16, 16]

    def test_size_that_cannot_be_cut(self):
        with pytest.raises(anyvlm.CompositionError, match=r"multiple of 16 pixels.*image_size=\(48, 48\)"):
            compose(tiny_configs.vision_config("qwen2_5_vl_vision"), image_size=50)

    def test_a_processor_that_does_not_fit_is_not_used(self, caplog):
        """The family's patches need more positions than this tower has."""
        _, processor = compose(tiny_configs.vision_config("gemma4_vision"))
        assert isinstance(processor.image_processor, ViTImageProcessorPil)
        assert "Gemma4VisionModel does not take what" in caplog.text


@pytest.mark.parametrize("tower_type", TOWERS)
def test_check_counts_the_tokens_that_the_image_processor_gives(tower_type):
    """An image processor may enlarge a picture to fill its patches, so the tower alone does not know."""
    parts = tiny_configs.vision_config(tower_type), text_config("llama")
    report = anyvlm.check(*parts, tokenizer=tiny_tokenizer(), image_processor=TOWERS[tower_type][0])
    model, processor = compose(parts[0], image_processor=TOWERS[tower_type][0])
    inputs = encode(processor, ["<image>"], [picture(2, report.image_size)])
    assert report.tokens_per_picture == int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert report.one_size is False and "keep their own sizes" in str(report)
    assert anyvlm.check(*parts, tokenizer=tiny_tokenizer(), image_size=48).one_size is True


def test_few_patches_are_no_reason_to_warn(caplog):
    """784 tokens of 224x224 pixels would not fit the language model, but 24 at most are made."""
    compose(tiny_configs.vision_config("siglip2_vision_model"), image_processor=TOWERS["siglip2_vision_model"][0])
    assert "positions that the language model" not in caplog.text


def test_plain_pictures_of_another_size_that_can_be_cut():
    """Such towers take any multiple of their patches, without an own processor too."""
    model, _ = compose(tiny_configs.vision_config("siglip2_vision_model"), image_size=32)
    features = model.get_image_features(torch.zeros(2, 3, 16, 64))
    assert features.last_hidden_state.shape[:2] == (2, 16)


def test_padded_pictures_give_the_towers_own_features():
    """Idefics2's processor makes a list for each text, of which one is left, and a mask of pixels."""
    image_processor = Idefics2ImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 60})
    tower = build_vision_tower(tiny_configs.vision_config("idefics2_vision")).eval()
    model, processor = compose(tower, image_processor=image_processor)
    inputs = encode(processor)
    assert inputs["pixel_attention_mask"].shape == (len(PICTURES), *inputs["pixel_values"].shape[-2:])
    features = model.get_image_features(**image_inputs(inputs)).last_hidden_state

    native = image_processor([PICTURES], return_tensors="pt")
    size = tower.config.patch_size
    mask = native["pixel_attention_mask"][0].unfold(1, size, size).unfold(2, size, size).sum((-1, -2)) == size * size
    with torch.no_grad():
        expected = tower(native["pixel_values"][0], patch_attention_mask=mask).last_hidden_state[mask.flatten(1)]
    assert torch.equal(features, expected)
    assert inputs["input_ids"].eq(model.config.image_token_id).sum() == len(expected)
    with pytest.raises(ValueError, match="padded further"):
        model.get_image_features(
            torch.nn.functional.pad(inputs["pixel_values"], (0, 40)),
            pixel_attention_mask=torch.nn.functional.pad(inputs["pixel_attention_mask"], (0, 40)),
        )
