"""LLaVA-NeXT and LLaVA-OneVision: imported, run beside the native class, exported."""

import pytest
import torch
import transformers
from tiny_parts import compose

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_cases.llava_next import ImagesOnlyLlavaOnevisionProcessor
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.errors import CompositionError
from anyvlm.composition.native import family_of, from_native, to_native
from anyvlm.composition.native.equality import sample_picture


CASES = {case.name: case for case in native_cases("llava_next")}
PICTURES = [sample_picture(50, 170), sample_picture(90, 30)]


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


def test_a_composed_model_becomes_llava_next():
    model, processor = compose(views="tiles")
    native, native_processor = to_native(model, processor)
    assert type(native) is transformers.LlavaNextForConditionalGeneration
    arguments = {"text": ["w1 <image> w2", "<image> w3"], "images": PICTURES, "padding": True, "return_tensors": "pt"}
    ours, theirs = processor(**arguments), native_processor(**arguments)
    with torch.no_grad():
        torch.testing.assert_close(model(**ours).logits, native(**theirs).logits, atol=1e-5, rtol=1e-5)


def test_the_processor_comes_back(monkeypatch):
    """OneVision's only where transformers has a video processor for it, which needs torchvision."""
    monkeypatch.setattr(transformers, "LlavaOnevisionVideoProcessor", lambda **settings: None, raising=False)
    for case in CASES.values():
        native, native_processor = build_native(case, seed=0, tied=False)
        family = family_of(native.config)
        model, processor = from_native(native, native_processor)
        arguments = {
            "image_processor": processor.image_processor,
            "tokenizer": processor.tokenizer,
            **family.write_processor(processor, native.config, model.config),
        }
        processor_class = (
            ImagesOnlyLlavaOnevisionProcessor if family.missing_packages() else transformers.LlavaNextProcessor
        )
        again = processor_class(**arguments)
        for images in ([PICTURES], [[picture] for picture in PICTURES]):
            texts = ["w1 " + "<image> " * len(pictures) for pictures in images]
            inputs = {"text": texts, "images": images, "padding": True, "padding_side": "left", "return_tensors": "pt"}
            expected, found = native_processor(**inputs), again(**inputs)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_other_pinpoints_in_the_processor_are_refused():
    native, processor = build_native(CASES["llava_next, clip tower"], seed=0, tied=False)
    processor.image_processor.image_grid_pinpoints = [[64, 64]]
    with pytest.raises(CompositionError, match="must cut pictures by the model's image_grid_pinpoints"):
        from_native(native, processor)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"type": "tiles", "layout": "dynamic", "max_tiles": 3}, "it merges tiles of layout 'anyres'"),
        ({"type": "tiles", "join": "concat"}, "it merges tiles of layout 'anyres'"),
        (
            {"type": "tiles", "max_merged_tiles": 3},
            "LlavaNextForConditionalGeneration: its map of tiles is not scaled down",
        ),
        ({"type": "tiles", "several": "whole"}, "LlavaNextForConditionalGeneration: it cuts every picture"),
    ],
)
def test_other_views_are_not_exported(views, message):
    with pytest.raises(CompositionError, match=message):
        to_native(*compose(views=views))
