"""views="native" for towers of whole pictures: each picture in its own size, those of one size in one run.

The oracle is the bare tower, given each picture alone.
"""

import pytest
import torch
from model_tester import picture
from tiny_parts import compose
from transformers import AutoModelForCausalLM, AutoProcessor

from anyvlm.configuration.image_views import num_image_tokens


#: Tower -> arguments with which it takes any size, and the slice of its tokens that are places.
TOWERS = {
    "clip_vision_model": ({"interpolate_pos_encoding": True}, slice(1, None)),
    "siglip_vision_model": ({"interpolate_pos_encoding": True}, slice(None)),
    "dinov2": ({}, slice(1, None)),
    "yolos": ({}, slice(1, -10)),
    "dinov3_vit": ({}, slice(3, None)),
    "resnet": ({}, slice(None)),
}
SIZES = [(70, 90), (300, 40), (70, 90), (20, 64)]


def encode(processor, texts, images):
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def image_inputs(inputs):
    return {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("tower_type", TOWERS)
def test_features_are_those_of_each_picture_alone(tower_type):
    model, processor = compose(tower_type, views={"type": "native", "max_tokens": 30})
    inputs = encode(processor, ["<image>"] * len(SIZES), [[picture(i, size)] for i, size in enumerate(SIZES)])
    found = model.get_image_features(**image_inputs(inputs))
    counts = [len(tokens) for tokens in found.pooler_output]
    assert counts == [num_image_tokens(model.config, *size) for size in SIZES]
    assert counts == (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() and len(set(counts)) > 1
    arguments, places = TOWERS[tower_type]
    features = found.last_hidden_state.split(counts)
    for values, (height, width), own in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), features):
        with torch.no_grad():
            expected = model.vision_tower(values[None, :, :height, :width], **arguments).last_hidden_state
        expected = expected[0].flatten(1).T if expected.ndim == 4 else expected[0][places]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-2, [-2, -1]])
def test_features_of_other_layers(layer):
    model, processor = compose(
        "clip_vision_model", views={"type": "native", "max_tokens": 30}, vision_feature_layer=layer
    )
    inputs = encode(processor, ["<image>"] * 2, [[picture(0, SIZES[0])], [picture(1, SIZES[1])]])
    together = model.get_image_features(**image_inputs(inputs)).pooler_output
    for index in (0, 1):
        alone = encode(processor, ["<image>"], [[picture(index, SIZES[index])]])
        found = model.get_image_features(**image_inputs(alone)).pooler_output[0]
        torch.testing.assert_close(together[index], found, rtol=1e-5, atol=1e-5)


def test_pictures_of_the_towers_own_size_give_what_they_gave():
    native, processor = compose("clip_vision_model", views={"type": "native", "max_tokens": 16})
    fixed, _ = compose("clip_vision_model")
    fixed.load_state_dict(native.state_dict())
    inputs = image_inputs(encode(processor, ["<image>"], [picture(0, (32, 32))]))
    expected = fixed.get_image_features(inputs["pixel_values"])
    found = native.get_image_features(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    plain = native.get_image_features(inputs["pixel_values"])
    assert torch.equal(plain.last_hidden_state, found.last_hidden_state)


def test_checkpoint_and_generation(tmp_path):
    model, processor = compose("clip_vision_model", views={"type": "native", "max_tokens": 20})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    texts, images = ["w1 <image>", "w2 <image> w3"], [[picture(0, SIZES[0])], [picture(1, SIZES[1])]]
    inputs = encode(loaded_processor, texts, images)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**encode(processor, texts, images)).logits)
    beams = loaded.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    for row in range(2):
        alone = encode(processor, [texts[row]], [images[row]])
        assert torch.equal(
            beams[row][-4:], model.generate(**alone, max_new_tokens=4, num_beams=2, do_sample=False)[0, -4:]
        )


def test_gradients_reach_the_tower():
    model, processor = compose("clip_vision_model", views={"type": "native", "max_tokens": 20})
    inputs = encode(processor, ["w1 <image> w2"] * 2, [[picture(0, SIZES[0])], [picture(1, SIZES[1])]])
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.vision_tower.embeddings.position_embedding.weight.grad.abs().sum() > 0
