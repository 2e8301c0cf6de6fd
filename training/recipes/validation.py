"""Is a recipe right? Everything that is wrong is said at once, before anything runs."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from ..objectives.registry import OBJECTIVES, check_losses
from .arguments import check_training_arguments, training_arguments
from .checks import Findings, check_mapping, check_value, unknown
from .data_checks import check_stage_data
from .domain_data import with_domains
from .schema import (
    BOTTLENECK,
    FEATURE_CACHE,
    FORGETTING,
    LOSS_MIXING,
    PART,
    PART_ALIASES,
    PARTS,
    RECIPE,
    STAGE,
    TEXT_REPLAY,
    Key,
    Recipe,
    recipe_of,
    settings_of_part,
)
from .yaml_file import KeyPath, RecipeError, YamlFile, read_yaml


#: The loss that every stage has.
LANGUAGE_MODEL = "language_model"


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all that can be known without its model (`check_with_model` checks the rest).

    Args:
        overrides: Values to set first: `"stages.0.epochs=2"`.

    Raises:
        RecipeError: with everything that is wrong, each with its place.
        OSError: the file cannot be read.
    """
    file = read_yaml(path)
    for assignment in overrides:
        file.override(assignment)
    _last_length_counts(file, overrides)
    return validate(file)


def _last_length_counts(file: YamlFile, overrides: Sequence[str]) -> None:
    """A length from the command line takes the place of the recipe's, whichever of the two it is written in."""
    for assignment in overrides:
        *path, key = assignment.partition("=")[0].split(".")
        other = {"epochs": "max_steps", "max_steps": "epochs"}.get(key)
        if len(path) == 2 and path[0] == "stages" and other and not any(f"{other}=" in each for each in overrides):
            file.values["stages"][int(path[1])].pop(other, None)


def validate(file: YamlFile) -> Recipe:
    """As `load_recipe`, of a file that was read."""
    findings = Findings(file)
    values = file.values
    if check_mapping(values, RECIPE, (), findings):
        _check_model(values, findings)
        for key, check in _SECTIONS.items():
            if isinstance(values.get(key), dict):
                check(values[key], (key,), findings)
        if isinstance(values.get("stages"), list):
            _check_stages(values, findings)
        _check_places(values, findings)
    if findings.problems:
        raise RecipeError(findings.problems)
    recipe = recipe_of(file.name, values)
    recipe.file = file
    _check_made_arguments(recipe, findings)
    if findings.problems:
        raise RecipeError(findings.problems)
    return recipe


def _check_model(values: dict[str, Any], findings: Findings) -> None:
    given = [key for key in ("model", "compose") if values.get(key)]
    if len(given) != 1 and not {("model",), ("compose",)} & findings.meant:
        message = "is missing" if not given else "and `compose` exclude each other"
        findings.add(
            ("model",) if given else (), f"`model` {message}: give a checkpoint, or what to compose one from."
        )
    model = values.get("model")
    if isinstance(model, str) and not Path(model).exists() and (" " in model or model.startswith((".", "/", "~"))):
        findings.add(("model",), f"there is no folder {model!r}; write a checkpoint's folder or a Hub id.")
    if isinstance(values.get("compose"), dict):
        from anyvlm.composition.compose import compose

        known = inspect.signature(compose).parameters
        for key in values["compose"]:
            if key in ("seed", "trust_remote_code", "dtype"):
                findings.add(("compose", key), f"the recipe's own `{key}` says it.")
            elif key not in known:
                findings.add(("compose", key), unknown(key, known, "argument of anyvlm.compose"))
        for key in ("vision", "text"):
            if not values["compose"].get(key):
                findings.add(("compose",), f"`{key}` is missing: a Hub id or a folder.")


def _check_stages(values: dict[str, Any], findings: Findings) -> None:
    if not values["stages"]:
        findings.add(("stages",), "there is no stage; write at least one, with `name`, `epochs` and `parts`.")
    _check_texts_beside(values, findings)
    for index, stage in enumerate(values["stages"]):
        path: KeyPath = ("stages", index)
        if not check_mapping(stage, STAGE, path, findings):
            continue
        for key, check in _SECTIONS.items():
            if isinstance(stage.get(key), dict):
                check(stage[key], (*path, key), findings)
        lengths = [key for key in ("epochs", "max_steps") if stage.get(key) is not None]
        if len(lengths) != 1 and not {(*path, "epochs"), (*path, "max_steps")} & findings.meant:
            message = "exclude each other; keep one" if lengths else "are both missing; write one"
            findings.add(path, f"`epochs` and `max_steps` {message}.")
        if isinstance(stage.get("parts"), dict):
            arguments = {**_mapping(values, "training_arguments"), **_mapping(stage, "training_arguments")}
            _check_parts(stage["parts"], (*path, "parts"), findings, "learning_rate" in arguments)
            _check_feature_cache(values, stage, (*path, "feature_cache"), findings)
        if isinstance(stage.get("losses"), dict):
            data = {**_mapping(values, "data"), **_mapping(stage, "data")}
            _check_losses(with_domains(stage["losses"], data), (*path, "losses"), findings)
        _check_loss_mixing(stage, (*path, "loss_mixing"), findings)
        check_stage_data(values, index, findings)
        _check_evaluation(values, index, findings)
        arguments = {**_mapping(values, "training_arguments"), **_mapping(stage, "training_arguments")}
        half = values.get("dtype") in ("bfloat16", "float16")
        if half and not (arguments.get("bf16") or arguments.get("fp16")):
            message = "needs bf16: true (or fp16) in the training arguments: then what is trained is kept in float32."
            findings.add(("dtype",), f"{values['dtype']} {message} Without, small steps are lost. Or write float32.")


def _check_feature_cache(values: dict[str, Any], stage: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    if isinstance(stage.get("feature_cache"), dict):
        check_mapping(stage["feature_cache"], FEATURE_CACHE, path, findings)
    holders = ((stage, (*path[:-1], "data")), (values, ("data",)))
    for holder, where in holders:
        if stage.get("feature_cache") and _mapping(holder, "data").get("augmentation"):
            message = (
                "changed pictures are others in each epoch, and their features cannot be kept; leave this out, or"
            )
            findings.add((*where, "augmentation"), f"{message} `feature_cache` of the stage.")
    if stage.get("feature_cache") and "semi_supervised" in _mapping(stage, "losses"):
        findings.add(
            path, "semi_supervised learns from changed pictures, whose features cannot be kept; leave one out."
        )
    trained = [
        name
        for name, written in stage["parts"].items()
        if name.split(".", 1)[0] in ("vision_tower", "vision") and settings_of_part(written).get("train") != "frozen"
    ]
    if stage.get("feature_cache") and trained:
        findings.add(
            path, f"{trained[0]} is trained in this stage, so what it gives changes and cannot be kept; leave one out."
        )


def _check_losses(losses: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    for name, setting in losses.items():
        if name != LANGUAGE_MODEL and name not in OBJECTIVES:
            findings.add((*path, name), unknown(name, (LANGUAGE_MODEL, *OBJECTIVES), "loss"))
            continue
        for problem in check_losses({name: setting}):
            where, _, message = problem.partition(": ")
            findings.add((*path, *where.split(".")[1:]), message)


def _check_loss_mixing(stage: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    settings = stage.get("loss_mixing")
    losses = list(_mapping(stage, "losses"))
    if settings and len(losses) < 2:
        findings.add(path, "there is only one loss, and nothing to mix; write `losses` too.")
    if isinstance(settings, dict) and check_mapping(settings, LOSS_MIXING, path, findings):
        for index, name in enumerate(settings.get("names") or []):
            if name not in losses:
                findings.add((*path, "names", index), unknown(name, losses, "loss in this stage"))


def _check_evaluation(values: dict[str, Any], index: int, findings: Findings) -> None:
    """Evaluating needs something to evaluate on."""
    path: KeyPath = ("stages", index, "training_arguments")
    stage = values["stages"][index]
    for holder, here in ((stage, path), (values, ("training_arguments",))):
        strategy = (holder.get("training_arguments") or {}).get("eval_strategy")
        if strategy is None:
            continue
        if strategy != "no" and not any((place.get("data") or {}).get("eval") for place in (stage, values)):
            findings.add((*here, "eval_strategy"), "there is nothing to evaluate on; write `eval` in `data` too.")
        return


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    return values[key] if isinstance(values.get(key), dict) else {}


def _check_parts(parts: dict[str, Any], path: KeyPath, findings: Findings, has_rate: bool) -> None:
    if not parts:
        findings.add(path, f"nothing is trained; write one of {', '.join((*PART_ALIASES, *PARTS))}.")
    for name, written in parts.items():
        here = (*path, name)
        if name.split(".", 1)[0] not in (*PARTS, *PART_ALIASES):
            findings.add(here, unknown(name, (*PART_ALIASES, *PARTS), "part"))
        if isinstance(written, (bool, list)):
            findings.add(here, f"write `{name}: all`, a learning rate, or keys with values below it.")
            continue
        settings = settings_of_part(written)
        if isinstance(written, dict):
            check_mapping(settings, PART, here, findings)
            _check_bottleneck(settings, here, findings)
        elif "learning_rate" in settings:
            check_value(settings["learning_rate"], PART["learning_rate"], here, findings)
        if not has_rate and settings.get("learning_rate") is None and settings.get("train") != "frozen":
            findings.add(
                here, "`learning_rate` is missing, here and in `training_arguments` (transformers would take 5e-5)."
            )


def _check_bottleneck(settings: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    own = settings.get("bottleneck")
    if own is not None and settings.get("train") != "bottleneck":
        findings.add(
            (*path, "bottleneck"), "these settings are for `train: bottleneck`; write that, or leave them out."
        )
    elif isinstance(own, dict) and check_mapping(own, BOTTLENECK, (*path, "bottleneck"), findings):
        activation = own.get("activation")
        if isinstance(activation, str) and activation not in ACT2FN:
            findings.add((*path, "bottleneck", "activation"), unknown(activation, ACT2FN, "activation"))


def _check_forgetting(values: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    # A stage may give some of the keys only.
    keys = FORGETTING if path == ("forgetting",) else {**FORGETTING, "texts": Key("text or list", "held-out texts")}
    check_mapping(values, keys, path, findings)


def _check_text_replay(values: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    keys = TEXT_REPLAY if path == ("text_replay",) else {**TEXT_REPLAY, "texts": Key("text or list", "texts")}
    check_mapping(values, keys, path, findings)
    if "share" in values and "beside" in values:
        findings.add((*path, "beside"), "`share` and `beside` exclude each other; keep one.")


def _check_texts_beside(values: dict[str, Any], findings: Findings) -> None:
    """Nothing but one loss reads texts beside samples."""
    stages = [stage for stage in values["stages"] if isinstance(stage, dict)]
    places = [(values, (), stages), *((stage, ("stages", index), [stage]) for index, stage in enumerate(stages))]
    for holder, path, concerned in places:
        if _mapping(holder, "text_replay").get("beside") and not any(
            "text_kl" in _mapping(stage, "losses") for stage in concerned
        ):
            findings.add((*path, "text_replay", "beside"), "it is for the loss `text_kl`; write that too, or `share`.")


_SECTIONS = {
    "training_arguments": check_training_arguments,
    "forgetting": _check_forgetting,
    "text_replay": _check_text_replay,
}


def _check_places(values: dict[str, Any], findings: Findings) -> None:
    """Folders and files."""
    output = values.get("output")
    if isinstance(output, str) and output:
        if Path(output).exists() and not Path(output).is_dir():
            findings.add(("output",), f"{output} is a file; write a folder.")
        if isinstance(values.get("model"), str) and Path(output).resolve() == Path(values["model"]).resolve():
            findings.add(("output",), "this is the model that is read; write another folder.")


def _check_made_arguments(recipe: Recipe, findings: Findings) -> None:
    """What transformers says of each stage's arguments together."""
    for stage in recipe.stages:
        try:
            training_arguments(stage.training_arguments, recipe.output, recipe.seed)
        except (ValueError, ImportError) as error:
            of_stage = ("stages", stage.number - 1, "training_arguments")
            own = _mapping(recipe.values["stages"][stage.number - 1], "training_arguments")
            message = " ".join(str(error).split())
            # At the key that the message names, if it names one.
            named = [(*of_stage, key) for key in own if key in message]
            named += [
                ("training_arguments", key) for key in stage.training_arguments if key in message and key not in own
            ]
            findings.add(named[0] if named else of_stage if own else ("training_arguments",), message)
