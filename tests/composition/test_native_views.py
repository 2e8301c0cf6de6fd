"""views="native": pictures of their own size and proportions within a budget of tokens."""

import random

import pytest
import torch
from model_tester import picture
from tiny_parts import compose
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoProcessor

import anyvlm
from anyvlm.composition.image_processors import plain_processor
from anyvlm.configuration.image_views import num_image_tokens, plan_views
from anyvlm.processing.prepared_views import prepare_views


#: NaFlex, packed, strip and padded pictures; then those whose image processor does not take planned sizes: packed, packed
#: in one row, with positions, and one that takes only even numbers of patches.
TOWERS = ["siglip2_vision_model", "qwen2_5_vl_vision", "minicpmv4_6_vision", "pixtral"]
CUT_TOWERS = ["glm_ocr_vision", "dots3_note_vision_encoder", "gemma4_vision", "kimi_k25_vision", "minicpm_ocr_vision"]
CUT_TOWERS = [tower for tower in CUT_TOWERS if tower in CONFIG_MAPPING]  # the oldest transformers has three of them
PROJECTORS = [{"type": "pixel_shuffle", "scale_factor": 2}, {"type": "avg_pool", "ratio": 3}, "conv"]


def features(model, inputs):
    inputs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return model.get_image_features(**inputs).pooler_output


def encode(processor, texts, images):
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("tower", "projector"),
    [(tower, "mlp") for tower in TOWERS + CUT_TOWERS] + [(tower, own) for tower in TOWERS[:2] for own in PROJECTORS],
    ids=str,
)
def test_model_and_processor_agree_within_the_budget(tower, projector):
    model, processor = compose(tower, projector=projector, views={"type": "native", "max_tokens": 12, "min_tokens": 2})
    cell, tokens = model.config.image_views["cell_size"], model.config.image_views["cell_tokens"]
    sizes = [(70, 90), (500, 20), (1, 1), (1, 300), (300, 1), (cell, 2 * cell)]
    inputs = encode(processor, ["<image> w1"] * len(sizes), [[picture(0, size)] for size in sizes])
    made = [len(tokens) for tokens in features(model, inputs)]
    assert made == [num_image_tokens(model.config, *size) for size in sizes]
    assert made == processor._get_num_multimodal_tokens(sizes).num_image_tokens
    assert made == (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert all(2 <= number <= 12 for number in made)
    assert made[-1] == 2 * tokens, "a picture of two cells keeps its size"
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_thousand_sizes_are_counted_as_planned():
    model, processor = compose("siglip2_vision_model", views={"type": "native", "max_tokens": 256})
    generator = random.Random(0)
    sizes = [(generator.randint(1, 4096), generator.randint(1, 4096)) for _ in range(1000)]
    counts = [num_image_tokens(model.config, *size) for size in sizes]
    assert processor._get_num_multimodal_tokens(sizes).num_image_tokens == counts
    assert min(counts) >= 1 and 200 < max(counts) <= 256
    for size, count in list(zip(sizes, counts))[:8]:
        inputs = encode(processor, ["<image>"], [picture(0, size)])
        assert [len(tokens) for tokens in features(model, inputs)] == [count]


@pytest.mark.parametrize("tower", TOWERS)
def test_patches_are_those_of_the_towers_own_image_processor(tower):
    """For towers whose processor takes planned sizes, cutting its plain pictures gives the same."""
    _, processor = compose(tower, views={"type": "native", "max_tokens": 12})
    assert not processor.image_views["cut_patches"]
    spec, edge = processor.vision_tower_spec, processor.image_views["cell_size"]
    pictures = [picture(0, (edge, 3 * edge)), picture(1, (4 * edge, 2 * edge))]
    expected = prepare_views(processor.image_processor, pictures, spec, processor.image_views)
    plain, views = (
        plain_processor(processor.image_processor, (edge, edge)),
        dict(processor.image_views, cut_patches=True),
    )
    found = prepare_views(plain, pictures, spec, views)
    assert set(found) == set(expected)
    for key, value in found.items():
        own = expected[key]
        if spec["inputs"] == "padded_patches":  # NaFlex pads to the budget, with zeros before they are normalised
            mask = expected["pixel_attention_mask"].bool()
            own = own[mask] if key == "pixel_values" else own
            value = value[found["pixel_attention_mask"].bool()] if key == "pixel_values" else value
            if key == "pixel_attention_mask":
                own, value = own.sum(1), value.sum(1)
        torch.testing.assert_close(value.to(own.dtype), own, rtol=0, atol=1e-6, msg=key)


def test_picture_of_whole_cells_is_not_resized():
    """What the tower sees is what its own image processor makes of the picture when it does not resize."""
    _, processor = compose("qwen2_5_vl_vision", views="native")
    image = picture(0, (64, 96))
    own = processor.image_processor([image], do_resize=False, return_tensors="pt")
    assert torch.equal(encode(processor, ["<image>"], [image])["pixel_values"], own["pixel_values"])
    plan = plan_views(processor.image_views, 64, 96)
    assert plan.views[0].size == (64, 96)


@pytest.mark.parametrize("tower", TOWERS + CUT_TOWERS[:3])
def test_checkpoint(tower, tmp_path):
    model, processor = compose(tower, views={"type": "native", "max_tokens": 9})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    texts, images = ["w1 <image>", "w2 <image> w3"], [[picture(0, (50, 90))], [picture(1, (300, 40))]]
    before, after = (encode(own, texts, images) for own in (processor, loaded_processor))
    for key in before:
        assert torch.equal(before[key], after[key])
    with torch.no_grad():
        torch.testing.assert_close(model(**before).logits, loaded(**after).logits, rtol=1e-5, atol=1e-6)


def test_queries_have_a_budget_of_features():
    model, processor = compose(
        "siglip2_vision_model",
        projector={"type": "resampler", "num_queries": 5},
        views={"type": "native", "max_tokens": 12},
    )
    inputs = encode(processor, ["<image>"], [picture(0, (300, 500))])
    assert 6 < inputs["spatial_shapes"].prod() <= 12
    assert [len(tokens) for tokens in features(model, inputs)] == [5]


@pytest.mark.parametrize(
    ("vision", "arguments", "message"),
    [
        ("aimv2_vision_model", {"views": "native"}, 'takes pictures of 32x32.*views="tiles".*siglip2_vision_model'),
        ("sam_vision_model", {"views": "native"}, "does not take pictures of another size"),
        ("qwen2_5_vl_vision", {"views": "native", "image_size": 64}, "image_size brings.*Leave out either"),
        ("kimi_k25_vision", {"views": {"type": "native", "max_tokens": 3}}, "does not take all pictures"),
        ("qwen2_5_vl_vision", {"views": {"type": "native", "tokens": 4}}, "no 'tokens'.*max_tokens and min_tokens"),
        ("qwen2_5_vl_vision", {"views": {"type": "native", "max_tokens": 0}}, "at least one token"),
        (
            "qwen2_5_vl_vision",
            {"views": {"type": "native", "max_tokens": 2, "min_tokens": 3}},
            "no more than max_tokens",
        ),
        (
            "qwen2_5_vl_vision",
            {"views": {"type": "native", "max_tokens": 4}, "projector": {"type": "resampler", "num_queries": 5}},
            "5 tokens of any picture, more than max_tokens=4",
        ),
    ],
)
def test_refused(vision, arguments, message):
    with pytest.raises(anyvlm.CompositionError, match=message):
        compose(vision, **arguments)
