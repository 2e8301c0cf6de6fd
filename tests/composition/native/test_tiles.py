"""Families that cut pictures into tiles: pictures of all sizes, and models that were composed."""

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from native_image_texts import AYA_TEXT, IDEFICS3_TEXT
from transformers import (
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import anyvlm
from anyvlm.compatibility.native_cases import case_tokenizer, chat_template, native_cases
from anyvlm.compatibility.native_cases.cohere_vision import AYA_TOKENS, Cohere2VisionImageProcessorPil
from anyvlm.compatibility.native_cases.idefics3 import TOKENS as IDEFICS3_TOKENS
from anyvlm.compatibility.native_cases.llava import TEXT, VISION
from anyvlm.compatibility.native_checks import build_native
from anyvlm.composition.native import from_native, to_native
from anyvlm.composition.native.equality import sample_picture
from anyvlm.composition.native.projector_arguments import FREE, same_projector


CASES = [case for module in ("internvl", "cohere_vision", "idefics3") for case in native_cases(module)]

SIZES = [(1, 1), (1, 50), (50, 1), (31, 33), (64, 32), (300, 33), (20, 400), (120, 160), (7, 9), (97, 65)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_processors_cut_pictures_of_any_size_alike(case):
    native, native_processor = build_native(case, 0, True)
    _, processor = from_native(native, native_processor)
    text = native_processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}], tokenize=False
    )
    counts = processor._get_num_multimodal_tokens(SIZES)["num_image_tokens"]
    for seed, (size, count) in enumerate(zip(SIZES, counts)):
        picture = sample_picture(*size, seed=seed)
        expected = native_processor(text=[text], images=[[picture]], return_tensors="pt")
        found = processor(text=[text], images=[[picture]], return_tensors="pt")
        assert torch.equal(expected["input_ids"], found["input_ids"]), size
        assert torch.equal(case.pixel_values(expected), found["pixel_values"]), size
        assert int((found["input_ids"] == processor.image_token_id).sum()) == count, size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_native_config_comes_back(case):
    """With the scale of logits that Cohere's language model has and these classes do not read."""
    native, native_processor = build_native(case, 0, False)
    before = _settings(native.config.to_dict())
    after = _settings(to_native(from_native(native, native_processor)[0], None)[0].config.to_dict())
    assert {name: after.get(name) for name in before} == before


def _settings(config: dict, prefix: str = "") -> dict:
    """Flat; without the dtype, which random models do not state, the number of tokens, which InternVL's do not need, and
    whether the text config ties embeddings, as the whole config decides that."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _settings(value, f"{prefix}{name}.")
        elif name not in ("dtype", "image_seq_length") and prefix + str(name) != "text_config.tie_word_embeddings":
            flat[prefix + str(name)] = value
    return flat


def composed(vision, text, tokenizer, image_text=None, image_token="<image>", **settings):
    """A composed model whose processor writes around pictures what a native one does."""
    model, processor = anyvlm.compose(
        vision=vision, text=text, tokenizer=tokenizer, image_token=image_token, image_size=32, **settings
    )
    processor.chat_template = chat_template(image_token)
    processor.image_text = image_text
    if image_text and "token" in image_text:
        processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(image_text["token"])
        model.config.image_token_id = processor.image_token_id
    return model, processor


def compose_aya(**projector):
    tokenizer = case_tokenizer(*AYA_TOKENS)
    return composed(
        SiglipVisionConfig(**VISION),
        # These classes do not scale logits.
        Cohere2Config(**TEXT, vocab_size=len(tokenizer), logit_scale=1.0, sliding_window=16),
        tokenizer,
        AYA_TEXT,
        projector={
            "type": "pixel_shuffle",
            "norm": "layer_norm",
            "gated": True,
            "hidden_act": "silu",
            "hidden_features": 20,
            **projector,
        },
        views={"type": "tiles", "layout": "dynamic", "max_tiles": 4},
        vision_feature_layer=-1,
    )


def test_a_composed_model_becomes_aya_vision():
    """`to_native` compares the logits of both, each with the inputs of its own processor."""
    native, processor = to_native(*compose_aya())
    assert type(native) is AyaVisionForConditionalGeneration
    assert native.config.alignment_intermediate_size == 40
    assert processor.image_processor.max_patches == 4


def test_a_composed_model_becomes_idefics3():
    tokenizer = case_tokenizer(*IDEFICS3_TOKENS)
    model, processor = composed(
        Idefics3Config(vision_config=VISION).vision_config,
        LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        tokenizer,
        IDEFICS3_TEXT,
        projector={"type": "pixel_shuffle", "num_layers": 1, "bias": False},
        views={"type": "tiles", "layout": "split", "longest_edge": 96},
    )
    native, native_processor = to_native(model, processor)
    assert type(native) is Idefics3ForConditionalGeneration
    assert native_processor.image_processor.max_image_size["longest_edge"] == 32


def test_a_composed_model_becomes_internvl():
    tokenizer = case_tokenizer("<IMG_CONTEXT>")
    model, _ = composed(
        InternVLVisionConfig(**VISION),
        Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        tokenizer,
        image_token="<IMG_CONTEXT>",
        projector={"type": "pixel_shuffle", "norm": "layer_norm"},
        views={"type": "tiles", "layout": "dynamic"},
    )
    native, _ = to_native(model, None)  # its processor needs torchvision
    assert type(native) is InternVLForConditionalGeneration
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack(
            list(model.get_image_features(pixel_values, original_sizes=torch.full((2, 2), 32)).pooler_output)
        )
        assert torch.equal(native.get_image_features(pixel_values).pooler_output, expected)


@pytest.mark.parametrize(
    ("projector", "reason"),
    [
        ({"norm": None}, "norm 'layer_norm'"),
        ({"gated": False}, "gated True"),
        ({"channel_order": "channels_first"}, "channel_order 'places_first'"),
        ({"num_layers": 3, "hidden_features": [20, 20]}, "num_layers 2"),
        ({"bias": False}, "bias True"),
    ],
    ids=str,
)
def test_another_projector_is_refused_with_the_reason(projector, reason):
    with pytest.raises(anyvlm.CompositionError, match=f"AyaVision[^:]*: .*its projector has {reason}"):
        to_native(*compose_aya(**projector))


def test_another_text_is_refused_with_what_the_native_processor_writes():
    model, processor = compose_aya()
    processor.image_text = {**AYA_TEXT, "tile_separator": " "}
    with pytest.raises(anyvlm.CompositionError, match="AyaVision[^:]*: its processor writes .*TILE_GLOBAL"):
        to_native(model, processor)


def test_the_scale_of_logits_is_refused():
    model, processor = compose_aya()
    model.language_model.logit_scale = 0.25
    with pytest.raises(anyvlm.CompositionError, match="AyaVision[^:]*: it does not scale or cap logits as Cohere2"):
        to_native(model, processor)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="its processor can be made where torchvision is")
def test_a_processor_that_cannot_be_made_here_names_what_it_needs():
    native, native_processor = build_native(native_cases("internvl")[0], 0, True)
    ours, processor = from_native(native, native_processor)
    with pytest.raises(anyvlm.CompositionError, match=r"needs torchvision.*to_native\(model, None\)"):
        to_native(ours, processor)


class Rounding:
    """Resized pixels that are rounded otherwise than Pillow's, as torchvision's are."""

    def resize(self, image, size, *args, **kwargs):
        resized = super().resize(image, size, *args, **kwargs)
        return resized if resized.shape == image.shape else resized ^ 1


class GotOcr2ImageProcessor(Rounding, GotOcr2ImageProcessorPil):
    """In the place of the one with torchvision."""


class Cohere2VisionImageProcessor(Rounding, Cohere2VisionImageProcessorPil):
    """Likewise; transformers has none of this name with Pillow."""


@pytest.mark.parametrize(
    ("model_type", "image_processor_class"),
    [("aya_vision", GotOcr2ImageProcessor), ("cohere2_vision", Cohere2VisionImageProcessor)],
)
def test_rounding_of_pixels_by_torchvision_is_no_reason_to_refuse(model_type, image_processor_class):
    case = next(case for case in native_cases("cohere_vision") if case.name == model_type)
    native, native_processor = build_native(case, 0, True)
    rounding = copy.copy(native_processor)
    rounding.image_processor = image_processor_class.from_dict(native_processor.image_processor.to_dict())
    picture = [[sample_picture(40, 90)]]
    text = [native_processor.image_token]
    exact, rounded = (made(text=text, images=picture)["pixel_values"] for made in (native_processor, rounding))
    assert 0 < np.abs(np.array(exact) - np.array(rounded)).max() < 0.02
    ours, processor = from_native(native, rounding)
    found = processor(text=text, images=picture, return_tensors="np")["pixel_values"]
    # Views are cut with Pillow, whatever the image processor does.
    assert np.abs(found - np.array(exact)).max() == 0
    exported, _ = to_native(ours, processor)
    assert type(exported) is type(native)


class TestSameProjector:
    config = {"type": "mlp", "in_features": 8, "out_features": 12}

    def misfits(self, projector, expected):
        return [words for holds, words in same_projector({**self.config, **projector}, expected) if not holds]

    def test_what_is_left_out_is_the_default(self):
        explicit = {"num_layers": 2, "hidden_features": 12, "hidden_act": "gelu", "bias": True, "norm": None}
        assert self.misfits(explicit, {"type": "mlp"}) == []
        assert self.misfits({}, {"type": "mlp", **explicit}) == []

    def test_usual_epsilons_need_not_be_said(self):
        assert self.misfits({"norm": "layer_norm", "norm_eps": 1e-5}, {"type": "mlp", "norm": "layer_norm"}) == []
        assert len(self.misfits({"norm": "layer_norm", "norm_eps": 1e-6}, {"type": "mlp", "norm": "layer_norm"})) == 1

    def test_free_arguments_may_be_anything(self):
        expected = {"type": "mlp", "hidden_act": FREE, "num_layers": FREE, "hidden_features": FREE}
        assert self.misfits({"hidden_act": "relu", "num_layers": 4}, expected) == []

    def test_another_type(self):
        assert self.misfits({}, {"type": "linear"}) == ["its projector is 'linear', not 'mlp'"]
