"""`anyvlm.swap`: what it refuses, what it leaves alone, and what pictures do for it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import compose, text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.swapping.fitting import Fitting
from anyvlm.swapping.report import SwapReport


def pictures(number, seed=0):
    """Smooth pictures, so that towers of other grids see the same."""
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((48, 48), Image.BICUBIC)
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def trained():
    return compose("clip_vision_model", "llama")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Nothing to swap"),
        ({"audio": "x"}, "no audio tower"),
        ({"vision": vision_config("dinov2"), "patch_size": 4}, "patch_size"),
        ({"vision": vision_config("dinov2"), "tokenizer": "x"}, "tokenizer"),
        ({"vision": vision_config("dinov2"), "texts": ["What?"]}, "Pass images"),
        ({"vision": vision_config("dinov2"), "seconds": 5}, "Pass images"),
        ({"vision": vision_config("dinov2"), "vision_feature_layer": "best"}, "Pass images"),
        ({"vision": vision_config("dinov2"), "vision_feature_layer": "first"}, "first"),
        ({"vision": vision_config("dinov2"), "image_tokens": "some"}, "some"),
        ({"vision": vision_config("dinov2"), "images": []}, "empty"),
    ],
)
def test_what_cannot_be_is_refused(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        anyvlm.swap(*trained, **arguments)


def test_only_composed_models(trained):
    with pytest.raises(ValueError, match="no composed model"):
        anyvlm.swap(trained[0].language_model, trained[1], vision=vision_config("dinov2"))
    with pytest.raises(ValueError, match="not the processor"):
        anyvlm.swap(trained[0], trained[1].tokenizer, vision=vision_config("dinov2"))


def test_closed_form_leaves_all_but_the_projector_and_the_old_model_whole(trained):
    model, processor = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new, new_processor, report = anyvlm.swap(
        model, processor, vision=vision_config("dinov2"), images=pictures(20), seconds=0, progress=False
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert new.language_model is model.language_model
    assert {part["what"] for part in report.parts if "projector" in part["name"]} == {"solved"}
    assert report.alignment["pictures"] == 20 and report.distillation is None
    assert report.alignment["explained_variance"] > 0
    tokens = new.get_image_features(
        **{
            key: value
            for key, value in new_processor(text=["<image>"], images=pictures(1, seed=1), return_tensors="pt").items()
            if key not in ("input_ids", "attention_mask")
        }
    ).pooler_output[0]
    old = model.get_image_features(
        processor(text=["<image>"], images=pictures(1, seed=1), return_tensors="pt")["pixel_values"]
    ).pooler_output[0]
    # A picture that was not among them: nearer to what the old path gives than their own spread.
    assert (tokens - old).square().mean() < (old - old.mean(0)).square().mean()


def test_a_tower_that_was_tuned_keeps_its_projector_and_layer(trained):
    model, processor = trained
    tuned = type(model.vision_tower)(model.config.vision_config)
    tuned.load_state_dict(model.vision_tower.state_dict())
    with torch.no_grad():
        tuned.encoder.layers[-1].mlp.fc2.weight.mul_(1.1)
    new, _, report = anyvlm.swap(model, processor, vision=tuned)
    kept = {part["name"]: part["what"] for part in report.parts}
    assert kept["multi_modal_projector"] == kept["language_model"] == "kept"
    assert report.layers is None and not report.warnings
    assert report.tokens_per_picture["before"] == report.tokens_per_picture["after"]


def test_layer_of_another_tower_is_the_one_that_says_most():
    """The new tower is the old one, but for a last normalisation that lets one channel through: an earlier layer says
    more."""
    model, processor = compose("dinov2", "llama")
    tower = type(model.vision_tower)(model.config.vision_config)
    tower.load_state_dict(model.vision_tower.state_dict())
    with torch.no_grad():
        tower.layernorm.weight[1:] = 0
    new, _, report = anyvlm.swap(
        model, processor, vision=tower, images=pictures(20), vision_feature_layer="best", seconds=0, progress=False
    )
    explained = {entry["layer"]: entry["explained_variance"] for entry in report.layers}
    assert explained[None] < 0.5 < explained[new.config.vision_feature_layer]


def test_training_by_steps_is_the_same_every_time(trained):
    results = [
        anyvlm.swap(
            *trained,
            vision=vision_config("resnet"),
            images=pictures(12),
            texts=["w1 w2"],
            steps=3,
            progress=False,
        )
        for _ in range(2)
    ]
    (first, _, report), (second, _, other) = results
    assert report.distillation["steps"] == 3 and report.distillation["losses"] == other.distillation["losses"]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_both_parts_at_once(trained):
    model, processor = trained
    new, new_processor, report = anyvlm.swap(
        model,
        processor,
        vision=vision_config("dinov2"),
        text=text_config("qwen3"),
        tokenizer=tiny_tokenizer(),
    )
    assert report.swapped == "vision and text"
    assert type(new.vision_tower).__name__ == "Dinov2Model" and type(new.language_model).__name__ == "Qwen3ForCausalLM"
    inputs = new_processor(text=["<image> w1"], images=pictures(1), return_tensors="pt")
    assert torch.isfinite(new(**inputs).logits).all()


def test_a_frozen_model_is_swapped_and_stays_frozen(trained):
    """As after a training of the projector alone."""
    model, processor = trained
    model.vision_tower.requires_grad_(False)
    try:
        new, _, _ = anyvlm.swap(model, processor, vision=vision_config("dinov2"), images=pictures(10), seconds=0)
        assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
        assert all(parameter.requires_grad for parameter in new.multi_modal_projector.parameters())
    finally:
        model.vision_tower.requires_grad_(True)


def test_a_projector_without_weights_is_said_not_to_be_trained():
    old = compose("clip_vision_model", "llama", projector="identity")
    new = compose("clip_vision_model", "llama", projector="identity")
    report = SwapReport("vision")
    assert not Fitting(pictures(4), steps=2, progress=False).distil(old, new, report)
    assert report.distillation is None and "no weights" in report.warnings[0]
