"""The recipe after a swap: names that are the model's, new before kept, and rates in order."""

import pytest
import torch
import yaml
from test_report import a_report
from tiny_parts import compose
from transformers import TrainingArguments

from anyvlm.swapping import recipe as recipes
from anyvlm.swapping.part_changes import compare_parts, digest
from anyvlm.swapping.recipe import recipe_after, recipe_yaml


PROJECTOR = "multi_modal_projector"


def a_swap(model, swapped="vision", changes=None, **fields):
    """A report of a model whose parts in `changes` are not the old ones."""
    changes = changes or {}
    before = digest(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(name == changed or name.startswith(f"{changed}.") for changed in changes):
                parameter.add_(1)
    return a_report(swapped=swapped, parts=compare_parts(before, model, changes), **fields)


CASES = {
    "a tower, nothing solved": ("vision", {"vision_tower": "replaced", PROJECTOR: "initialised"}, {}),
    "a tower, a map solved": ("vision", {"vision_tower": "replaced", f"{PROJECTOR}.layers.0": "solved"}, {}),
    "a tower, distilled": ("vision", {"vision_tower": "replaced", PROJECTOR: "trained"}, {}),
    "a tower of the same kind": ("vision", {"vision_tower": "replaced"}, {}),
    "the tower at another size": ("vision", {"vision_tower.embeddings.position_embedding": "resized"}, {}),
    "a language model": ("text", {"language_model": "replaced", PROJECTOR: "initialised"}, {}),
    "both": ("vision", {"vision_tower": "replaced", "language_model": "replaced", PROJECTOR: "initialised"}, {}),
    "with a fusion": (
        "text",
        {"language_model": "replaced", PROJECTOR: "initialised", "fusion": "initialised"},
        {"fusion": {"type": "cross_attention", "every": 1}},
    ),
    "with a newline": ("text", {"language_model": "replaced", "image_newline": "initialised"}, {"views": "tiles"}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    swapped, changes, arguments = request.param
    model, _ = compose(**arguments)
    report = a_swap(model, swapped, changes)
    return model, report, recipe_after(report, model, checkpoint="out/swapped")


def names_of(stage):
    for name, part in stage["parts"].items():
        yield from part.get("layers", [name])


def test_every_name_is_the_models(case):
    model, _, recipe = case
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for stage in recipe["stages"]:
        assert set(names_of(stage)) <= known


def test_what_was_kept_is_never_trained_before_what_is_new(case):
    _, report, recipe = case
    new = {p["name"] for p in report.parts if p["what"] in ("initialised", "resized", "solved", "trained")}
    new = {name for name in new if not name.startswith("language_model")}
    first = recipe["stages"][0]
    if new:
        assert set(first["parts"]) == new
    kept = {p["name"] for p in report.parts if p["what"] == "kept"}
    waits = {name for name in kept if not any(other.startswith(f"{name}.") for other in new)} - {PROJECTOR}
    assert not waits & set(first["parts"])
    if report.swapped == "text":
        assert not any("vision_tower" in name for stage in recipe["stages"] for name in stage["parts"])
    assert "language_model" in recipe["stages"][-1]["parts"]
    replaced = {p["name"] for p in report.parts if p["what"] == "replaced"}
    orders = [
        next(i for i, stage in enumerate(recipe["stages"]) if name in stage["parts"])
        for name in ("vision_tower", "language_model")
        if any(name in stage["parts"] for stage in recipe["stages"])
    ]
    if "language_model" in replaced:
        assert orders == sorted(orders, reverse=True), "what reads the tower learns before it"
    else:
        assert orders == sorted(orders) and len(orders) == 2, "the kept language model comes last"


def test_rates_fall_from_stage_to_stage_and_from_new_to_kept(case):
    _, _, recipe = case
    stages = recipe["stages"]
    for stage in stages:
        rates = {name: part["learning_rate"] for name, part in stage["parts"].items()}
        assert all(0 < rate <= 1e-3 for rate in rates.values())
        if "language_model" in rates and stage["parts"]["language_model"]["train"] == "all":
            assert rates[PROJECTOR] >= rates["language_model"]
    for name, part in stages[0]["parts"].items():
        later = [s["parts"][n]["learning_rate"] for s in stages[1:] for n in s["parts"] if name.startswith(n)]
        assert all(part["learning_rate"] >= rate for rate in later)


def test_it_is_yaml_that_reads_back_with_a_reason_for_each_stage(case):
    _, _, recipe = case
    text = recipe_yaml(recipe)
    read = yaml.safe_load(text)
    assert read == {**recipe, "stages": [{k: v for k, v in s.items() if k != "why"} for s in recipe["stages"]]}
    comments = " ".join(line.strip(" #") for line in text.splitlines() if line.lstrip().startswith("#"))
    assert all(stage["why"] in comments for stage in recipe["stages"])
    assert max(map(len, text.splitlines())) <= 120


def test_its_arguments_are_those_of_trainer(case, tmp_path):
    _, _, recipe = case
    arguments = {**recipe["training_arguments"], "num_train_epochs": recipe["stages"][0]["epochs"]}
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments).max_grad_norm == 1


def test_the_better_the_closed_form_the_lower_the_rate():
    model, _ = compose()
    rates = []
    for explained in (-0.5, 0.0, 0.3, 0.7, 1.0):
        report = a_swap(model, changes={PROJECTOR: "solved"}, alignment={"explained_variance": explained})
        rates.append(recipe_after(report, model)["stages"][0]["parts"][PROJECTOR]["learning_rate"])
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[1], rates[-1]) == (1e-3, 1e-3, 1e-4)


def test_a_fresh_projector_learns_as_llavas_whatever_the_alignment_says():
    model, _ = compose()
    report = a_swap(model, changes={PROJECTOR: "initialised"}, alignment={"explained_variance": 1.0})
    stage = recipe_after(report, model)["stages"][0]
    assert stage["parts"][PROJECTOR]["learning_rate"] == 1e-3 and stage["epochs"] == 1


def test_a_large_language_model_gets_lora_and_a_kept_one_half_the_rate(monkeypatch):
    monkeypatch.setattr(recipes, "LORA_FROM", 1)
    model, _ = compose()
    last = {}
    for swapped in ("vision", "text"):
        last[swapped] = recipe_after(a_swap(model, swapped), model)["stages"][-1]["parts"]["language_model"]
        assert last[swapped]["train"] == "lora" and last[swapped]["lora"]["target_modules"] == "all-linear"
    assert last["vision"]["learning_rate"] == last["text"]["learning_rate"] / 2
