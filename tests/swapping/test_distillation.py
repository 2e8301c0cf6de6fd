"""Distilling the new path of a swapped model into giving what the old path gave, without labels."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import compose, vision_config

from anyvlm.swapping.distillation import distil
from anyvlm.swapping.old_answers import QUESTIONS, WordProbabilities, ask, prompts_of
from anyvlm.swapping.picture_paths import PicturePath
from anyvlm.swapping.vision_swap import swap_vision_tower


def pictures(count=12, seed=0):
    """Smooth random pictures, which a random tower tells apart."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((40, 40), Image.Resampling.BICUBIC) for one in pixels]


def swapped(tower="siglip_vision_model", old="clip_vision_model", **kwargs):
    model, processor = compose(old, **kwargs)
    return model, processor, *swap_vision_tower(model, processor, vision_config(tower))


def run(old, old_processor, new, new_processor, source=None, **kwargs):
    kwargs = {"seconds": None, "steps": 6, "progress": False, "max_new_tokens": 4, "num_variants": 2, **kwargs}
    return distil(old, old_processor, new, new_processor, pictures() if source is None else source, **kwargs)


def test_only_the_projector_is_changed_and_it_comes_nearer_to_the_old_path():
    old, old_processor, new, new_processor = swapped()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    old_before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in new.named_parameters()}
    modes = {name: module.training for name, module in new.named_modules()}
    report = run(old, old_processor, new, new_processor, steps=40, learning_rate=1e-2)
    changed = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("multi_modal_projector.") for name in changed)
    assert all(torch.equal(tensor, old_before[name]) for name, tensor in old.state_dict().items())
    assert report["steps"] == 40 and report["pictures"] == 11 and report["held_out_pictures"] == 1
    assert report["held_out_loss"]["after"] < 0.7 * report["held_out_loss"]["before"]
    assert report["token_error"]["after"] < report["token_error"]["before"]
    assert {name: parameter.requires_grad for name, parameter in new.named_parameters()} == trainable
    assert {name: module.training for name, module in new.named_modules()} == modes
    assert all(parameter.grad is None for parameter in new.parameters())
    # What is said of the weights is true of those in place.
    again = run(old, old_processor, new, new_processor, steps=1, learning_rate=0.0)
    for key in ("agreement", "held_out_loss", "token_error"):
        assert again[key]["before"] == pytest.approx(report[key]["after"], abs=1e-6)


@pytest.mark.parametrize("gradual", [False, True])
def test_equal_seeds_give_equal_weights(gradual):
    old, old_processor, new, new_processor = swapped()
    other = copy.deepcopy(new)
    other.language_model = new.language_model
    reports = [run(old, old_processor, model, new_processor, gradual=gradual) for model in (new, other)]
    assert reports[0]["losses"] == reports[1]["losses"]
    for one, two in zip(new.parameters(), other.parameters()):
        assert torch.equal(one, two)


def test_gradual_begins_with_the_old_tokens_and_ends_with_the_new():
    """At the first step all that the language model sees is old, so that only the tokens' own loss is left."""
    losses = {}
    for gradual in (False, True):
        old, old_processor, new, new_processor = swapped()
        report = run(old, old_processor, new, new_processor, steps=1, gradual=gradual, token_weight=0)
        losses[gradual] = report["losses"][0][1]
    assert losses[True] == pytest.approx(0, abs=1e-4)
    assert losses[False] > 1e-3


def test_the_weights_that_were_best_on_held_out_pictures_are_kept():
    old, old_processor, new, new_processor = swapped()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    report = run(old, old_processor, new, new_processor, learning_rate=1e3)  # it diverges
    assert report["held_out_loss"]["after"] == report["held_out_loss"]["before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def test_an_interrupt_keeps_the_best_so_far(monkeypatch, caplog):
    old, old_processor, new, new_processor = swapped()
    steps = []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) > 4:
            raise KeyboardInterrupt
        return clip(*args, **kwargs)

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    report = run(old, old_processor, new, new_processor, steps=1000)
    assert report["interrupted"] and report["steps"] == 4
    assert "best weights until then are kept" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in new.parameters())
    assert all(parameter.grad is None for parameter in new.parameters())


def test_the_time_is_kept():
    old, old_processor, new, new_processor = swapped()
    report = run(old, old_processor, new, new_processor, seconds=2.0, steps=None, num_variants=100)
    assert report["steps"] > 0
    assert 1.5 < report["seconds"] < 6


def test_last_layers_of_the_tower():
    old, old_processor, new, new_processor = swapped()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    run(old, old_processor, new, new_processor, tower_layers=1, learning_rate=1e-2, steps=20)
    changed = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, before[name])}
    tower = {name for name in changed if name.startswith("vision_tower.")}
    last = len(new.vision_tower.encoder.layers) - 1 if hasattr(new.vision_tower, "encoder") else None
    assert tower and all(f"layers.{last}." in name for name in tower)
    with pytest.raises(ValueError, match="tower_layers must be from 0 to"):
        run(old, old_processor, new, new_processor, tower_layers=99)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fusion": "cross_attention"},
        {"fusion": "gated"},
        {"projector": "resampler"},
        {"image_attention": "prefix"},
        {"views": {"type": "tiles", "layout": "dynamic", "max_tiles": 2}},
    ],
    ids=["cross_attention", "gated", "resampler", "prefix", "tiles"],
)
def test_other_models(kwargs):
    old, old_processor, new, new_processor = swapped(**kwargs)
    report = run(old, old_processor, new, new_processor, learning_rate=1e-2, steps=30)
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]


def test_another_number_of_tokens_leaves_the_words_to_learn_from():
    old, old_processor = compose("clip_vision_model")
    new, new_processor = swap_vision_tower(old, old_processor, vision_config("resnet"), image_tokens="own")
    report = run(old, old_processor, new, new_processor, learning_rate=1e-2, steps=30)
    assert report["token_error"] == {"before": None, "after": None} and not report["gradual"]
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    with pytest.raises(ValueError, match="another number of tokens"):
        run(old, old_processor, new, new_processor, word_weight=0)


def test_what_the_old_path_answers_is_what_it_generates():
    old, processor = compose("clip_vision_model")
    shown = list(enumerate(pictures(3)))
    prompts = prompts_of(processor, ["What is this?", "Describe it in other words, please."])
    for example in ask(PicturePath(old, processor), shown, prompts, max_new_tokens=5):
        inputs = processor(text=[example.prompt], images=[[example.image]], return_tensors="pt")
        expected = old.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert example.answer.tolist() == expected.tolist()
        assert torch.equal(example.probabilities.words[:, 0], example.answer)


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(5, 40, generator=generator) * 3 for _ in range(2))
    expected = torch.nn.functional.kl_div(new.log_softmax(-1), old.log_softmax(-1), reduction="none", log_target=True)
    whole = WordProbabilities.of(old, kept=40).divergence(new)
    assert torch.allclose(whole, expected.sum(-1), atol=1e-4)
    part = WordProbabilities.of(old, kept=8)
    assert bool((part.divergence(new) <= whole + 1e-5).all())
    assert torch.allclose(part.divergence(old), torch.zeros(5), atol=1e-5)
    new.requires_grad_(True)
    part.divergence(new).sum().backward()
    assert torch.isfinite(new.grad).all()


def test_errors_say_what_to_do():
    old, old_processor, new, new_processor = swapped()
    with pytest.raises(ValueError, match="Pass seconds"):
        run(old, old_processor, new, new_processor, steps=None)
    with pytest.raises(ValueError, match="at least two pictures"):
        run(old, old_processor, new, new_processor, source=pictures(1))
    with pytest.raises(ValueError, match="list of questions"):
        run(old, old_processor, new, new_processor, texts="What is this?")
    with pytest.raises(ValueError, match="same language model"):
        run(*compose("clip_vision_model"), new, new_processor)
    assert len(prompts_of(old_processor, None)) == len(QUESTIONS)
