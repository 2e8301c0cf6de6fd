"""How weights of a native model are called here, and back: tables of rules, read in both directions."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CompositionError


#: `"ours"` for native -> ours, `"native"` for the way back.
OURS, NATIVE = "ours", "native"


@dataclass(frozen=True)
class Rename:
    """A key, or with a `.` at its end every key that begins so, under another name. `*` is one component of a name.

    `Rename("model.vision_tower.", "vision_tower.")`, `Rename("model.connector.layers.*.proj.", "…layers.*.linear.")`.
    """

    native: str
    ours: str


@dataclass(frozen=True)
class Rearrange:
    """Tensors that are not only called otherwise: as many native keys as go into as many of ours, and back.

    The functions take the tensors of one side in order and return those of the other. A `*` stands for the same
    component in every key, so that one rule does for all layers. Make it with `concatenated`, `transposed` or `reshaped`
    where they do.
    """

    native: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[..., Sequence[torch.Tensor]]
    to_native: Callable[..., Sequence[torch.Tensor]]


Rule = Rename | Rearrange


def concatenated(native: Sequence[str], ours: str, dim: int = 0, sizes: Sequence[int] | None = None) -> Rearrange:
    """Several native tensors, one after another along `dim`, are one of ours (q, k and v in one projection).

    Args:
        sizes: Their lengths along `dim`; equal ones if left out.
    """
    return Rearrange(
        tuple(native),
        (ours,),
        lambda *tensors: [torch.cat(tensors, dim)],
        lambda tensor: _split(tensor, len(native), dim, sizes),
    )


def separated(native: str, ours: Sequence[str], dim: int = 0, sizes: Sequence[int] | None = None) -> Rearrange:
    """One native tensor is several of ours, one after another along `dim`; the other way round of `concatenated`."""
    return Rearrange(
        (native,),
        tuple(ours),
        lambda tensor: _split(tensor, len(ours), dim, sizes),
        lambda *tensors: [torch.cat(tensors, dim)],
    )


def transposed(native: str, ours: str, dims: tuple[int, int] = (0, 1)) -> Rearrange:
    """The same numbers with two axes exchanged."""
    turn = lambda tensor: [tensor.transpose(*dims).contiguous()]  # noqa: E731
    return Rearrange((native,), (ours,), turn, turn)


def reshaped(native: str, ours: str, native_shape: Sequence[int], our_shape: Sequence[int]) -> Rearrange:
    """The same numbers in another shape; one length of each may be -1."""
    return Rearrange(
        (native,),
        (ours,),
        lambda tensor: [tensor.reshape(tuple(our_shape))],
        lambda tensor: [tensor.reshape(tuple(native_shape))],
    )


def _split(tensor: torch.Tensor, number: int, dim: int, sizes: Sequence[int] | None) -> list[torch.Tensor]:
    parts = tensor.split(list(sizes), dim) if sizes else tensor.chunk(number, dim)
    return [part.contiguous() for part in parts]


@dataclass(frozen=True)
class Step:
    """What makes some tensors of one side: from which keys of the other, and how (`None`: as it is)."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable[..., Sequence[torch.Tensor]] | None = None

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        taken = [tensors[key] for key in self.sources]
        return dict(zip(self.targets, taken if self.function is None else self.function(*taken)))


def plan(rules: Iterable[Rule], keys: Iterable[str], direction: str, partial: bool = False) -> list[Step]:
    """By which steps the tensors called `keys` become those of the other side. The first rule that knows a key counts.

    Args:
        direction: `OURS` or `NATIVE`, the side to make.
        partial: Leave out keys that no rule knows, and rearrangements some of whose keys are not there.

    Raises:
        CompositionError: keys that no rule knows, that lack what they go together with, or of which two would become
            one; the message names them.
    """
    compiled = [_Compiled.of(rule, direction) for rule in rules]
    steps: list[Step] = []
    groups: dict[Any, list] = {}
    unknown = []
    keys = list(keys)
    for key in keys:
        for number, rule in enumerate(compiled):
            found = rule.match(key)
            if found is None:
                continue
            position, stars, rest = found
            if rule.function is None:
                steps.append(Step((key,), (_fill(rule.targets[0], stars) + rest,)))
            else:
                groups.setdefault((number, stars), [None] * len(rule.sources))[position] = key
            break
        else:
            unknown.append(key)
    incomplete = []
    for (number, stars), sources in groups.items():
        rule = compiled[number]
        if None in sources:
            incomplete += [_fill(name, stars) for name, source in zip(rule.sources, sources) if source is None]
            continue
        steps.append(Step(tuple(sources), tuple(_fill(name, stars) for name in rule.targets), rule.function))
    targets = [target for step in steps for target in step.targets]
    twice = (
        sorted({target for target in targets if targets.count(target) > 1}) if len(set(targets)) < len(targets) else []
    )
    if not partial:
        for what, names in (
            ("are left over: no place is known for", unknown),
            ("are missing beside others that they go together with:", incomplete),
            ("would be written twice:", twice),
        ):
            if names:
                raise CompositionError(f"{len(names)} weights {what} {name_some(names)}.")
    return steps


def name_some(names: Iterable[str], most: int = 12) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class _Compiled:
    """A rule for one direction."""

    patterns: tuple[re.Pattern, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable | None

    @classmethod
    def of(cls, rule: Rule, direction: str) -> "_Compiled":
        if isinstance(rule, Rename):
            pair = ((rule.native,), (rule.ours,))
            sources, targets = pair if direction == OURS else pair[::-1]
            function = None
        elif direction == OURS:
            sources, targets, function = rule.native, rule.ours, rule.to_ours
        else:
            sources, targets, function = rule.ours, rule.native, rule.to_native
        patterns = tuple(
            re.compile(
                re.escape(source).replace(r"\*", r"([^.]+)")
                + ("(?P<rest>.*)" if _is_prefix(source) else "(?P<rest>)$")
            )
            for source in sources
        )
        return cls(patterns, sources, targets, function)

    def match(self, key: str) -> tuple[int, tuple[str, ...], str] | None:
        """Which of the rule's keys it is, what stands for its stars, and what follows a prefix."""
        for position, pattern in enumerate(self.patterns):
            found = pattern.match(key)
            if found:
                return position, found.groups()[:-1], found["rest"]
        return None


def _is_prefix(name: str) -> bool:
    return name == "" or name.endswith(".")


def _fill(name: str, stars: Sequence[str]) -> str:
    for star in stars:
        name = name.replace("*", star, 1)
    return name
