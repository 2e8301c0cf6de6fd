"""Layers that are unfrozen one after the other, from the top down.

Howard and Ruder 2018 (ULMFiT): what is nearest to the new task learns first, and what is below it when that no longer
pulls it about.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import TrainerCallback

from .layer_groups import HEAD, LayerGroup


#: When, as a fraction of the training, and which parameters.
Steps = list[tuple[float, list[nn.Parameter]]]


def unfreezing_order(
    groups: Sequence[LayerGroup], unfreeze: tuple[float, float] | list[float]
) -> list[tuple[float, list[str]]]:
    """When the layers of a part are unfrozen, from the top down.

    Args:
        groups: What of the part is trained, first to last. What comes after the layers goes with the last of them.
        unfreeze: `(from, to)`: the top layer at the one fraction of the training, the lowest at the other, the rest
            evenly between. A list of fractions: that many sets of layers, as equal as can be, the upper ones larger.

    Returns:
        `(fraction, names of parameters)`, from the top down.
    """
    stack: list[list[str]] = []
    for group in reversed(groups):
        if stack and groups[-1].kind == HEAD and len(stack) == 1 and group is groups[-2]:
            stack[0] += group.parameters
        else:
            stack.append(list(group.parameters))
    if isinstance(unfreeze, tuple):
        first, last = unfreeze
        gaps = max(len(stack) - 1, 1)
        return [(first + (last - first) * index / gaps, names) for index, names in enumerate(stack)]
    size, more = divmod(len(stack), len(unfreeze))
    order, start = [], 0
    for index, fraction in enumerate(unfreeze):
        end = start + size + (index < more)
        order.append((fraction, [name for names in stack[start:end] for name in names]))
        start = end
    return order


class GradualUnfreezing(TrainerCallback):
    """Freezes what is not due yet, at the beginning of every step, by the step alone: so a resumed training goes on as it
    was. The optimizer has all groups from the start and skips what has no gradient.

    Until its first layer is due, a tower is frozen and runs in `eval()` and without a graph.

    Several processes: parameters are frozen after `DistributedDataParallel` has taken them over as trained, so that it
    averages their gradients later; it must look for those without one (`ddp_find_unused_parameters=True`, `Trainer`'s
    default unless gradient checkpointing is on).

    Args:
        steps: By part: when, as a fraction of the training, and which parameters.
    """

    def __init__(self, steps: Mapping[str, Steps]):
        self.steps = dict(steps)

    def apply(self, progress: float) -> None:
        """Freeze and unfreeze for a fraction of the training, 0 to 1."""
        for steps in self.steps.values():
            for fraction, parameters in steps:
                for parameter in parameters:
                    parameter.requires_grad_(progress >= fraction)

    def on_train_begin(self, args, state, control, **kwargs):
        self.apply(state.global_step / max(state.max_steps, 1))

    def on_step_begin(self, args, state, control, **kwargs):
        self.apply(state.global_step / max(state.max_steps, 1))

    def on_train_end(self, args, state, control, **kwargs):
        self.apply(1.0)
