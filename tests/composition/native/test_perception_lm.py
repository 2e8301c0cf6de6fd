"""Perception LM: imported, run beside the native class, exported."""

import pytest
import torch
import transformers

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_cases.perception_lm import (
    ImagesOnlyPerceptionLMProcessor,
    PerceptionLMImageProcessorPil,
)
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.errors import CompositionError
from anyvlm.composition.native import family_of, from_native, to_native
from anyvlm.composition.native.equality import sample_picture


CASES = native_cases("perception_lm")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_processor_comes_back(case, monkeypatch):
    """Made again with Pillow's version of its image processor, which transformers offers beside torchvision only."""
    monkeypatch.setattr(transformers, "PerceptionLMImageProcessor", PerceptionLMImageProcessorPil, raising=False)
    monkeypatch.setattr(transformers, "PerceptionLMVideoProcessor", lambda **settings: None, raising=False)
    native, native_processor = build_native(case, seed=0, tied=False)
    model, processor = from_native(native, native_processor)
    arguments = family_of(native.config).write_processor(processor, native.config, model.config)
    again = ImagesOnlyPerceptionLMProcessor(tokenizer=processor.tokenizer, **arguments)
    inputs = {"text": ["w1 <image> <image>"], "images": [sample_picture(60, 40), sample_picture(30, 33)]}
    expected, found = native_processor(**inputs, return_tensors="pt"), again(**inputs, return_tensors="pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_tower_whose_first_token_is_a_patch_is_refused():
    native, processor = build_native(CASES[1], seed=0, tied=False)
    native.config.vision_use_cls_token = True
    with pytest.raises(CompositionError, match="vision_use_cls_token=True drops 1 tokens"):
        from_native(native, processor)


def test_a_tower_that_does_not_state_its_width_is_not_exported():
    model, _ = from_native(*build_native(CASES[0], seed=0, tied=False))
    del model.vision_tower.config.model_args
    with pytest.raises(CompositionError, match=r"model_args\['embed_dim'\]"):
        to_native(model, None)
