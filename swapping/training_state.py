"""Training a few modules of two models while all else stays as it is, and the bar that shows it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn


@contextmanager
def only_trained(models: Sequence[nn.Module], modules: Sequence[nn.Module]) -> Iterator[list[list[nn.Parameter]]]:
    """Only these modules require gradients and everything is in eval mode; all is as before afterwards.

    Args:
        models: May share modules.
        modules: Of the models.

    Gives the parameters of each of `modules`.
    """
    required = {parameter: parameter.requires_grad for model in models for parameter in model.parameters()}
    training = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.requires_grad_(False).eval()
        for module in modules:
            module.requires_grad_(True)
        yield [list(module.parameters()) for module in modules]
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
            parameter.grad = None
        for module, value in training.items():
            module.training = value


def training_bar(shown: bool) -> Progress:
    """A bar on standard error whose tasks have a `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        disable=not shown,
    )
