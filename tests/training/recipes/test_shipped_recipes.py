"""The recipes that come along, and those that a swap writes, are right and run: two steps a stage on a tiny model."""

from pathlib import Path

import pytest
import yaml
from tiny_parts import text_config, tiny_tokenizer, vision_config
from tiny_run import write_data, write_model
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil

from anyvlm.swapping import recipe as swap_recipes
from anyvlm.swapping.recipe import recipe_after, recipe_yaml
from anyvlm.swapping.report import SwapReport
from anyvlm.training.recipes.model_checks import plan
from anyvlm.training.recipes.run import train_recipe
from anyvlm.training.recipes.shipped import first_line, shipped
from anyvlm.training.recipes.validation import load_recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    size = {"height": 32, "width": 32}
    AutoModel.from_config(vision_config("clip_vision_model")).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder / "tower")
    AutoModelForCausalLM.from_config(text_config("llama")).save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "text")
    write_model(folder / "model")
    write_data(folder / "data", 8)
    return folder


def small(recipe: dict, tiny: Path, folder: Path) -> list[str]:
    """What makes a recipe one for the tiny model and data."""
    data = tiny / "data" / "train.json"
    changes = [
        f"output={folder / 'out'}",
        f"data.train={data}",
        f"data.eval={data}",
        "training_arguments.use_cpu=true",
    ]
    changes += ["training_arguments.per_device_train_batch_size=2", "training_arguments.gradient_accumulation_steps=2"]
    if "compose" in recipe:
        several = isinstance(recipe["compose"]["vision"], list)
        tower = tiny / "tower"
        changes += [f"compose.vision={[str(tower)] * 2 if several else tower}", f"compose.text={tiny / 'text'}"]
    else:
        changes.append(f"model={tiny / 'model'}")
    for index, stage in enumerate(recipe["stages"]):
        if "gradient_accumulation_steps" in stage.get("training_arguments", {}):
            changes.append(f"stages.{index}.training_arguments.gradient_accumulation_steps=2")
        if "data" in stage:
            changes.append(f"stages.{index}.data.train={data}")
        changes.append(f"stages.{index}.max_steps=2")
    return changes


def run(path: Path, tiny: Path) -> list:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = load_recipe(path, small(written, tiny, path.parent))
    planned = plan(recipe)
    assert len(planned.tables) == len(recipe.stages)
    results = train_recipe(recipe, loaded=planned.loaded)
    assert [result.steps for result in results] == [2] * len(recipe.stages)
    assert (path.parent / "out" / "config.json").is_file()
    return results


def test_five_are_shipped_and_say_what_they_are_for():
    found = shipped()
    assert set(found) == {"llava", "omnilmm", "domain_tower_swap", "lora_one_gpu", "single_stage"}
    for name, text in found.items():
        assert 30 < len(first_line(text)) < 130, name
        assert max(map(len, text.splitlines())) <= 125
        assert all(stage["why"] for stage in yaml.safe_load(text)["stages"])


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_runs(name, tiny, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(shipped()[name], encoding="utf-8")
    results = run(path, tiny)
    trained = [result.trained_parameters for result in results]
    assert trained == sorted(trained), "more from stage to stage"


@pytest.mark.parametrize("swapped", ["tower", "language model, by LoRA"])
def test_the_recipe_after_a_swap_runs(swapped, tiny, tmp_path, monkeypatch):
    if "LoRA" in swapped:
        monkeypatch.setattr(swap_recipes, "LORA_FROM", 1)
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    what = dict.fromkeys(("vision_tower", "multi_modal_projector", "language_model"), "kept")
    what["vision_tower" if swapped == "tower" else "language_model"] = "replaced"
    what["multi_modal_projector"] = "solved"
    report = SwapReport(
        "vision" if swapped == "tower" else "text",
        parts=[{"name": name, "what": change, "parameters": 100, "note": ""} for name, change in what.items()],
        alignment={"explained_variance": 0.5},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe_after(report, model, checkpoint=str(tiny / "model"))), encoding="utf-8")
    run(path, tiny)
