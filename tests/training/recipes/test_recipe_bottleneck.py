"""Bottleneck adapters in recipes: trained alone, kept in the model, trained further by a later stage."""

from pathlib import Path

import pytest
import torch
from test_recipe_run import tiny, weights, write_recipe  # noqa: F401
from transformers import AutoModelForCausalLM

from anyvlm.training.recipes.model_checks import plan
from anyvlm.training.recipes.run import train_recipe
from anyvlm.training.recipes.validation import load_recipe
from anyvlm.training.recipes.yaml_file import RecipeError


BOTH = {
    "projector": 1e-3,
    "vision_tower": {"train": "bottleneck", "bottleneck": {"r": 4}, "learning_rate": 1e-2},
    "language_model": {"train": "bottleneck", "bottleneck": {"r": 8, "activation": "relu"}},
}


def test_adapters_alone_are_trained_and_stay_in_the_model(tiny, tmp_path):  # noqa: F811
    more = {"language_model": {"train": "bottleneck", "learning_rate": 1e-2}}
    stages = [{"name": "both", "max_steps": 2, "parts": BOTH}, {"name": "more", "max_steps": 2, "parts": more}]
    recipe = load_recipe(write_recipe(tmp_path, tiny, stages))
    first, _ = plan(recipe).tables
    assert list(first.columns[1].cells) == ["bottleneck", "all", "bottleneck"]
    train_recipe(recipe)
    before = weights(tiny["model"])
    between, after = (weights(Path(recipe.output) / folder) for folder in ("stages/1-both/model", "."))
    changed = {name for name in before if not torch.equal(before[name], between[name])}
    assert changed == {name for name in before if name.startswith("multi_modal_projector.")}
    adapters = between.keys() - before.keys()
    assert all("bottleneck_adapter" in name for name in adapters)
    assert all(between[name].abs().max() > 0 for name in adapters if name.endswith("up.weight"))
    assert {name.split(".", 1)[0] for name in adapters} == {"vision_tower", "language_model"}
    changed = {name for name in between if not torch.equal(between[name], after[name])}
    assert changed and changed <= {name for name in adapters if name.startswith("language_model.")}
    loaded = AutoModelForCausalLM.from_pretrained(recipe.output, trust_remote_code=True)
    kept = {part: (each["size"], each["activation"]) for part, each in loaded.config.bottleneck_adapters.items()}
    assert kept == {"vision_tower": (4, "gelu"), "language_model": (8, "relu")}


def test_what_is_wrong_has_its_line(tiny, tmp_path):  # noqa: F811
    tower = {"train": "bottleneck", "bottleneck": {"rank": 4, "activation": "rleu"}}
    parts = {"projector": 1e-3, "vision_tower": tower, "language_model": {"train": "all", "bottleneck": {"r": 4}}}
    path = write_recipe(tmp_path, tiny, [{"name": "a", "max_steps": 1, "parts": parts}])
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [str(problem) for problem in caught.value.problems]
    at = [lines[int(each.removeprefix(str(path)).split(":")[1]) - 1].strip() for each in found]
    assert at == ["rank: 4", "activation: rleu", "bottleneck:"]
    assert "`relu`" in found[1] and "train: bottleneck" in found[2]
    again = {"language_model": {"train": "bottleneck", "bottleneck": {"r": 4}}}
    stages = [{"name": "a", "max_steps": 1, "parts": BOTH}, {"name": "b", "max_steps": 1, "parts": again}]
    with pytest.raises(RecipeError, match=r"stages\[1\].parts.language_model.bottleneck: .*'r': 8"):
        plan(load_recipe(write_recipe(tmp_path, tiny, stages)))
