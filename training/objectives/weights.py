"""How much each loss counts: a number, a schedule over the training, or learned along."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


#: A weight, or one that depends on how far the training is (0 to 1).
Weight = float | Callable[[float], float]


def ramp(progress: float, slope: float = 10.0) -> float:
    """From 0 to almost 1, fast at first: the usual one of domain-adversarial training (Ganin et al. 2016, §5.2.2)."""
    return 2 / (1 + math.exp(-slope * progress)) - 1


def _between(settings: Mapping[str, float], progress: float, shape: Callable[[float], float]) -> float:
    begin, until = settings["begin"], settings["until"]
    share = min(max((progress - begin) / (until - begin), 0.0), 1.0)
    return settings["from"] + (settings["to"] - settings["from"]) * shape(share)


#: type -> its settings with their defaults, and the factor at a progress from 0 to 1.
_SCHEDULES: dict[str, tuple[dict[str, float], Callable[[Mapping[str, float], float], float]]] = {
    "constant": ({}, lambda settings, progress: 1.0),
    "linear": (
        {"from": 0.0, "to": 1.0, "begin": 0.0, "until": 1.0},
        lambda settings, progress: _between(settings, progress, lambda share: share),
    ),
    "cosine": (
        {"from": 1.0, "to": 0.0, "begin": 0.0, "until": 1.0},
        lambda settings, progress: _between(settings, progress, lambda share: (1 - math.cos(math.pi * share)) / 2),
    ),
    "warmup": (
        {"until": 0.1},
        lambda settings, progress: min(progress / settings["until"], 1.0),
    ),
    "ramp": ({"slope": 10.0}, lambda settings, progress: ramp(progress, settings["slope"])),
}

SCHEDULE_TYPES = tuple(_SCHEDULES)


def loss_weight(setting: float | Mapping[str, Any]) -> Weight:
    """A weight for `AnyVlmTrainer(loss_weights=…)` from what a recipe says.

    Args:
        setting: A number, or `{"weight": 0.5, "schedule": {"type": "linear", "from": 0, "to": 1, "until": 0.3}}`. The
            schedule's factor is multiplied by `weight` (default 1). A schedule may be its type alone (`"ramp"`). `begin` and
            `until` are shares of the training:

            | type | factor | settings |
            |---|---|---|
            | `constant` | 1 | |
            | `linear` | straight line | `from` 0, `to` 1, `begin` 0, `until` 1 |
            | `cosine` | half a cosine | `from` 1, `to` 0, `begin` 0, `until` 1 |
            | `warmup` | straight line from 0 to 1, then 1 | `until` 0.1 |
            | `ramp` | 2 / (1 + exp(-slope · progress)) - 1 | `slope` 10 |

    Raises:
        ValueError: everything in it that is wrong, in one error.
    """
    if _is_number(setting):
        problems = _problems_of_weight(setting)
        if problems:
            raise ValueError("\n".join(problems))
        return float(setting)
    if not isinstance(setting, Mapping):
        raise ValueError(f"A loss weight is a number, or a mapping with weight and schedule, not {setting!r}.")
    weight, schedule = setting.get("weight", 1.0), setting.get("schedule", "constant")
    unknown = setting.keys() - {"weight", "schedule"}
    problems = [f"A loss weight has weight and schedule, not {name}." for name in sorted(unknown)]
    problems += _problems_of_weight(weight)
    if not isinstance(schedule, Mapping):
        schedule = {"type": schedule}
    problems += _problems_of_schedule(schedule)
    if problems:
        raise ValueError("\n".join(problems))
    if schedule["type"] == "constant":
        return float(weight)
    return Scheduled(float(weight), schedule)


class Scheduled:
    """A weight that follows a schedule: `Scheduled(0.5, {"type": "ramp"})(0.1)`."""

    def __init__(self, weight: float, schedule: Mapping[str, Any]):
        defaults, self._factor = _SCHEDULES[schedule["type"]]
        self.weight, self.type = weight, schedule["type"]
        self.settings = {**defaults, **{name: value for name, value in schedule.items() if name != "type"}}

    def __call__(self, progress: float) -> float:
        return self.weight * self._factor(self.settings, progress)

    def __repr__(self) -> str:
        return f"{self.weight} × {self.type} {self.settings}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _problems_of_weight(weight: Any) -> list[str]:
    if not _is_number(weight) or not math.isfinite(weight) or weight < 0:
        return [f"A loss weight is a finite number of at least 0, not {weight!r}."]
    return []


def _problems_of_schedule(schedule: Mapping[str, Any]) -> list[str]:
    kind = schedule.get("type")
    if kind not in _SCHEDULES:
        return [f"There is no schedule {kind!r}. Choose one of {', '.join(SCHEDULE_TYPES)}."]
    defaults = _SCHEDULES[kind][0]
    takes = f"takes {', '.join(defaults)}" if defaults else "takes no settings"
    problems = [f"The schedule {kind} {takes}, not {name}." for name in sorted(schedule.keys() - {"type", *defaults})]
    settings = {**defaults, **{name: schedule[name] for name in defaults if name in schedule}}
    wrong = [name for name, value in settings.items() if not _is_number(value) or not math.isfinite(value)]
    problems += [f"{name} of the schedule {kind} is a number, not {settings[name]!r}." for name in wrong]
    if not wrong and "until" in settings and not 0 <= settings.get("begin", 0.0) < settings["until"] <= 1:
        problems.append(f"The schedule {kind} needs 0 <= begin < until <= 1: they are shares of the training.")
    if not wrong and min(settings.get("from", 0.0), settings.get("to", 0.0)) < 0:
        problems.append(f"from and to of the schedule {kind} are at least 0.")
    return problems


class UncertaintyMixing(nn.Module):
    """Learned weights: each loss L is counted as exp(-s) L + s/2, and s, the logarithm of its noise, is trained along
    (Kendall, Gal & Cipolla 2018, eq. 10, for cross-entropies). A loss that stays large counts less; s/2 keeps the weights
    from going to zero. At the beginning every factor is 1. Weights by number or schedule are multiplied on top.

    Args:
        names: Of the losses that are mixed, among `language_model` and the objectives.
        learning_rate: Of s. Default: the trainer's, which for a model that works already is often too small for s to move.
    """

    def __init__(self, names: list[str], learning_rate: float | None = None):
        super().__init__()
        self.learning_rate = learning_rate
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    @property
    def names(self) -> list[str]:
        return list(self.log_variances)

    def factor(self, name: str) -> torch.Tensor | float:
        """What the loss is multiplied by, with graph; 1 if it is not among those that are mixed."""
        return torch.exp(-self.log_variances[name]) if name in self.log_variances else 1.0

    def penalty(self, names: list[str]) -> torch.Tensor | float:
        """What these losses cost beside themselves, a scalar with graph."""
        return sum(self.log_variances[name] / 2 for name in names if name in self.log_variances)
