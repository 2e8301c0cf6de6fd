"""What is trained and how fast: against groups of Trainer, marks of PEFT, and the rates of timm's formula."""

import pytest
import torch
from tiny_parts import compose

from anyvlm.training.parts.trained_parts import check_parts, train_parts


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def rates(model, parts):
    """Name of each parameter that an optimizer gets -> its rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = train_parts(model, parts).parameter_groups(1.0)
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == trained(model)
    torch.optim.AdamW(groups)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_what_is_not_named_is_frozen():
    model, _ = compose()
    train_parts(model, {"projector": "1e-3"})
    assert {name.split(".")[0] for name in trained(model)} == {"multi_modal_projector"}


def test_rates_fall_from_layer_to_layer():
    model, _ = compose()
    found = rates(model, {"vision_tower": {"layer_decay": 0.5, "learning_rate": 8.0}, "language_model": 2})
    by_layer = {
        layer: {rate for name, rate in found.items() if name.startswith(f"vision_tower.{layer}")}
        for layer in ("embeddings", "encoder.layers.0", "encoder.layers.1", "post_layernorm")
    }
    assert list(by_layer.values()) == [{1.0}, {2.0}, {4.0}, {8.0}]
    assert {rate for name, rate in found.items() if name.startswith("language_model")} == {2.0}


def test_all_mistakes_are_told_at_once():
    model, _ = compose()
    problems = check_parts(
        model,
        {
            "projektor": 1e-3,
            "projector": -1,
            "vision_tower": {"train": "last 9 layers", "learnin_rate": 2e-5},
            "fusion": "all",
            "language_model": {"train": "lora", "unfreeze": 3},
        },
    )
    places = {(problem.place, next(iter(problem.message.split(" ")))) for problem in problems}
    assert {place for place, _ in places} == {
        ("projektor",),
        ("projector", "learning_rate"),
        ("vision_tower", "train"),
        ("vision_tower", "learnin_rate"),
        ("fusion",),
        ("language_model", "unfreeze"),
        ("language_model", "train"),
    }
    with pytest.raises(ValueError, match="Nothing is trained"):
        train_parts(model, {"projector": "frozen"})
