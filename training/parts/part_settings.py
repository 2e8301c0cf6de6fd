"""What may be said about a part, read and checked."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


#: Other names of parts.
ALIASES = {"projector": "multi_modal_projector", "vision": "vision_tower", "text": "language_model"}
#: Values of `train` that mean adapters alone: PEFT's, those that are part of the model, or both.
ADAPTERS = ("lora", "dora", "bottleneck", "adapters")
_LAYERS = re.compile(r"(last|first)(?: (\d+))? layers?")
TRAIN = (
    '"all", "frozen", "last 4 layers", "first 2 layers" (any number), or "lora", "dora", "bottleneck" (adapters alone)'
)


class PartProblem(NamedTuple):
    """What is wrong in a table of parts.

    Args:
        place: Keys that lead to it, such as `("vision_tower", "train")`.
        message: What is wrong and what may stand there.
    """

    place: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(self.place)}: {self.message}" if self.place else self.message


class PartsError(ValueError):
    """Everything that is wrong with a table of parts.

    Args:
        problems: Each with its place.
    """

    def __init__(self, problems: list[PartProblem]):
        self.problems = problems
        head = "This cannot be trained so:" if len(problems) > 1 else "This cannot be trained so."
        super().__init__("\n".join([head, *(f"- {problem}" for problem in problems)]))


@dataclass(frozen=True)
class PartSettings:
    """Settings of one part.

    Args:
        train: `all`, `frozen`, `last 4 layers`, `first 2 layers`, or `lora`, `dora`, `bottleneck` for the
            adapters of that kind alone (`adapters`: of any).
        learning_rate: Default: the trainer's.
        layer_decay: The rate of each layer is that of the one above it, times this.
        weight_decay: Default: the trainer's.
        layers: Names of the layers to be trained, as in the model; must agree with `train` where that tells a number.
        unfreeze: See `GradualUnfreezing`: `{"from": 0.2, "to": 0.8}`, or fractions of the training `[0, 0.3, 0.6]`.
        lora, bottleneck: The adapters' settings, which are not read here.
    """

    train: str = "all"
    learning_rate: float | None = None
    layer_decay: float | None = None
    weight_decay: float | None = None
    layers: tuple[str, ...] | None = None
    unfreeze: Any = None
    lora: Any = None
    bottleneck: Any = None

    def words(self, num_layers: int) -> str:
        """What is trained, for people.

        Args:
            num_layers: How many layers the part has.
        """
        words = [f"{self.train} of {num_layers}" if self.which_layers() else self.train]
        if self.layers is not None and not self.which_layers():
            words.append(f"of {len(self.layers)} named layers")
        if self.layer_decay is not None:
            words.append(f"decay {self.layer_decay:g} a layer")
        if self.unfreeze is not None:
            words.append("unfrozen gradually")
        return ", ".join(words)

    def which_layers(self) -> tuple[str, int] | None:
        """`("last", 4)`, or `None` where all are meant."""
        match = _LAYERS.fullmatch(self.train)
        return (match[1], int(match[2] or 1)) if match else None


def read_settings(part: str, value: Any) -> tuple[PartSettings, list[PartProblem]]:
    """The settings of one part as they stand in a recipe, and all that is wrong with them.

    Args:
        value: A learning rate (which trains all), `train` alone, or a mapping of settings.
    """
    if isinstance(value, str) and _number(value) is None:
        value = {"train": value}
    elif not isinstance(value, Mapping):
        value = {"learning_rate": value}
    known = PartSettings.__dataclass_fields__
    problems, read = [], {}
    for key, given in value.items():
        if key not in known:
            likely = difflib.get_close_matches(str(key), known, 1)
            hint = f" Did you mean {likely[0]!r}?" if likely else ""
            problems.append(
                PartProblem((part, str(key)), f"is no setting of a part. Valid are {', '.join(known)}.{hint}")
            )
            continue
        reader = _READERS.get(key)
        try:
            read[key] = reader(given) if reader else given
        except ValueError as error:
            problems.append(PartProblem((part, key), str(error)))
    return PartSettings(**read), problems


def _number(value: Any) -> float | None:
    """YAML reads `1e-3` as text, so numbers may be text. Truth values are none."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is None or math.isfinite(number) else None


def _train(value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    match = _LAYERS.fullmatch(text)
    if text in ("all", "frozen", *ADAPTERS) or (match and match[2] != "0"):
        return text
    raise ValueError(f"{value!r} is not known. Say {TRAIN}.")


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError(
            f'{value!r} is no learning rate. Give a number above 0, such as 2e-5, or say train: "frozen".'
        )
    return number


def _layer_decay(value: Any) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"{value!r} is no layer-wise decay. Give a number above 0 and up to 1, such as 0.9.")
    return number


def _weight_decay(value: Any) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or number < 0:
        raise ValueError(f"{value!r} is no weight decay. Give a number from 0 on, such as 0.05.")
    return number


def _layers(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError(f"{value!r} is no list of names of layers, such as [vision_tower.encoder.layer.11].")


def _unfreeze(value: Any) -> tuple[float, float] | list[float] | None:
    """`(from, to)`, or a list of fractions."""
    if value is None:
        return None
    if isinstance(value, Mapping) and value.keys() <= {"from", "to"}:
        numbers = [_number(value.get("from", 0.0)), _number(value.get("to", 0.5))]
    elif isinstance(value, (list, tuple)) and value:
        numbers = [_number(one) for one in value]
    else:
        numbers = [None]
    if None in numbers or numbers != sorted(numbers) or numbers[0] < 0 or numbers[-1] >= 1:
        raise ValueError(
            f"{value!r} does not say when layers are unfrozen. Give {{from: 0.2, to: 0.8}}, or fractions of the training "
            "for the layers from the top down, such as [0, 0.3, 0.6]: rising, from 0 to below 1."
        )
    return (numbers[0], numbers[1]) if isinstance(value, Mapping) else numbers


_READERS = {
    "train": _train,
    "learning_rate": _rate,
    "layer_decay": _layer_decay,
    "weight_decay": _weight_decay,
    "layers": _layers,
    "unfreeze": _unfreeze,
}
