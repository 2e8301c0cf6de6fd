"""What is trained and how fast: against groups of Trainer, marks of PEFT, and the rates of timm's formula."""

import pytest
import torch
from model_tester import picture
from tiny_parts import compose, vision_config
from transformers import Trainer, TrainingArguments

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


def test_norms_and_biases_are_as_trainer_has_them(tmp_path):
    model, _ = compose()
    trained_parts = train_parts(model, dict.fromkeys(("vision_tower", "projector", "language_model"), "all"))
    ours = {
        id(parameter): group["weight_decay"]
        for group in trained_parts.parameter_groups(1e-3, 0.1)
        for parameter in group["params"]
    }
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    theirs = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert ours == theirs and set(ours.values()) == {0.0, 0.1}


def test_last_layers_take_along_what_comes_behind_and_first_layers_what_comes_before():
    model, _ = compose()
    train_parts(model, {"vision_tower": "last layer", "language_model": "first 1 layers"})
    prefixes = {name.rpartition(".")[0] if "norm" in name else name for name in trained(model)}
    tower = {name for name in trained(model) if name.startswith("vision_tower.")}
    assert tower and all(
        name.split(".")[1:4:2] in (["encoder", "1"], ["post_layernorm"]) or "post" in name for name in tower
    )
    assert any("post_layernorm" in name for name in tower)
    language = {name for name in trained(model) if name.startswith("language_model.")}
    assert {name.split(".")[2] for name in language} == {"embed_tokens", "layers"} and prefixes
    assert {name.split(".")[3] for name in language if ".layers." in name} == {"0"}


@pytest.mark.parametrize(
    "vision, layer",
    [
        ("clip_vision_model", None),
        ("clip_vision_model", -2),
        ("clip_vision_model", 1),
        ("resnet", -2),
        (("clip_vision_model", "dinov2"), -2),
    ],
)
def test_only_what_is_read_of_a_tower_is_trained(vision, layer):
    """Features may be read before the last layer; what is behind gets no gradient, so it must not be counted."""
    several = isinstance(vision, tuple)
    part = tuple(vision_config(one) for one in vision) if several else vision
    model, processor = compose(part, vision_feature_layer=(layer, None) if several else layer)
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = {name for name, p in model.vision_tower.named_parameters() if p.grad is not None}
    train_parts(model, {"vision_tower": "last 1 layers"})
    last = {name.removeprefix("vision_tower.") for name in trained(model)}
    assert {name for name in last if "layer" in name and "norm" not in name} <= reached
    assert any("encoder" in name for name in last & reached)
    train_parts(model, {"vision_tower": "all"})
    named = {name.removeprefix("vision_tower.") for name in trained(model)}
    assert reached <= named
    if layer is not None and not several:
        assert {name for name in named if "mask_token" not in name} == reached


def test_tied_weights_are_trained_once():
    model, _ = compose("clip_vision_model", "gemma2")
    found = rates(model, {"language_model": {"layer_decay": 0.5, "learning_rate": 8.0}})
    assert found["language_model.model.embed_tokens.weight"] == 1.0
    assert not any("lm_head" in name for name in found)


def test_parameters_and_modules_below_parts_can_be_named():
    model, _ = compose("dinov2")
    found = rates(
        model, {"vision_tower": 1.0, "vision_tower.embeddings": 2.0, "vision_tower.embeddings.cls_token": 4.0}
    )
    assert found["vision_tower.embeddings.cls_token"] == 4.0
    assert found["vision_tower.embeddings.position_embeddings"] == 2.0
    assert {rate for name, rate in found.items() if "embeddings" not in name} == {1.0}


def test_layers_of_a_recipe_must_be_those_it_counts():
    model, _ = compose("dinov2")
    named = {"train": "last 1 layers", "layers": ["vision_tower.encoder.layer.0"]}
    (problem,) = check_parts(model, {"vision_tower": named})
    assert problem.place == ("vision_tower", "layers") and "vision_tower.encoder.layer.1" in problem.message
    train_parts(model, {"vision_tower": {"layers": named["layers"]}})
    assert {name.split(".")[3] for name in trained(model)} == {"0"}


def test_fusion_and_newline_are_parts():
    model, _ = compose(fusion="gated")
    train_parts(model, {"fusion": 1e-4})
    assert {name.split(".")[0] for name in trained(model)} == {"fusion"}
    model, _ = compose(views="tiles")
    train_parts(model, {"image_newline": 1e-4})
    assert trained(model) == {"image_newline"}


def test_adapters_belong_to_their_part():
    peft = pytest.importorskip("peft", reason="peft is in the [train] extra")
    model, _ = compose()
    config = peft.LoraConfig(
        target_modules=r".*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector", "lm_head"], r=4
    )
    adapted = peft.get_peft_model(model, config)
    by_peft = trained(adapted)
    found = rates(
        adapted,
        {
            "projector": 1.0,
            "vision_tower": {"train": "lora", "learning_rate": 2.0},
            "language_model": {"train": "lora"},
        },
    )
    assert found.keys() == by_peft
    assert {rate for name, rate in found.items() if "vision_tower" in name} == {2.0}
    train_parts(adapted, {"vision_tower": "lora"})
    assert trained(adapted) == {name for name in by_peft if "vision_tower" in name}
    train_parts(adapted, {"language_model": "all"})
    names = {name for name, _ in adapted.named_parameters() if "language_model" in name}
    assert trained(adapted) == {name for name in names if "original_module" not in name}


def test_table_says_what_is_trained_and_how_fast():
    model, _ = compose()
    parts = {
        "projector": 1e-3,
        "vision_tower": {"train": "last 1 layers", "learning_rate": 2e-5, "layer_decay": 0.5},
        "language_model": {"layer_decay": 0.5},
    }
    table = train_parts(model, parts).table()
    rows = list(zip(*(column.cells for column in table.columns)))
    tower = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("vision_tower") and p.requires_grad
    )
    whole = sum(p.numel() for p in model.vision_tower.parameters())
    assert rows[0] == (
        "vision_tower",
        "last 1 layers of 2, decay 0.5 a layer",
        f"{tower:,} of {whole:,}",
        "1e-05 to 2e-05",
    )
    assert [row[3] for row in rows[1:]] == ["0.001", "0.12 to 1 × the trainer's"]


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
