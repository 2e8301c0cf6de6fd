"""What of a model is trained, and how fast: one table of parts, for recipes and for plain `Trainer` scripts."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from torch import nn
from transformers import Trainer, TrainerCallback

from .gradual_unfreezing import GradualUnfreezing, unfreezing_order
from .layer_groups import EMBEDDINGS, HEAD, LAYER, UNREAD, LayerGroup, layer_groups
from .part_settings import ADAPTERS, ALIASES, PartProblem, PartsError, PartSettings, read_settings
from .parts_of_model import ModelParts


@dataclass
class TrainedPart:
    """A part that is trained.

    Args:
        name: As in the model, such as `vision_tower`.
        settings: What was asked for.
        groups: Its layers from first to last, with the names (in the whole model) of the parameters that are trained in
            each. Groups without any are left out.
        scales: Of the rate, for each group: `layer_decay` to the power of its distance from the top.
        layers: How many layers it has.
        frozen: How many of its parameters are not trained.
    """

    name: str
    settings: PartSettings
    groups: list[LayerGroup]
    scales: list[float]
    layers: int
    frozen: int


@dataclass
class TrainedParts:
    """What `train_parts` set up.

    Args:
        model: As it was given, or what holds it, such as a `PeftModel`.
        parts: What is trained, in the model's order.
    """

    model: nn.Module
    parts: list[TrainedPart]
    _parameters: dict[str, nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self):
        self._parameters = dict(self.model.named_parameters())

    def parameter_groups(self, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups as torch's optimizers take them, and `AnyVlmTrainer(parameter_groups=…)`.

        Norms and biases are never decayed, by the rule of `Trainer`. Every trained parameter is in one group, tied weights
        once.

        Args:
            learning_rate: Of parts that do not say one.
            weight_decay: Of parts that do not say one.

        Returns:
            `{"params", "name", "lr", "weight_decay"}` each. The names are unique: the part's, the layer's where layers have
            rates of their own, and `no decay` where that is so.
        """
        # The rule is a method of `Trainer` that reads nothing of it.
        decayed = set(Trainer.get_decay_parameter_names(None, self.model))
        found: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            rate = learning_rate if part.settings.learning_rate is None else part.settings.learning_rate
            decay = weight_decay if part.settings.weight_decay is None else part.settings.weight_decay
            for group, scale in zip(part.groups, part.scales):
                own_rates = part.settings.layer_decay is not None and group.name
                name = f"{part.name}/{group.name}" if own_rates else part.name
                for parameter in group.parameters:
                    is_decayed = parameter in decayed
                    key = name if is_decayed else f"{name} (no decay)"
                    made = found.setdefault(
                        key, {"params": [], "name": key, "lr": rate * scale, "weight_decay": decay * is_decayed}
                    )
                    made["params"].append(self._parameters[parameter])
        return list(found.values())

    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer needs for gradual unfreezing; empty without it."""
        orders = {}
        for part in self.parts:
            if part.settings.unfreeze is not None:
                steps = unfreezing_order(part.groups, part.settings.unfreeze)
                orders[part.name] = [(at, [self._parameters[name] for name in names]) for at, names in steps]
        return [GradualUnfreezing(orders)] if orders else []

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(self._count(group.parameters) for part in self.parts for group in part.groups)

    def table(self, learning_rate: float | None = None) -> Table:
        """For people: part, what of it, parameters, rates.

        Args:
            learning_rate: Of parts that do not say one.
        """
        table = Table("part", "trained", "parameters", "learning rate", title="What is trained")
        for part in self.parts:
            trained = sum(self._count(group.parameters) for group in part.groups)
            rate = part.settings.learning_rate
            rate = learning_rate if rate is None else rate
            ends = [scale if rate is None else rate * scale for scale in (min(part.scales), max(part.scales))]
            shown = " to ".join(dict.fromkeys(f"{end:.2g}" for end in ends)) + (
                " × the trainer's" if rate is None else ""
            )
            count = f"{trained:,} of {trained + part.frozen:,}"
            table.add_row(part.name, part.settings.words(part.layers), count, shown)
        return table

    def _count(self, names: Sequence[str]) -> int:
        return sum(self._parameters[name].numel() for name in names)


def train_parts(model: nn.Module, parts: Mapping[str, Any]) -> TrainedParts:
    """Set `requires_grad` of every parameter: what is named is trained, everything else is frozen.

    Args:
        model: A composed model, or a `PeftModel` around one.
        parts: By name of a part (`vision_tower`, `multi_modal_projector` or `projector`, `language_model`, `fusion`,
            `image_newline`, or any module or parameter below them; the most exact name counts): a learning rate, which
            trains all of it; `"all"`, `"frozen"`, `"last 4 layers"` (with what comes after the layers: final norm, head),
            `"first 2 layers"` (with what comes before: embeddings), `"lora"`, `"bottleneck"` (the adapters alone); or a
            mapping of `PartSettings`. Adapters belong to the part that they are in.

    Returns:
        What is trained: groups for the optimizer, callbacks, and a table.

    Raises:
        PartsError: a `ValueError` that lists all that is wrong, with what would be right.
    """
    problems = check_parts(model, parts)
    if problems:
        raise PartsError(problems)
    inside = ModelParts(model)
    trained = [part for part in _resolve(inside, parts)[0] if part.groups]
    names = {name for part in trained for group in part.groups for name in group.parameters}
    for name, parameter in inside.parameters.items():
        parameter.requires_grad_(name in names)
    return TrainedParts(model, trained)


def check_parts(model: nn.Module, parts: Mapping[str, Any]) -> list[PartProblem]:
    """All that is wrong with a table of parts, each with its place in it. Changes nothing.

    Args:
        model: As for `train_parts`; may be on the meta device.
    """
    if not isinstance(parts, Mapping):
        return [PartProblem((), f"Parts are a mapping from names to rates or settings, but this is {parts!r}.")]
    trained, problems = _resolve(ModelParts(model), parts)
    if not problems and not any(part.groups for part in trained):
        problems.append(PartProblem((), "Nothing is trained. Name a part, such as multi_modal_projector: 1e-3."))
    return problems


def _resolve(inside: ModelParts, parts: Mapping[str, Any]) -> tuple[list[TrainedPart], list[PartProblem]]:
    problems: list[PartProblem] = []
    settings: dict[str, tuple[str, PartSettings]] = {}
    for given, value in parts.items():
        name = _full_name(inside, str(given))
        read, wrong = read_settings(str(given), value)
        problems += wrong
        if not inside.of(name):
            problems.append(PartProblem((str(given),), _unknown_part(inside, str(given), name)))
        elif name in settings:
            problems.append(PartProblem((str(given),), f"is the same part as {settings[name][0]}. Say it once."))
        else:
            settings[name] = (str(given), read)
    trained = []
    for name, (given, read) in settings.items():
        below = tuple(f"{other}." for other in settings if other.startswith(f"{name}."))
        own = [p for p in inside.of(name) if not f"{inside.name_within(p)}.".startswith(below or ("\0",))]
        part, message = _part(inside, name, read, own)
        if message:
            problems.append(PartProblem((given, *message[0]), message[1]))
        else:
            trained.append(part)
    order = {name: index for index, name in enumerate(inside.parameters)}
    trained.sort(key=lambda part: min((order[n] for group in part.groups for n in group.parameters), default=0))
    return trained, problems


def _full_name(inside: ModelParts, given: str) -> str:
    first, dot, rest = given.partition(".")
    return given if first in inside.names else f"{ALIASES.get(first, first)}{dot}{rest}"


def _unknown_part(inside: ModelParts, given: str, name: str) -> str:
    valid = f"This model's parts are {', '.join(inside.names)}."
    if inside.module(name) is not None:
        return f"has no parameters, so there is nothing to train. {valid}"
    likely = difflib.get_close_matches(given, [*inside.names, *ALIASES], 1)
    return f"is no part of this model. {valid}" + (f" Did you mean {likely[0]!r}?" if likely else "")


def _part(
    inside: ModelParts, name: str, settings: PartSettings, own: list[str]
) -> tuple[TrainedPart | None, tuple[tuple[str, ...], str] | None]:
    """A part with its groups; or where and why it cannot be so."""
    groups = [group for group in _groups(inside, name) if group.kind != UNREAD]
    chosen, message = _chosen(inside, name, settings, groups)
    if message:
        return None, message
    wanted = set(own) - inside.replaced
    if settings.train in ADAPTERS:
        wanted &= inside.adapters_of(settings.train)
        if not wanted:
            return None, (
                ("train",),
                "there are no such adapters in this part. Add them first (add_adapters), or train it all.",
            )
    if settings.train == "frozen":
        wanted = set()
    kept = [LayerGroup(g.name, g.kind, tuple(p for p in g.parameters if p in wanted), g.modules) for g in chosen]
    integers = [p for group in kept for p in group.parameters if not inside.parameters[p].is_floating_point()]
    if integers:
        return None, (("train",), f'{integers[0]} is quantised, so it cannot be trained. Train adapters: "lora".')
    # Rates fall from the highest group of the part that there is, trained or not, as in open_clip and timm.
    present = [group for group in groups if group.parameters]
    decay = settings.layer_decay or 1.0
    scales = {group.name: decay ** (len(present) - 1 - index) for index, group in enumerate(present)}
    kept = [group for group in kept if group.parameters]
    trained = {p for group in kept for p in group.parameters}
    frozen = sum(inside.parameters[p].numel() for p in own if p not in trained | inside.replaced)
    layers = sum(group.kind == LAYER for group in groups)
    return TrainedPart(name, settings, kept, [scales[group.name] for group in kept], layers, frozen), None


def _chosen(
    inside: ModelParts, name: str, settings: PartSettings, groups: list[LayerGroup]
) -> tuple[list[LayerGroup], tuple[tuple[str, ...], str] | None]:
    """The groups that the settings name, with the ends that belong to them; or what is wrong."""
    wanted = settings.which_layers()
    layers = [group for group in groups if group.kind == LAYER and group.name]
    if not layers and (wanted or settings.layers or settings.layer_decay):
        key = "train" if wanted else "layers" if settings.layers else "layer_decay"
        return [], (
            (key,),
            f"{name} has no layers that could be told apart. Train all of it at one rate, or freeze it.",
        )
    if wanted is None and settings.layers is None:
        return groups, None
    known = {f"{name}.{module}": group.name for group in layers for module in group.modules}
    unknown = [layer for layer in settings.layers or () if layer not in known]
    if unknown:
        return [], (("layers",), f"there is no {', '.join(unknown)} among the layers: {', '.join(known)}.")
    if wanted is None:
        chosen = {known[layer] for layer in settings.layers}
        return [group for group in layers if group.name in chosen], None
    which, number = wanted
    if number > len(layers):
        return [], (("train",), f'{name} has {len(layers)} layers, not {number}. Say "all" for all of them.')
    chosen = layers[-number:] if which == "last" else layers[:number]
    if settings.layers is not None and {known[layer] for layer in settings.layers} != {g.name for g in chosen}:
        names = [f"{name}.{module}" for group in chosen for module in group.modules]
        return [], (
            ("layers",),
            f"these are not the {settings.train}, which are {', '.join(names)}. Leave one of the two out.",
        )
    end = HEAD if which == "last" else EMBEDDINGS
    return [group for group in groups if group in chosen or group.kind == end], None


def _groups(inside: ModelParts, name: str) -> list[LayerGroup]:
    """The partition of a part, with the parameters' names in the whole model."""
    module = inside.module(name)
    if module is None:
        return [LayerGroup("", LAYER, tuple(inside.of(name)))]
    prefix = f"{inside.prefix}{name}."
    read = inside.inner.config.vision_feature_layer if name == "vision_tower" else None
    return [
        LayerGroup(g.name, g.kind, tuple(f"{prefix}{parameter}" for parameter in g.parameters), g.modules)
        for g in layer_groups(module, read)
    ]
