"""MiniCPM-V 4.6: imported, run beside the native class, exported."""

import random

import pytest
import torch
import transformers

import anyvlm
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.native.equality import logits_of, sample_picture
from anyvlm.composition.native.families import family_of
from anyvlm.configuration.image_views import num_image_tokens


CASES = native_cases("minicpmv")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


@pytest.fixture(scope="module", params=CASES, ids=str)
def models(request):
    native, native_processor = build_native(request.param, 0, tied=False)
    return native_processor, *anyvlm.from_native(native, native_processor)


def test_pictures_of_any_size_are_the_native_ones(models):
    native, model, processor = models
    sizes, token = random.Random(0), processor.image_token
    for _ in range(25):
        pictures = [sample_picture(sizes.randint(1, 300), sizes.randint(1, 300)) for _ in range(2)]
        expected, found = (
            each(images=pictures, text=f"{token}{token} w1", return_tensors="pt") for each in (native, processor)
        )
        assert all(torch.equal(expected[key], found[key]) for key in ("input_ids", "pixel_values", "target_sizes"))
        counted = sum(num_image_tokens(model.config, picture.height, picture.width) for picture in pictures)
        assert (found["input_ids"] == model.config.image_token_id).sum() == counted


def test_saved_and_loaded(models, tmp_path):
    _, model, processor = models
    model.save_pretrained(tmp_path)
    loaded = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    inputs = processor(images=sample_picture(150, 90), text=f"{processor.image_token} w1", return_tensors="pt")
    assert torch.equal(logits_of(model, inputs), logits_of(loaded, inputs))


def test_the_native_processors_settings_come_back(models, monkeypatch):
    """Without torchvision, which its video processor needs, the processor itself cannot be made."""
    native, model, processor = models
    monkeypatch.setattr(transformers, "MiniCPMV4_6VideoProcessor", dict, raising=False)
    family = family_of(CASES[0].config(False))
    arguments = family.write_processor(processor, family.write_config(model.config), model.config)
    found, expected = arguments["image_processor"].to_dict(), native.image_processor.to_dict()
    if not expected["slice_mode"]:  # then it says nothing
        del expected["max_slice_nums"], found["max_slice_nums"]
    assert found == expected


def test_more_merging_is_refused():
    native, native_processor = build_native(CASES[0], 0, tied=False)
    native.config.merger_times = 2
    with pytest.raises(anyvlm.CompositionError, match="2 times"):
        anyvlm.from_native(native, native_processor)
