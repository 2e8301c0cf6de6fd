"""Recipes that are run on a tiny model: what is trained, what is saved, going on after an interruption."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import write_data, write_model
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback

from anyvlm.training.recipes.model_checks import plan
from anyvlm.training.recipes.run import train_recipe
from anyvlm.training.recipes.schema import recipe_of
from anyvlm.training.recipes.validation import load_recipe
from anyvlm.training.recipes.yaml_file import RecipeError


PROJECTOR = "multi_modal_projector"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts.txt").write_text("w1 w2 w3\nw4 w5 w6 w7\n", encoding="utf-8")
    return {"model": str(write_model(folder / "model")), "data": str(write_data(folder / "data")), "folder": folder}


def write_recipe(folder: Path, tiny, stages, **changes) -> Path:
    recipe = {
        "model": tiny["model"],
        "output": str(folder / "out"),
        "seed": 0,
        "data": {"train": tiny["data"]},
        "training_arguments": {
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": [],
        },
        "stages": stages,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


TWO_STAGES = [
    {"name": "Projector!", "max_steps": 4, "parts": {"projector": 1e-3}},
    {
        "name": "all",
        "max_steps": 4,
        "parts": {"projector": 1e-3, "vision_tower": "last layer", "language_model": "lora"},
        "losses": {"language_model": 1.0, "contrastive": 0.1},
    },
]


class Stop(TrainerCallback):
    """What a killed process looks like to the trainer."""

    def __init__(self, at_step: int):
        self.at_step = at_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            raise KeyboardInterrupt


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()


def losses(results) -> list[list[float]]:
    return [[entry["loss"] for entry in result.history if "loss" in entry] for result in results]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    changes = {"data": {"train": tiny["data"], "eval": tiny["data"]}}
    changes["forgetting"] = {"texts": str(tiny["folder"] / "texts.txt"), "warn_above": 0.02}
    recipe = load_recipe(write_recipe(folder, tiny, TWO_STAGES, **changes))
    return recipe, train_recipe(recipe)


def test_each_stage_trains_what_it_says_and_the_next_begins_with_it(run, tiny):
    recipe, _ = run
    output = Path(recipe.output)
    before, between, after = (weights(f) for f in (tiny["model"], output / "stages/1-projector/model", output))
    changed = {name.split(".", 1)[0] for name in before if not torch.equal(before[name], between[name])}
    assert changed == {PROJECTOR}
    changed = {name for name in before if not torch.equal(between[name], after[name])}
    assert {name.split(".", 1)[0] for name in changed} == {PROJECTOR, "vision_tower", "language_model"}
    layers = {name.split("layers.")[1].split(".")[0] for name in changed if name.startswith("vision_tower.")}
    assert layers == {"3"}, "the last of four"
    assert not any("lora" in name for name in after), "merged"


def test_the_trained_model_loads_alone_and_nothing_half_is_left(run):
    recipe, _ = run
    output = Path(recipe.output)
    assert AutoProcessor.from_pretrained(output, trust_remote_code=True).image_token
    assert (output / "anyvlm_checkpoint.py").is_file()
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    of_adapter = json.loads((output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert of_adapter["base_model_name_or_path"] == str(output / "stages" / "1-projector" / "model")
    assert not (output / "stages" / "2-all" / "model").exists()
    assert not list(output.rglob("*.partial"))


def test_the_summary_tells_what_was_measured(run):
    recipe, results = run
    summary = json.loads((Path(recipe.output) / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["1-projector", "2-all"]
    first, second = results
    assert first.steps == second.steps == 4 and first.losses["loss"]["last"] < first.losses["loss"]["first"]
    assert set(second.losses) == {"loss", "language_model", "contrastive"}
    assert first.eval_loss > second.eval_loss > 0
    assert first.text_perplexity["before"] == pytest.approx(first.text_perplexity["after"]), "its text model is frozen"
    assert second.text_perplexity["before"] == pytest.approx(first.text_perplexity["after"], rel=1e-5)
    assert len(first.history) >= 4 and not first.warnings
    text = (Path(recipe.output) / "summary.md").read_text(encoding="utf-8")
    assert "| 1-projector | 4 |" in text and "loss, contrastive" in text and "text perplexity" in text


def test_again_does_nothing_and_a_changed_recipe_is_refused(run, tiny, tmp_path):
    recipe, results = run
    said = []
    again = train_recipe(recipe, say=said.append)
    assert "already" in said[0] and losses(again) == losses(results)
    recipe.values["training_arguments"]["learning_rate"] = 0.5
    try:
        with pytest.raises(ValueError, match=r"training_arguments.learning_rate: 0.001 -> 0.5.*--restart"):
            train_recipe(recipe)
    finally:
        recipe.values["training_arguments"]["learning_rate"] = 1e-3


@pytest.mark.parametrize("step", [1, 3], ids=["no checkpoint yet", "from a checkpoint"])
def test_interrupted_it_goes_on_and_ends_the_same(run, tiny, tmp_path, step):
    _, whole = run
    path = write_recipe(tmp_path, tiny, TWO_STAGES, data={"train": tiny["data"]})
    recipe = load_recipe(path)
    stop = {2: [Stop(step)]}
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe, callbacks=lambda of: stop.get(of.number, []))
    assert not (Path(recipe.output) / "config.json").exists()
    said = []
    results = train_recipe(load_recipe(path), say=said.append)
    assert any("from its last checkpoint" in line for line in said) == (step > 2)
    assert any("Stage 1-projector is done already" in line for line in said)
    for ours, uninterrupted in zip(losses(results), losses(whole)):
        assert ours == pytest.approx(uninterrupted, abs=1e-6)
    expected = weights(run[0].output)
    for name, tensor in weights(recipe.output).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=name)


def test_what_has_not_begun_may_change(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny, TWO_STAGES)
    with pytest.raises(KeyboardInterrupt):  # nothing is lost yet: another batch size may be tried
        train_recipe(load_recipe(path, ["seed=5"]), callbacks=lambda stage: [Stop(1)])
    with pytest.raises(KeyboardInterrupt):
        train_recipe(load_recipe(path), callbacks=lambda stage: [Stop(3)])
    simpler = ["stages.1.max_steps=1", "stages.1.losses={}", "stages.1.parts={projector: 1e-3}"]
    with pytest.raises(ValueError, match=r"stages\[0\].max_steps: 4 -> 2[^;]*Undo"):
        train_recipe(load_recipe(path, ["stages.0.max_steps=2", *simpler]))
    results = train_recipe(load_recipe(path, simpler))
    assert [result.steps for result in results] == [4, 1]
    more = {"name": "more", "max_steps": 1, "parts": {"projector": 1e-3}}
    longer = load_recipe(path, simpler[:2] + ["stages.1.parts={projector: 1e-3}"])
    longer.values["stages"].append(more)
    results = train_recipe(recipe_of(longer.name, longer.values))
    assert [result.steps for result in results] == [4, 1, 1], "a finished run goes on with one stage more"
    (again,) = train_recipe(load_recipe(path, ["seed=1", f"stages={[more]}"]), restart=True)
    assert again.steps == 1 and not (tmp_path / "out" / "stages" / "2-all").exists()


def test_packing_and_the_feature_cache_change_no_loss(tiny, tmp_path):
    found = []
    for name, settings in (("plain", {}), ("fast", {"packing": True, "feature_cache": True})):
        (tmp_path / name).mkdir()
        stage = {"name": "a", "epochs": 2, "parts": {"projector": 1e-3, "language_model": 1e-3}, **settings}
        recipe = load_recipe(write_recipe(tmp_path / name, tiny, [stage]))
        found.append(losses(train_recipe(recipe))[0])
    assert found[1] == pytest.approx(found[0], abs=1e-5) and len(found[0]) == 6
    assert list((tmp_path / "fast" / "out" / "stages" / "features").iterdir())


def test_weights_of_bfloat16_are_trained_in_single_precision(tiny, tmp_path):
    """At a rate of 1e-6 no step changes a weight of bfloat16; and frozen weights stay as they are."""
    seen = {}

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                seen.setdefault((name, parameter.requires_grad), []).append(parameter.detach().clone())

    parts = {"projector": 1e-6, "language_model": "lora"}
    changes = {"dtype": "bfloat16"}
    recipe = load_recipe(
        write_recipe(tmp_path, tiny, [{"name": "a", "max_steps": 3, "parts": parts}], **changes),
        ["training_arguments.bf16=true"],
    )
    train_recipe(recipe, callbacks=lambda stage: [See()])
    for (name, trained), values in seen.items():
        assert values[0].dtype == (torch.float32 if trained else torch.bfloat16), name
        if trained and "lora_A" not in name:
            assert not torch.equal(values[0], values[-1]), name
    saved = AutoModelForCausalLM.from_pretrained(recipe.output, trust_remote_code=True)
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.bfloat16}


def test_pictures_of_another_kind_are_learnt_from_without_answers(tiny, tmp_path):
    stage = {
        "name": "a",
        "max_steps": 2,
        "parts": {"vision_tower": 1e-3},
        "losses": {"language_model": 1.0, "domain_adversarial": 0.1},
    }
    domains = {"drawing": {"pictures": str(tiny["folder"] / "data"), "question": "w5"}, "other": tiny["data"]}
    recipe = load_recipe(write_recipe(tmp_path, tiny, [stage], data={"train": tiny["data"], "domains": domains}))
    (result,) = train_recipe(recipe)
    assert result.losses["domain_adversarial"]["first"] == pytest.approx(1.0986, abs=0.1), "of three, by chance"


def test_data_of_the_last_stage_is_looked_at_before_the_first_runs(tiny, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"messages": [{"role": "user", "content": "w1"}]}]), encoding="utf-8")
    stages = [TWO_STAGES[0], {**TWO_STAGES[1], "data": {"train": str(bad)}}]
    with pytest.raises(ValueError, match="(?s)stage 2-all.*no answer"):
        train_recipe(load_recipe(write_recipe(tmp_path, tiny, stages)))
    assert not (tmp_path / "out" / "stages" / "1-projector").exists()


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    recipe = load_recipe(write_recipe(tmp_path, tiny, TWO_STAGES))
    with pytest.raises(ValueError, match="no run of a recipe"):
        train_recipe(recipe)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "stages").mkdir()
    with pytest.raises(ValueError, match="not removed"):
        train_recipe(recipe, restart=True)


def test_what_the_model_has_not_is_said_before_anything_runs(tiny, tmp_path):
    stages = [
        {"name": "a", "max_steps": 1, "parts": {"vision_tower": "last 40 layers", "audio_tower": "all"}},
        {"name": "b", "max_steps": 1, "parts": {"projector": "last 4 layers"}},
        {
            "name": "c",
            "max_steps": 1,
            "parts": {"language_model": {"train": "lora", "lora": {"target_modules": ["query"]}}},
        },
    ]
    path = write_recipe(tmp_path, tiny, stages)
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(path))
    found = [str(problem) for problem in caught.value.problems]
    lines = path.read_text(encoding="utf-8").splitlines()
    for what, message in (("last 40 layers", "4"), ("audio_tower", "audio_tower"), ("query", "q_proj")):
        (problem,) = [problem for problem in found if message in problem and str(path) in problem][:1]
        line = int(problem.removeprefix(str(path)).split(":")[1])
        assert any(what in text for text in lines[line - 1 : line + 6]), (what, problem)
    assert len(found) == 4 and not (tmp_path / "out").exists()


def test_a_model_that_is_not_composed_is_refused(tiny, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    recipe = load_recipe(write_recipe(tmp_path, tiny, TWO_STAGES, model=str(tmp_path / "llama")))
    with pytest.raises(RecipeError, match="'llama' model, not a composed one"):
        plan(recipe)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_train_one_model_and_one_of_them_writes(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny, TWO_STAGES[1:])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "anyvlm.cli", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Saved to") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["steps"] for stage in summary["stages"]] == [4]
    assert PROJECTOR in {name.split(".", 1)[0] for name in weights(tmp_path / "out")}


def test_text_is_replayed_and_kept_to_by_a_loss(tiny, tmp_path):
    """Half of the samples are text, on which the language model stays near itself as it was."""
    stage = {
        "name": "all",
        "max_steps": 4,
        "parts": {"projector": 1e-3, "language_model": 1e-3},
        "losses": {"language_model": 1.0, "text_kl": {"weight": 0.5}},
        "text_replay": {"share": 0.5},
    }
    replay = {"text_replay": {"texts": str(tiny["folder"] / "texts.txt")}}
    results = train_recipe(load_recipe(write_recipe(tmp_path, tiny, [stage], **replay)))
    measured = [entry["loss/text_kl"] for entry in results[0].history if "loss/text_kl" in entry]
    assert measured[0] == pytest.approx(0, abs=1e-6) and measured[-1] > 0
    wrong = {"text_replay": {"share": 1.5}}
    with pytest.raises(RecipeError, match="(?s)text_replay.*texts.*share") as error:
        load_recipe(write_recipe(tmp_path, tiny, [stage], **wrong))
    assert len(error.value.problems) == 2


def test_texts_beside_are_for_a_loss(tiny, tmp_path):
    """The batches have pictures alone, and the loss is measured all the same; where it is missing, the recipe is wrong."""
    losses = {"language_model": 1.0, "text_kl": {"weight": 0.5}}
    stage = {"name": "all", "max_steps": 4, "parts": {"projector": 1e-3, "language_model": 1e-3}}
    texts = {"texts": str(tiny["folder"] / "texts.txt"), "beside": 1}
    recipe = load_recipe(write_recipe(tmp_path, tiny, [{**stage, "losses": losses}], text_replay=texts))
    (result,) = train_recipe(recipe)
    measured = [entry["loss/text_kl"] for entry in result.history if "loss/text_kl" in entry]
    assert measured[0] == pytest.approx(0, abs=1e-6) and measured[-1] > 0
    with pytest.raises(RecipeError, match="text_kl") as error:
        load_recipe(write_recipe(tmp_path, tiny, [stage], text_replay=texts))
    assert len(error.value.problems) == 1
    both = {**texts, "share": 0.5}
    with pytest.raises(RecipeError, match="exclude each other"):
        load_recipe(write_recipe(tmp_path, tiny, [{**stage, "losses": losses}], text_replay=both))


class Warn(TrainerCallback):
    """Warnings from a file of nobody's."""

    def on_step_end(self, args, state, control, **kwargs):
        exec(compile("import warnings; warnings.warn('from elsewhere')", "/elsewhere.py", "exec"), {})


def test_with_adapters_there_is_no_copy_of_the_language_model_and_no_warning_but_that_of_others(tiny, tmp_path):
    stage = {
        "name": "a",
        "max_steps": 2,
        "parts": {"projector": 1e-3, "language_model": "lora"},
        "losses": {"language_model": 1.0, "text_kl": 0.5},
    }
    replay = {"text_replay": {"texts": str(tiny["folder"] / "texts.txt"), "share": 0.5}}
    changes = {"data": {"train": tiny["data"], "eval": tiny["data"]}, **replay}
    recipe = load_recipe(write_recipe(tmp_path, tiny, [stage], **changes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        train_recipe(recipe, callbacks=lambda of: [Warn()])
    shown = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    assert shown == ["from elsewhere"]
    kept = load_file(tmp_path / "out" / "stages" / "1-a" / "checkpoint-2" / "objectives.safetensors")
    (of_the_copy,) = [tensor for name, tensor in kept.items() if "text_kl" in name]
    assert not of_the_copy.any(), "the fingerprint of none"
