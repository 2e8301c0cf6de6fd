"""Idefics2: imported, run beside the native class, exported."""

import random

import pytest
import torch

import anyvlm
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.native.equality import logits_of, sample_picture


CASES = native_cases("idefics2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


@pytest.fixture(scope="module", params=CASES, ids=str)
def processors(request):
    native, native_processor = build_native(request.param, 0, tied=False)
    model, processor = anyvlm.from_native(native, native_processor)
    return request.param, native_processor, model, processor


@pytest.mark.parametrize(
    "text", ["<image><image>w1<image>", "w1<image><image>\n<image>w2", "<image> w1 <image>w2 <image>.", "<image>" * 3]
)
def test_text_around_pictures_is_the_native_one(processors, text):
    _, native, _, processor = processors
    pictures = [sample_picture(30 + seed, 40, seed) for seed in range(3)]
    expected, found = (each(images=[pictures], text=[text], return_tensors="pt") for each in (native, processor))
    assert torch.equal(expected["input_ids"], found["input_ids"])


def test_pictures_of_any_size_are_the_native_ones(processors):
    case, native, _, processor = processors
    sizes = random.Random(0)
    for _ in range(25):
        pictures = [sample_picture(sizes.randint(2, 150), sizes.randint(2, 150)) for _ in range(2)]
        expected, found = (
            each(images=[pictures], text=["<image> <image>"], return_tensors="pt") for each in (native, processor)
        )
        assert torch.equal(case.pixel_values(expected), found["pixel_values"])
        assert torch.equal(
            case.pixel_values({**expected, "pixel_values": expected["pixel_attention_mask"]}),
            found["pixel_attention_mask"],
        )


def test_pictures_padded_together_are_those_alone(processors):
    _, _, model, processor = processors
    pictures = [sample_picture(30, 140, 0), sample_picture(90, 25, 1)]
    texts = ["<image> w1", "<image> w1"]
    together = processor(images=pictures, text=texts, return_tensors="pt")
    alone = torch.cat([logits_of(model, processor(images=p, text=texts[0], return_tensors="pt")) for p in pictures])
    torch.testing.assert_close(logits_of(model, together), alone, rtol=0, atol=1e-5)


def test_saved_and_loaded(processors, tmp_path):
    _, _, model, processor = processors
    model.save_pretrained(tmp_path)
    loaded = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    inputs = processor(images=sample_picture(50, 90), text="<image> w1", return_tensors="pt")
    assert torch.equal(logits_of(model, inputs), logits_of(loaded, inputs))
