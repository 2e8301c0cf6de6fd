"""Objectives by name, for recipes."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from .base import Objective
from .weights import Weight, loss_weight


#: Name in a recipe -> module beside this one (with a point before it: one further up) and class.
#: The settings are the arguments of the class.
OBJECTIVES: dict[str, tuple[str, str]] = {
    "contrastive": ("contrastive", "ContrastiveObjective"),
    "matching": ("matching", "MatchingObjective"),
    "feature_distillation": ("feature_distillation", "FeatureDistillationObjective"),
    "domain_adversarial": ("domain_adversarial", "DomainAdversarialObjective"),
    "text_kl": ("text_kl", "TextKLObjective"),
    "semi_supervised": (".semi_supervised", "SemiSupervisedObjective"),
}

_OF_THE_WEIGHT = ("weight", "schedule")


def objective_class(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"There is no loss {name!r}. Choose among language_model, {', '.join(OBJECTIVES)}.")
    module, class_name = OBJECTIVES[name]
    return getattr(import_module(f".{module}", __package__), class_name)


def objective_settings(name: str) -> dict[str, Any]:
    """What can be set for an objective, with its default (`inspect.Parameter.empty` where it must be given), beside
    `weight` and `schedule`."""
    return objective_class(name).settings()


def check_losses(losses: Mapping[str, float | Mapping[str, Any]]) -> list[str]:
    """Everything that is wrong in what a recipe says of its losses, one line each; empty if all is well."""
    problems = []
    for name, setting in losses.items():
        if name != "language_model" and name not in OBJECTIVES:
            problems.append(
                f"losses: there is no loss {name!r}. Choose among language_model, {', '.join(OBJECTIVES)}."
            )
            continue
        weight, settings = _split(setting)
        try:
            loss_weight(weight)
        except ValueError as error:
            problems += [f"losses.{name}: {line}" for line in str(error).splitlines()]
        if name == "language_model":
            if settings:
                problems.append(f"losses.language_model: has weight and schedule, not {', '.join(sorted(settings))}.")
            continue
        known = objective_settings(name)
        for key in sorted(settings.keys() - known.keys()):
            choices = ", ".join([*_OF_THE_WEIGHT, *known])
            problems.append(f"losses.{name}: there is no setting {key!r}. Choose among {choices}.")
        missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in settings]
        problems += [f"losses.{name}: {key} is missing." for key in missing]
        problems += [
            f"losses.{name}.{key}: {message}" for key, message in objective_class(name).settings_errors(settings)
        ]
    return problems


def build_losses(
    losses: Mapping[str, float | Mapping[str, Any]], model: nn.Module, processor: ProcessorMixin | None = None
) -> tuple[dict[str, Objective], dict[str, Weight]]:
    """`objectives` and `loss_weights` for `AnyVlmTrainer`.

    Args:
        losses: Name -> a weight, or its settings with `weight` and `schedule` among them:
            `{"language_model": 1.0, "contrastive": {"weight": 0.5, "schedule": "warmup", "embedding_size": 256}}`.
        model: That is to be trained, with what is trained in it chosen.
        processor: Its processor, for those that need one.

    Raises:
        ValueError: all that is wrong, in one error.
    """
    problems = check_losses(losses)
    if problems:
        raise ValueError("\n".join(problems))
    objectives, weights = {}, {}
    for name, setting in losses.items():
        weight, settings = _split(setting)
        weights[name] = loss_weight(weight)
        if name != "language_model":
            objectives[name] = objective_class(name).from_settings(model, settings, processor)
    return objectives, weights


def try_losses(losses: Mapping[str, float | Mapping[str, Any]], model: nn.Module, processor: ProcessorMixin) -> None:
    """Whether the losses suit a model and its processor, as far as is known before it is trained.

    Raises:
        ValueError: one does not.
    """
    for name, setting in losses.items():
        if name != "language_model":
            objective_class(name).try_settings(model, processor, _split(setting)[1])


def _split(setting: float | Mapping[str, Any]) -> tuple[float | dict[str, Any], dict[str, Any]]:
    """What is said of the weight, and the rest."""
    if not isinstance(setting, Mapping):
        return setting, {}
    weight = {key: value for key, value in setting.items() if key in _OF_THE_WEIGHT}
    return weight, {key: value for key, value in setting.items() if key not in _OF_THE_WEIGHT}
