"""Recipes that are wrong: everything is said at once, each with its line, and with what to write instead."""

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from anyvlm.training.objectives.registry import OBJECTIVES
from anyvlm.training.recipes import schema
from anyvlm.training.recipes.schema import PART_ALIASES
from anyvlm.training.recipes.validation import load_recipe, validate
from anyvlm.training.recipes.yaml_file import RecipeError, parse_yaml, read_yaml


RIGHT = """\
model: a/model
output: OUTPUT
seed: 3
data: {train: some/data}
training_arguments:
  learning_rate: 1e-3
  per_device_train_batch_size: 2
  use_cpu: true
stages:
  - name: projector
    epochs: 1
    parts:
      projector: 1e-3
  - name: all
    max_steps: 5
    training_arguments: {learning_rate: 2e-5}
    parts:
      projector:
      vision_tower: last 4 layers
      language_model:
        train: lora
        learning_rate: 2e-4
    losses:
      language_model: 1.0
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=RIGHT, **replaced):
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace("OUTPUT", str(tmp_path / "out")), encoding="utf-8")
        return path

    return write


def problems(path, *overrides) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(problem).removeprefix(str(path)) for problem in caught.value.problems]


def test_a_right_recipe_is_read(recipe_file):
    recipe = load_recipe(recipe_file())
    first, second = recipe.stages
    assert (recipe.model, recipe.seed, first.folder, second.folder) == ("a/model", 3, "1-projector", "2-all")
    assert first.parts == {"projector": {"learning_rate": 1e-3}} and first.losses == {"language_model": 1.0}
    assert second.parts["vision_tower"] == {"train": "last 4 layers"} and second.parts["projector"] == {}
    assert first.training_arguments["learning_rate"] == 1e-3
    assert second.training_arguments == {
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }


def test_numbers_are_numbers_in_every_spelling():
    written = ["1e-3", "2E5", "1.5e-5", ".5e1", "0.1", "-3e+2", "7"]
    read = parse_yaml(f"[{', '.join(written)}]", "x").values
    assert read == [float(text) for text in written]
    assert parse_yaml("[e5, 1e, 3-4, v1e3]", "x").values == ["e5", "1e", "3-4", "v1e3"]


@pytest.mark.parametrize("text", [RIGHT, "a: &x {b: 1}\nc: {<<: *x, d: 2}\n", "# nothing\na: [1, {b: [2, 3]}]\n"])
def test_values_are_those_of_pyyaml(text):
    text = text.replace("e-", "0.0e-")  # its numbers need a point
    assert parse_yaml(text, "x").values == yaml.safe_load(text)


def test_every_value_has_its_line(recipe_file):
    path = recipe_file()
    file = read_yaml(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    for keys, (line, column) in file.places.items():
        if keys and isinstance(keys[-1], str):
            assert lines[line - 1][column - 1 :].startswith(f"{keys[-1]}:")


ONE_MISTAKE = [
    ("seed: 3", "sed: 3", ":3:1: sed: ", "`seed`"),
    ("seed: 3", "seed: -1", ":3:1: seed: ", "at least 0"),
    ("seed: 3", "seed: three", ":3:1: seed: ", "a whole number"),
    ("seed: 3", "seed: 3\nseed: 4", ":4:1: ", "twice"),
    ("model: a/model", "", ":1:1: ", "`model` is missing"),
    ("model: a/model", "model: OUTPUT", ":2:1: output: ", "another folder"),
    ("model: a/model", "compose: {vision: a, txt: b, text: c}", ":1:22: compose.txt: ", "`text`"),
    ("learning_rate: 1e-3", "learning_rat: 1e-3", ":6:3: training_arguments.learning_rat: ", "`learning_rate`"),
    ("learning_rate: 1e-3", "learning_rate: fast", ":6:3: training_arguments.learning_rate: ", "a number"),
    ("learning_rate: 1e-3", "lr_scheduler_type: cosin", ":6:3: training_arguments.lr_scheduler", "`cosine`"),
    ("learning_rate: 1e-3", "label_smoothing_factor: 0.1", ":6:3: ", "labels"),
    ("learning_rate: 1e-3", "num_train_epochs: 3", ":6:3: ", "`epochs` in each stage"),
    ("learning_rate: 1e-3", "eval_strategy: steps", ":6:3: training_arguments.eval_strategy: ", "`eval`"),
    ("    epochs: 1\n", "", ":10:5: stages[0]: ", "both missing"),
    ("    epochs: 1\n", "    epochs: 1\n    max_steps: 3\n", ":10:5: stages[0]: ", "exclude each other"),
    ("epochs: 1", "epochs: 0", ":11:5: stages[0].epochs: ", "more than 0"),
    ("- name: projector", "- nam: projector", ":10:5: stages[0].nam: ", "`name`"),
    ("      projector: 1e-3", "      projektor: 1e-3", ":13:7: stages[0].parts.projektor: ", "`projector`"),
    ("train: lora", "trian: lora", ":21:9: stages[1].parts.language_model.trian: ", "`train`"),
    ("language_model: 1.0", "language_mode: 1.0", ":24:7: stages[1].losses.language_mode: ", "`language_model`"),
    ("language_model: 1.0", "language_model: -1", ":24:7: stages[1].losses.language_model: ", "at least 0"),
    ("data: {train: some/data}", "", "stages[1]: ", "no `data`"),
    ("{train: some/data}", "{train: YOUR DATA}", ":4:8: data.train: ", "where your data is"),
    ("model: a/model", "model: PATH OF THE MODEL", ":1:1: model: ", "no folder"),
    ("{train: some/data}", "{trian: some/data}", ":4:8: data.trian: ", "`train`"),
    ("{train: some/data}", "{train: absent.json}", ":4:8: data.train: ", "no file"),
    ("{train: some/data}", "{train: some/data, image: x}", ":4:26: data.image: ", "images"),
    ("{train: some/data}", "{train: [{path: a/b, shar: 1}]}", ":4:28: data.train[0].shar: ", "share"),
    ("{train: some/data}", "{train: {path: a/b, max_samples: x}}", ":4:27: data.train.max_samples: ", "number"),
    ("max_steps: 5", "max_steps: 5\n    data: {eval: absent.json}", "stages[1].data.eval: ", "no file"),
    ("epochs: 1", "epochs: 1\n    loss_mixing: true", ":12:5: stages[0].loss_mixing: ", "only one loss"),
    ("max_steps: 5", "max_steps: 5\n    feature_cache: true", ".feature_cache: ", "vision_tower is trained"),
    ("epochs: 1", "epochs: 1\n    feature_cache: true\n    data: {augmentation: true}", ".augmentation: ", "features"),
    ("language_model: 1.0", "matching: {weigth: 1}", ":24:7: stages[1].losses.matching: ", "weight"),
    ("language_model: 1.0", "contrastive: {weight: 1, schedule: rmp}", ":24:7: stages[1].losses.contr", "ramp"),
    ("{train: some/data}", "{train: some/data, domains: {b: {pictures: none}}}", "domains.b.pictures: ", "no folder"),
    ("{train: some/data}", "{train: some/data, domains: {b: a/b}}", ":4:26: data.domains: ", "domain_adversarial"),
    ("{train: some/data}", "{train: some/data, streaming: true}", ":11:5: stages[0].epochs: ", "`max_steps`"),
    ("seed: 3", "dtype: bfloat16", ":3:1: dtype: ", "bf16: true"),
    ("seed: 3", "seed: [3", ":4:5: ", "not YAML"),
]


@pytest.mark.parametrize(
    "right, wrong, where, what", ONE_MISTAKE, ids=[mistake[1].strip() or "-" + mistake[0] for mistake in ONE_MISTAKE]
)
def test_a_mistake_has_its_line_and_what_to_write(recipe_file, right, wrong, where, what):
    assert right in RIGHT
    found = problems(recipe_file(RIGHT.replace(right, wrong, 1)))
    assert any(where in problem and what in problem for problem in found), found


def test_all_mistakes_are_said_at_once_in_the_order_of_the_file(recipe_file):
    text = RIGHT.replace("seed", "sed").replace("epochs: 1", "epochs: many").replace("train: lora", "train: 3")
    found = problems(recipe_file(text))
    assert [problem.split(":")[1] for problem in found] == ["3", "11", "21"]


def test_a_misspelt_key_is_not_missing_too(recipe_file):
    text = RIGHT.replace("output", "outptu").replace("model: a", "modl: a").replace("epochs", "epoch")
    found = problems(recipe_file(text))
    assert len(found) == 3 and all("did you mean" in problem for problem in found)


def test_values_from_the_command_line(recipe_file):
    recipe = load_recipe(recipe_file(), ["stages.0.epochs=2", "training_arguments.bf16=false", "seed=7"])
    assert recipe.stages[0].epochs == 2 and recipe.seed == 7 and recipe.stages[1].training_arguments["bf16"] is False
    (problem,) = problems(recipe_file(), "stages.0.epochs=no")
    assert problem.startswith("--set stages.0.epochs=no: ") and "a number" in problem
    for wrong in ("stages.5.epochs=2", "stges.0.epochs=2", "stages.0.epochs", "seed.x=1"):
        assert problems(recipe_file(), wrong)[0].startswith(f"--set {wrong}: ")


def test_arguments_of_trainer_pass_through(recipe_file):
    """Every field that is not said elsewhere is taken with its own default."""
    from anyvlm.training.recipes.arguments import REFUSED, check_training_arguments
    from anyvlm.training.recipes.checks import Findings

    defaults = {
        name: value
        for name, value in TrainingArguments(output_dir="x", use_cpu=True).to_dict().items()
        if name not in REFUSED
    }
    findings = Findings(parse_yaml("{}", "x"))
    check_training_arguments(defaults, ("training_arguments",), findings)
    assert not findings.problems and len(defaults) > 80


def test_no_recipe_at_all_and_no_mapping():
    for text in ("", "- a", "text"):
        with pytest.raises(RecipeError):
            validate(parse_yaml(text, "x"))


def test_the_page_on_recipes_has_every_key_and_its_recipes_are_right(tmp_path):
    """A key that nobody can read of is one that nobody uses; and one that is read of works."""
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    keys = {*schema.RECIPE, *schema.STAGE, *schema.PART, *schema.FEATURE_CACHE, *schema.LOSS_MIXING, *PART_ALIASES}
    assert not [key for key in keys if not re.search(rf"\b{key}\b", page)]
    for name in OBJECTIVES:
        assert f"`{name}`" in page
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    whole = next(block for block in blocks if "stages:" in block)
    for name in ("train.json", "conversations.json", "text.jsonl", "held_out.json", "photos.json"):
        (tmp_path / name).write_text("[]", encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "drawings").mkdir()
    for block in blocks:
        values = {**parse_yaml(whole, "docs").values, "training_arguments": {"use_cpu": True}}
        part = parse_yaml(block.replace("data/", f"{tmp_path}/"), "docs").values
        values.update({key: value for key, value in part.items() if key != "losses"})
        values["output"] = str(tmp_path / "out")
        if "losses" in part:
            values["stages"][0]["losses"] = part["losses"]
        if "domains" in part.get("data", {}):
            for stage in values["stages"]:
                stage["losses"] = {"domain_adversarial": 0.1}
        if "data" not in part:
            values["data"] = {"train": str(tmp_path / "train.json")}
        assert validate(parse_yaml(json.dumps(values), "docs")).stages
