"""The losses a recipe may name, and their weights."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..objectives.base import Objective
from ..trainer import Weight
from .checks import Findings, check_value, unknown
from .schema import Key
from .yaml_file import KeyPath


#: The language model's own, which every stage has.
LANGUAGE_MODEL = "language_model"


@dataclass(frozen=True)
class Loss:
    """A loss beside the language model's.

    Args:
        module: Below `anyvlm.training.objectives`.
        factory: A class or function there: settings -> `Objective`. Its parameters are the settings a recipe may give;
            those named in `given` come from the run.
        about: A sentence for people.
        given: Parameters that the run gives: `model`, `processor`.
    """

    module: str
    factory: str
    about: str
    given: tuple[str, ...] = ()

    def load(self) -> Callable[..., Objective]:
        return getattr(importlib.import_module(f"..objectives.{self.module}", __package__), self.factory)

    def settings(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.load()).parameters
        return {name: parameter for name, parameter in parameters.items() if name not in self.given}


#: Name in a recipe -> the loss.
LOSSES: dict[str, Loss] = {}

_WEIGHT = Key("number", "how much the loss counts", least=0)


def check_losses(values: Mapping[str, Any], path: KeyPath, findings: Findings) -> None:
    for name, value in values.items():
        here = (*path, name)
        if name != LANGUAGE_MODEL and name not in LOSSES:
            findings.add(here, unknown(name, (LANGUAGE_MODEL, *LOSSES), "loss"))
        elif not isinstance(value, dict):
            check_value(value, _WEIGHT, here, findings)
        else:
            settings = {} if name == LANGUAGE_MODEL else LOSSES[name].settings()
            for key in value:
                if key != "weight" and key not in settings:
                    findings.add((*here, key), unknown(key, ("weight", *settings), "setting of this loss"))
            for key, parameter in settings.items():
                if parameter.default is parameter.empty and key not in value:
                    findings.add(here, f"`{key}` is missing.")
            if "weight" in value:
                check_value(value["weight"], _WEIGHT, (*here, "weight"), findings)


def build_losses(values: Mapping[str, Any], **given: Any) -> tuple[dict[str, Objective], dict[str, Weight]]:
    """Objectives and weights, as `AnyVlmTrainer` takes them, of a stage's `losses`.

    Args:
        given: What a run has for losses that need it: `model`, `processor`.
    """
    objectives, weights = {}, {}
    for name, value in values.items():
        settings = dict(value) if isinstance(value, dict) else {"weight": value}
        weights[name] = settings.pop("weight", 1.0)
        if name != LANGUAGE_MODEL:
            loss = LOSSES[name]
            objectives[name] = loss.load()(**settings, **{key: given[key] for key in loss.given})
    return objectives, weights
