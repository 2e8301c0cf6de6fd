"""Pictures without answers in recipes: learnt from with the model's own answers."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_recipe_run import tiny, weights, write_recipe  # noqa: F401

from anyvlm.training.recipes.run import train_recipe
from anyvlm.training.recipes.validation import load_recipe
from anyvlm.training.recipes.yaml_file import RecipeError


def stage(unlabelled, **settings):
    return {
        "name": "few",
        "max_steps": 2,
        "parts": {"projector": 1e-3},
        "data": {"unlabelled": unlabelled, "unlabelled_per_sample": 3},
        "losses": {"language_model": 1.0, "semi_supervised": {"weight": 0.5, **settings}},
    }


ANSWERS = {"answers": ["w1", "w2 w2"], "threshold": 0.5, "decay": 0.9, "weak": {"rotation": 2}}


@pytest.mark.parametrize("kind", ["folder", "conversations"])
def test_the_models_own_answers_are_learnt(tiny, tmp_path, kind):  # noqa: F811
    source = {"pictures": str(tiny["folder"] / "data"), "question": "w5 w6 ?"}
    if kind == "conversations":  # some with an answer, some without
        rows = json.loads(Path(tiny["data"]).read_text(encoding="utf-8"))
        rows = [{**row, "conversations": row["conversations"][: 1 + index % 2]} for index, row in enumerate(rows)]
        source = str(tmp_path / "unlabelled.json")
        Path(source).write_text(json.dumps(rows), encoding="utf-8")
        source = {"path": source, "image_folder": str(tiny["folder"] / "data")}
    recipe = load_recipe(write_recipe(tmp_path, tiny, [stage(source, **ANSWERS)]))
    (result,) = train_recipe(recipe)
    confident = [
        entry["semi_supervised/confident"] for entry in result.history if "semi_supervised/confident" in entry
    ]
    assert len(confident) == 2 and all(share == 1 for share in confident), "of two answers one has a half"
    assert result.losses["semi_supervised"]["first"] > 0
    assert any("semi_supervised/accuracy" in entry for entry in result.history) == (kind == "conversations")
    kept = load_file(tmp_path / "out" / "stages" / "1-few" / "checkpoint-2" / "objectives.safetensors")
    assert any("teacher" in name for name in kept)
    assert weights(recipe.output).keys() == weights(tiny["model"]).keys()


def test_what_is_wrong_has_its_line(tiny, tmp_path):  # noqa: F811
    pictures = {"pictures": str(tmp_path / "none"), "question": "w5"}
    bad = stage(pictures, answers=["w1"], threshold=1.5, strong={"rotate": 5})
    bad["data"]["unlabelled_per_sample"] = 0
    path = write_recipe(tmp_path, tiny, [bad])
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [str(problem).removeprefix(str(path)) for problem in caught.value.problems]
    at = [lines[int(each.split(":")[1]) - 1].split(":")[0].strip() for each in found]
    assert at == ["pictures", "unlabelled_per_sample", "answers", "threshold", "strong"]
    without = stage(tiny["data"])
    del without["data"], without["losses"]["language_model"]
    with pytest.raises(RecipeError, match=r"losses.semi_supervised: .*`unlabelled`"):
        load_recipe(write_recipe(tmp_path, tiny, [without]))
    same = stage(tiny["data"], answers=["w1", "w1 "])
    with pytest.raises(ValueError, match="Nothing was run.*are the same tokens"):
        train_recipe(load_recipe(write_recipe(tmp_path, tiny, [same])))
