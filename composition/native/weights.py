"""Models built without memory for their weights, and weights put into them as they are."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ...modeling.language_models import base_language_model
from ...modeling.parts import _EmptyOnMeta
from ..errors import CompositionError
from .family import NativeFamily
from .keys import Rename, Rule, name_some, plan


Model = TypeVar("Model", bound=nn.Module)


def build_empty(build: Callable[[], Model]) -> Model:
    """What `build` makes, its weights on the meta device; what modules compute (rotary frequencies) has its values."""
    with _EmptyOnMeta(), torch.random.fork_rng(devices=[]):
        return build().eval()


def language_model_rules(family: NativeFamily, language_model: PreTrainedModel) -> list[Rule]:
    """Native models hold the base of a language model and a head, ours the whole causal one, by its own names.

    Raises:
        CompositionError: its class has no base or no head of its own.
    """
    if family.causal_prefix is not None:
        return [Rename(family.causal_prefix, "language_model.")]
    names = {module: name for name, module in language_model.named_modules()}
    base, head = base_language_model(language_model), language_model.get_output_embeddings()
    if not names.get(base) or not names.get(head):
        raise CompositionError(
            f"{type(language_model).__name__} does not hold a base model and a head, as {family.model_class} does."
        )
    return [
        Rename(family.base_prefix, f"language_model.{names[base]}."),
        Rename(family.head_prefix, f"language_model.{names[head]}."),
    ]


@dataclass
class Translated:
    """Tensors under the names of the other side.

    Args:
        weights: What a checkpoint holds; the same tensors as before where they are only called otherwise.
        computed: What modules compute themselves and no checkpoint holds, as far as a rule knows it: rotary
            frequencies, say, which `model.to(dtype)` rounds.
    """

    weights: dict[str, torch.Tensor]
    computed: dict[str, torch.Tensor]

    def part(self, prefix: str) -> "Translated":
        """What begins with `prefix`, without it."""
        return Translated(
            *(
                {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
                for tensors in (self.weights, self.computed)
            )
        )


@torch.no_grad()
def translate(source: nn.Module, rules: Sequence[Rule], direction: str) -> Translated:
    """The tensors of `source` under the names of the other side.

    Raises:
        CompositionError: weights that no rule knows.
    """
    tensors = source.state_dict(keep_vars=True)
    weights: dict[str, torch.Tensor] = {}
    rearranged: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for step in plan(rules, tensors, direction):
        made = step.run(tensors)
        if step.function is not None:
            trained = any(tensors[key].requires_grad for key in step.sources)
            made = {key: nn.Parameter(tensor, requires_grad=trained) for key, tensor in made.items()}
            # Tied weights stay tied: the same tensors, arranged alike, are made once.
            known = rearranged.setdefault(tuple(id(tensors[key]) for key in step.sources), list(made.values()))
            if len(known) == len(made) and all(map(_same, known, made.values())):
                made = dict(zip(made, known))
        weights.update(made)
    rest = {name: buffer for name, buffer in source.named_buffers() if name not in tensors}
    computed: dict[str, torch.Tensor] = {}
    for step in plan(rules, rest, direction, partial=True):
        if step.function is None:
            computed.update(step.run(rest))
    return Translated(weights, computed)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and (first.is_meta or torch.equal(first, second))


def put_weights(target: nn.Module, given: Translated, name: str) -> None:
    """Put tensors into `target` as they are, none of them copied; parameters keep whether they require a gradient.

    Args:
        name: What to call the target in an error.

    Raises:
        CompositionError: weights are missing or left over, or have another shape; the message names them.
    """
    expected, weights = target.state_dict(keep_vars=True), given.weights
    check_complete(expected, weights, name)
    shapes = [
        f"{key} {tuple(weights[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if weights[key].shape != tensor.shape
    ]
    if shapes:
        raise CompositionError(f"{len(shapes)} weights have another shape than in {name}: {name_some(shapes)}.")
    requires_grad = {id(tensor): tensor.requires_grad for tensor in weights.values()}
    target.load_state_dict(weights, assign=True)
    for tensor in weights.values():
        tensor.requires_grad_(requires_grad[id(tensor)])
    device = next((tensor.device for tensor in weights.values()), torch.device("cpu"))
    for key, buffer in list(target.named_buffers()):
        if key not in weights:
            owner, _, attribute = key.rpartition(".")
            setattr(target.get_submodule(owner), attribute, given.computed.get(key, buffer).to(device))


def check_complete(expected: Iterable[str], found: Iterable[str], name: str) -> None:
    """Raise `CompositionError`, naming the weights, if any are missing or left over."""
    expected, found = set(expected), set(found)
    problems = [
        f"{len(keys)} weights {words}: {name_some(keys)}"
        for keys, words in (
            (expected - found, f"of {name} are missing"),
            (found - expected, f"have no place in {name}"),
        )
        if keys
    ]
    if problems:
        raise CompositionError(f"{'; '.join(problems)}.")
