"""How a class of transformers reads and writes the keys of a checkpoint, without a checkpoint.

Checkpoints may be older than the class that loads them: transformers renames their keys while loading, and merges tensors
(the experts of a mixture, one each on disk, are one in the model). The same is done here with its own functions, key by key.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..errors import CompositionError
from .keys import name_some


@dataclass
class Loaded:
    """One or several keys of a checkpoint that become one or several weights of a model.

    Args:
        sources: Keys in the checkpoint.
        target: The weight, or the first of several that `converter` makes.
        converter: transformers' operation, if it is more than a renaming, with the pattern that each key matched.
    """

    sources: list[str]
    target: str
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()

    def run(self, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The model's weights of the checkpoint's tensors."""
        if self.converter is None:
            return {self.target: tensors[self.sources[0]]}
        converter = copy.deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns):
            converter.add_tensor(self.target, source, pattern, tensors[source])
        made = converter.convert(self.target, model=model, config=model.config)
        return {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in made.items()}


def loading_plan(model: PreTrainedModel, keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[Loaded]:
    """What becomes of the keys of a checkpoint when `model`'s class loads it, as `from_pretrained` does it.

    Args:
        model: On the meta device.
        shapes: Of each key.

    Raises:
        CompositionError: weights are left over or missing, or have another shape; the message names them.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plan: dict[str, Loaded] = {}
    left_over: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and key in expected:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if target not in expected:
            left_over[target] = key
        elif pattern is None:
            if target in plan:
                raise CompositionError(f"{key} and {plan[target].sources[0]} are both {target}. Remove one of them.")
            plan[target] = Loaded([key], target)
        else:
            step = plan.setdefault(target, Loaded([], target, by_pattern[pattern]))
            step.sources.append(key)
            step.patterns += (pattern,)
    made = _made(plan.values(), model, shapes)
    # What a class does not mind is its own affair: buffers that were saved once, for one.
    found = SimpleNamespace(missing_keys=expected.keys() - made.keys(), unexpected_keys=set(left_over))
    model._adjust_missing_and_unexpected_keys(found)
    missing = found.missing_keys - _tied_to(model, made)
    problems = []
    if found.unexpected_keys:
        problems.append(
            f"{len(found.unexpected_keys)} weights are left over, for which {type(model).__name__} has no place: "
            f"{name_some(left_over[key] for key in found.unexpected_keys)}"
        )
    if missing:
        problems.append(f"{len(missing)} weights of {type(model).__name__} are missing: {name_some(missing)}")
    wrong = [
        f"{key} {tuple(shape)} for {tuple(expected[key].shape)}"
        for key, shape in made.items()
        if key in expected and tuple(shape) != tuple(expected[key].shape)
    ]
    if wrong:
        problems.append(f"{len(wrong)} weights have another shape than the config says: {name_some(wrong)}")
    if problems:
        raise CompositionError("; ".join(problems) + ".")
    return list(plan.values())


def _made(steps: Iterable[Loaded], model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple]:
    """Shape of every weight that the steps make; operations are run on the meta device."""
    made = {}
    for step in steps:
        empty = {key: torch.empty(shapes[key], device="meta") for key in step.sources}
        made.update({key: tuple(tensor.shape) for key, tensor in step.run(empty, model).items()})
    return made


def _tied_to(model: PreTrainedModel, present: Iterable[str]) -> set[str]:
    """Weights that are tied to one that is present, in either direction."""
    present = set(present)
    tied = set()
    for target, source in model.all_tied_weights_keys.items():
        group = {source, *(other for other, its_source in model.all_tied_weights_keys.items() if its_source == source)}
        if group & present:
            tied |= {target, source}
    return tied


def as_saved(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some weights of `model` under the keys, and in the form, in which its `save_pretrained` writes them."""
    return revert_weight_conversion(model, dict(tensors))
