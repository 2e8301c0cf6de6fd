"""The processor: pictures and placeholders, padding, templates, saving."""

import re

import numpy as np
import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor

import anyvlm


@pytest.fixture(scope="module")
def model_and_processor():
    return anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )


@pytest.fixture
def processor(model_and_processor):
    return model_and_processor[1]


def conversation(image=None):
    block = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [{"type": "text", "text": "w1 "}, block, {"type": "text", "text": " w2 ?"}]}]


def test_agrees_with_llavas_processor(processor):
    """transformers' own processor for the same tower gives the same ids and pixels."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    native = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts = ["w1 <image> w2", "w3 <image> <image> w4 w5", "w6"]
    pictures = [picture(0), picture(1, (30, 60)), picture(2)]
    for side in ("left", "right"):
        kwargs = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        ours = processor(text=texts, images=pictures, **kwargs)
        theirs = native(text=texts, images=pictures, **kwargs)
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
        assert torch.equal(ours["pixel_values"], torch.as_tensor(np.array(theirs["pixel_values"])))


def test_pads_on_the_left_by_default(processor):
    ids = processor(text=["w1", "w1 w2 w3"], padding=True, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == processor.tokenizer.pad_token_id


def test_pads_on_the_left_when_loaded_after_padding_on_the_right(processor, tmp_path):
    processor(
        text=["w1", "w1 w2 w3"], padding=True, padding_side="right"
    )  # as in training; the tokenizer's file has it
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    ids = loaded(text=["w1", "w1 w2 w3"], padding=True, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == processor.tokenizer.pad_token_id


def test_nested_and_flat_pictures_agree(processor):
    texts = ["w1 <image>", "w2", "<image> w3 <image>"]
    a, b, c = picture(0), picture(1), picture(2)
    flat = processor(text=texts, images=[a, b, c], padding=True, return_tensors="pt")
    for images in ([[a], [], [b, c]], [[a], None, [b, c]], [a, None, [b, c]]):
        nested = processor(text=texts, images=images, padding=True, return_tensors="pt")
        for key in flat:
            assert torch.equal(nested[key], flat[key])


def test_text_alone_has_no_pixels(processor):
    for images in (None, [], [[], []]):
        inputs = processor(text=["w1", "w2"], images=images, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("texts", "num_pictures", "message"),
    [
        (["w1 w2"], 1, "stands 0 times, but 1 pictures"),
        (["w1 <image>"], 2, "stands 1 times, but 2 pictures"),
        (["<image> <image>"], 1, "stands 2 times, but 1 pictures"),
        (["w1 <image>"], 0, "stands 1 times, but 0 pictures"),
    ],
)
def test_wrong_number_of_pictures(processor, texts, num_pictures, message):
    with pytest.raises(ValueError, match=message):
        processor(text=texts, images=[picture(i) for i in range(num_pictures)] or None)


def test_right_total_but_wrong_texts(processor):
    with pytest.raises(ValueError, match="text 0 of the batch.*2 times, but 1 pictures"):
        processor(text=["<image> <image>", "<image>"], images=[[picture(0)], [picture(1), picture(2)]])
    with pytest.raises(ValueError, match="2 texts but 1 lists"):
        processor(text=["<image>", "<image>"], images=[[picture(0), picture(1)]])


def test_pictures_without_text(processor):
    with pytest.raises(ValueError, match="need a text"):
        processor(images=[picture(0)])


def test_model_refuses_placeholders_without_pictures(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=inputs["input_ids"])


def test_model_refuses_more_or_fewer_pictures(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    with pytest.raises(ValueError, match="give 32 image tokens, but the text has 16"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


def test_any_picture_size_gives_the_tokens_the_model_makes(model_and_processor):
    model, processor = model_and_processor
    for size in ((1, 1), (1, 90), (90, 1), (33, 17), (500, 20)):
        inputs = processor(text=["<image>"], images=[picture(0, size)], return_tensors="pt")
        placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
        assert placeholders == len(model.get_image_features(inputs["pixel_values"]).pooler_output[0])
    assert processor._get_num_multimodal_tokens([(33, 17), (1, 1)])["num_image_tokens"] == [16, 16]


class TestChatTemplate:
    def test_default_places_pictures_where_they_stand(self, processor):
        text = processor.apply_chat_template(conversation(), add_generation_prompt=True)
        assert text == "User: w1 <image> w2 ?\nAssistant:"

    def test_pictures_in_the_conversation_are_processed(self, processor):
        image = picture(0)
        inputs = processor.apply_chat_template(
            conversation(image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = processor(text=["User: w1 <image> w2 ?\nAssistant:"], images=[image], return_tensors="pt")
        for key in expected:
            assert torch.equal(inputs[key], expected[key])

    def test_own_template_that_places_pictures_and_videos_is_kept(self):
        template = (
            "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}<image>"
            "{% elif c.type == 'video' %}<video>{% else %}{{ c.text }}{% endif %}{% endfor %};{% endfor %}"
        )
        assert _processor_with(template).chat_template == template

    def test_own_template_that_places_pictures_alone_gets_videos_as_text(self):
        template = (
            "{% for m in messages %}{{ m.role }}:{% for c in m.content %}"
            "{% if c.type == 'image' %}[<image>]{% else %}{{ c.text }}{% endif %}{% endfor %};{% endfor %}"
        )
        processor = _processor_with(template)
        content = [{"type": "image"}, {"type": "text", "text": "w1"}, {"type": "video"}]
        assert processor.apply_chat_template([{"role": "user", "content": content}]) == "user:[<image>]w1<video>;"

    def test_text_only_template_is_extended(self):
        template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        processor = _processor_with(template)
        assert processor.apply_chat_template(conversation()) == "[user]w1 <image> w2 ?</s>"
        assert processor.apply_chat_template([{"role": "user", "content": "w1"}]) == "[user]w1</s>"

    def test_qwen3_template_is_extended(self, trained_models):
        """A real template with tools and thinking, which takes only text."""
        tokenizer = AutoTokenizer.from_pretrained(f"{trained_models}/qwen3-tokenizer")
        config = text_config("qwen3")
        config.vocab_size = 151936
        _, processor = anyvlm.compose(vision=vision_config("dinov2"), text=config, tokenizer=tokenizer)
        text = processor.apply_chat_template(conversation(), add_generation_prompt=True)
        plain = tokenizer.apply_chat_template(
            [{"role": "user", "content": "w1 PICTURE w2 ?"}], tokenize=False, add_generation_prompt=True
        )
        assert text == plain.replace("PICTURE", "<image>")


def _processor_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return anyvlm.compose(vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tokenizer)[1]


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, anyvlm.AnyVlmProcessor)
    assert loaded.chat_template == processor.chat_template
    kwargs = {"text": ["w1 <image>", "w2"], "images": [[picture(0)], []], "padding": True, "return_tensors": "pt"}
    before, after = processor(**kwargs), loaded(**kwargs)
    for key in before:
        assert torch.equal(before[key], after[key])
    assert re.search(r'"AutoProcessor": "anyvlm_checkpoint', (tmp_path / "processor_config.json").read_text())
