"""What a recipe says of its data, as one data set; and a whole recipe with all of it."""

import json

import numpy as np
import pytest
import yaml
from model_tester import picture
from PIL import Image
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.training.data import open_training_data, opening_errors
from anyvlm.training.recipes.run import train_recipe
from anyvlm.training.recipes.validation import load_recipe


@pytest.fixture
def folder(tmp_path):
    """Classes in folders; one picture is none."""
    for index in range(24):
        place = tmp_path / "pictures" / f"w{index % 3}"
        place.mkdir(parents=True, exist_ok=True)
        picture(index).save(place / f"{index}.png")
    (tmp_path / "pictures" / "w1" / "4.png").write_text("no picture")
    return tmp_path


SETTINGS = {
    "augmentation": {"crop": 0.2},
    "few_shot": {"shots": [1, 2], "choose": "classes"},
    "max_unreadable": 0.5,
}


def test_examples_before_each_and_pictures_changed(folder):
    spec = {"path": str(folder / "pictures"), "questions": ["w5 ?"]}
    train, held_out = (open_training_data(spec, SETTINGS, training=training, seed=1) for training in (True, False))
    assert train.augments and not held_out.augments
    assert {len(sample["images"]) for sample in train} == {2, 3}
    for sample in held_out:
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * len(sample["images"])
    row = next(index for index in range(24) if held_out[index]["images"][-1] == picture(0))
    assert train[row]["images"][-1].size == picture(0).size
    assert not np.array_equal(np.asarray(train[row]["images"][-1]), np.asarray(picture(0)))


def test_streamed_data_needs_examples_of_its_own(folder):
    spec = {"path": str(folder / "pictures"), "streaming": True}
    with pytest.raises(ValueError, match="needs `examples` of its own"):
        open_training_data(spec, SETTINGS)
    few_shot = {**SETTINGS["few_shot"], "examples": {**spec, "streaming": False}}
    stream = open_training_data(spec, {**SETTINGS, "few_shot": few_shot}, training=False)
    assert all(len(sample["images"]) in (2, 3) for sample in stream)


def test_what_is_wrong_is_said_at_once():
    settings = {
        "augmentation": {"mirror": 1},
        "few_shot": {"shots": -1, "choose": "nearest", "number": 3},
        "value_range": [5, 1],
        "judge_after": 0,
    }
    assert {".".join(keys) for keys, _ in opening_errors(settings)} == {
        "augmentation",
        "few_shot.shots",
        "few_shot.choose",
        "few_shot.number",
        "value_range",
        "judge_after",
    }
    with pytest.raises(ValueError, match="mirror(.|\n)*judge_after"):
        open_training_data("data.json", settings)
    assert not opening_errors(SETTINGS)


def recipe_of(folder, **data):
    recipe = {
        "model": str(folder / "model"),
        "output": str(folder / "out"),
        "data": {"train": str(folder / "pictures"), "questions": ["w5 ?"], **data},
        "training_arguments": {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "logging_steps": 1},
        "stages": [{"name": "all", "max_steps": 7, "parts": {"projector": 1e-3}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_a_recipe_with_all_of_it(folder):
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    results = train_recipe(load_recipe(recipe_of(folder, **SETTINGS)))
    assert len([entry for entry in results[0].history if "loss" in entry]) == 7
    assert any("pictures" in warning and "4.png" in warning for warning in results[0].warnings)
    assert Image.open(next((folder / "out").rglob("augmentation.png"))).width == 7 * 164
    (report,) = (folder / "out").rglob("train_unreadable_pictures.jsonl")
    assert [json.loads(line)["picture"] for line in report.open()] == [str(folder / "pictures" / "w1" / "4.png")]


def test_errors_of_a_recipe_have_their_lines(folder):
    path = recipe_of(folder, few_shot={"shots": "two"}, augmentation={"hue": 0.5}, value_range=3)
    (folder / "model").mkdir()
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    for words in ("data.few_shot.shots", "hue is not known", "data.value_range"):
        assert words in str(error.value)
