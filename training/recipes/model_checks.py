"""Does a recipe fit its model? What each stage trains, tried on the model without its weights."""

import copy
from dataclasses import dataclass, field

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ..parts.part_settings import PartsError
from .arguments import training_arguments
from .checks import Findings
from .run import load_model
from .run_folder import RunFolder
from .schema import PART_ALIASES, Recipe
from .stage_parts import prepare_parts
from .yaml_file import KeyPath, RecipeError


@dataclass
class Plan:
    """What a recipe will do.

    Args:
        tables: For each stage what is trained in it.
        loaded: The model and its processor, if they had to be composed to know this.
    """

    tables: list[Table] = field(default_factory=list)
    loaded: tuple[PreTrainedModel, ProcessorMixin] | None = None


def plan(recipe: Recipe) -> Plan:
    """Try each stage's parts on the model, built without memory (the meta device).

    Raises:
        RecipeError: with all parts, layers and targets that the model has not.
        OSError: the model is not there.
    """
    findings = Findings(recipe.file)
    made = Plan()
    config = _config(recipe, made)
    if config.model_type != AnyVlmConfig.model_type:
        findings.add(
            ("model",),
            f"{recipe.model} is a {config.model_type!r} model, not a composed one. Make one with anyvlm compose, or of a "
            "vision-language model of transformers with anyvlm convert; or write `compose` with `vision` and `text`.",
        )
        raise RecipeError(findings.problems)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    for index, stage in enumerate(recipe.stages):
        path: KeyPath = ("stages", index, "parts")
        try:
            adapted, trained = prepare_parts(copy.deepcopy(whole), stage.parts)
        except PartsError as error:
            for problem in error.problems:
                findings.add((*path, *_as_written(problem.place, stage.parts)), problem.message)
        except (ValueError, ImportError) as error:
            names = [name for name in stage.parts if str(error).startswith(PART_ALIASES.get(name, name))]
            findings.add((*path, *names[:1]), str(error))
        else:
            if isinstance(adapted, PreTrainedModel):
                whole = adapted  # bottleneck adapters stay, for the stages behind
            arguments = training_arguments(stage.training_arguments, recipe.output, recipe.seed)
            table = trained.table(arguments.learning_rate)
            number, unit = (stage.max_steps, "step") if stage.max_steps else (f"{stage.epochs:g}", "epoch")
            length = f"{number} {unit}{'' if float(number) == 1 else 's'}"
            table.title = f"{stage.folder}, {length}"
            table.caption = stage.why or None
            made.tables.append(table)
    if findings.problems:
        raise RecipeError(findings.problems)
    return made


def _config(recipe: Recipe, made: Plan) -> PreTrainedConfig:
    trust = {"trust_remote_code": recipe.trust_remote_code}
    if recipe.model is not None:
        return AutoConfig.from_pretrained(recipe.model, **trust)
    folder = RunFolder(recipe)
    for stage in recipe.stages:
        if (folder.model(stage) / "config.json").is_file():
            return AutoConfig.from_pretrained(folder.model(stage), **trust)
    made.loaded = load_model(recipe)
    return made.loaded[0].config


def _as_written(place: tuple[str, ...], parts: dict) -> tuple[str, ...]:
    """A part under the name that the recipe has for it."""
    if not place:
        return ()
    written = next((name for name in parts if PART_ALIASES.get(name, name) == place[0]), place[0])
    return (written, *place[1:])
