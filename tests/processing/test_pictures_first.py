"""Image tokens before everything else, as BLIP-2's processor places them."""

import pytest
import torch
from tiny_parts import compose
from transformers import Blip2Processor, BlipImageProcessorPil

from anyvlm.compatibility.model_under_test import picture
from anyvlm.processing.processing_anyvlm import AnyVlmProcessor
from anyvlm.training.collator import AnyVlmDataCollator


TEXTS = ["w1 w2 w3", "w4"]


@pytest.fixture(scope="module")
def composed():
    model, processor = compose(
        projector={"type": "resampler", "num_queries": 3}, image_processor=BlipImageProcessorPil(size=(32, 32))
    )
    settings = {"vision_tower_spec": processor.vision_tower_spec, "projector_config": processor.projector_config}
    first = AnyVlmProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        pictures_first=True,
        **settings,
    )
    return model, first


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_inputs_are_those_of_blip_2(composed, padding_side):
    _, processor = composed
    native = Blip2Processor(processor.image_processor, processor.tokenizer, num_query_tokens=3)
    settings = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
    pictures = [picture(0), picture(1)]
    expected, found = (each(images=pictures, text=TEXTS, **settings) for each in (native, processor))
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(expected[key], found[key]), key


def test_placeholders_may_be_left_out(composed):
    model, processor = composed
    without = processor(text=TEXTS[0], images=picture(0), return_tensors="pt")
    in_front = processor(text="<image>" + TEXTS[0], images=picture(0), return_tensors="pt")
    behind = processor(text=TEXTS[0] + "<image>", images=picture(0), return_tensors="pt")
    nested = processor(text=[TEXTS[0]], images=[[picture(0)]], return_tensors="pt")
    assert torch.equal(without["input_ids"], in_front["input_ids"])
    assert torch.equal(without["input_ids"], behind["input_ids"])
    assert torch.equal(without["input_ids"], nested["input_ids"])
    assert without["input_ids"][0, :3].eq(model.config.image_token_id).all()
    lists = processor(text=TEXTS[0], images=picture(0))
    assert lists["input_ids"] == without["input_ids"].tolist()
    assert processor(text=TEXTS[0], return_tensors="pt")["input_ids"].tolist()[0] == lists["input_ids"][0][3:]


def test_a_padded_batch_is_its_samples_one_by_one(composed):
    model, processor = composed
    batch = processor(text=TEXTS, images=[picture(0), picture(1)], padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row in range(2):
            alone = processor(text=TEXTS[row], images=picture(row), return_tensors="pt")
            torch.testing.assert_close(together[row], model(**alone).logits[0, -1], rtol=0, atol=1e-5)


def test_labels_stay_with_the_answer(composed):
    _, processor = composed
    samples = [
        {
            "messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": answer}],
            "images": [picture(0)],
        }
        for answer in ("w3", "w4 w5 w6")
    ]
    batch = AnyVlmDataCollator(processor)(samples)
    for row, answer in enumerate(("w3", "w4 w5 w6")):
        supervised = batch["labels"][row][batch["labels"][row] != -100]
        assert answer in processor.tokenizer.decode(supervised)
        assert "w1" not in processor.tokenizer.decode(supervised)


def test_texts_of_a_batch_have_as_many_pictures(composed):
    _, processor = composed
    with pytest.raises(ValueError, match="same number of pictures"):
        processor(text=["<image>w1", "<image><image>w1"], images=[picture(0)] * 3, padding=True, return_tensors="pt")
