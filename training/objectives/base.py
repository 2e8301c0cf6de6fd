"""What every loss beside the language model's is."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from ...modeling.modeling_anyvlm import AnyVlmCausalLMOutput


#: Key of a batch: `{name of an objective: what its `collate` made of the samples}`. The model never sees it.
OBJECTIVE_INPUTS = "objective_inputs"
#: Arguments of an objective that no recipe sets.
_GIVEN = ("model", "processor")


@dataclass
class ObjectiveBatch:
    """What an objective may look at.

    Args:
        model: The model, as the trainer calls it (wrapped, in a run of several processes).
        inputs: The model's inputs, `labels` among them.
        outputs: What the model returned, with `image_features`: the tower's features and each picture's tokens, with graph.
        extra: What this objective's own `collate` returned, on the model's device; empty if it has none.
        progress: From 0 at the beginning of the training to 1 at its end.
        metrics: An objective may put scalars here that say more than its loss; their means are logged as
            `<name of the objective>/<key>`.
        shared: What other objectives have left for this one in this step, by name (`similarities`).
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    outputs: AnyVlmCausalLMOutput
    extra: Mapping[str, Any]
    progress: float
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


class Objective(nn.Module):
    """A loss beside the language model's. Its own parameters (a head, a temperature) are trained along, at
    `learning_rate`, kept in the trainer's checkpoints, and never in the exported model.

    Args:
        learning_rate: For its own parameters. Default: the trainer's.

    A subclass gives `forward`, and `collate` where it needs more of a sample than the model does.

    Attributes:
        reads_shared: It reads what others leave in `ObjectiveBatch.shared`, and so comes after those that do not.
    """

    reads_shared = False

    def __init__(self, learning_rate: float | None = None):
        super().__init__()
        self.learning_rate = learning_rate

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """What a recipe may set, with its default, `inspect.Parameter.empty` for what it must: all arguments but `model`
        and `processor`."""
        parameters = inspect.signature(cls).parameters
        return {name: parameter.default for name, parameter in parameters.items() if name not in _GIVEN}

    @classmethod
    def settings_errors(cls, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What is wrong with settings that a recipe may set, as far as they tell it alone: `(key, sentence)`."""
        return []

    @classmethod
    def try_settings(cls, model: nn.Module, processor: ProcessorMixin, settings: Mapping[str, Any]) -> None:
        """Whether they suit a model that is not yet prepared for training; so that a late stage does not fail at its
        beginning.

        Raises:
            ValueError: they do not.
        """

    @classmethod
    def from_settings(
        cls, model: nn.Module, settings: Mapping[str, Any], processor: ProcessorMixin | None = None
    ) -> "Objective":
        """The objective for a model, from what a recipe says. Arguments called `model` and `processor` get these."""
        given = {"model": model, "processor": processor}
        own = {name: given[name] for name in _GIVEN if name in inspect.signature(cls).parameters}
        return cls(**own, **settings)

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """Tensors that `forward` finds in `ObjectiveBatch.extra`.

        Args:
            samples: As the data set gives them; any further column of it is there (`caption`, `domain`, …).
            batch: The model's inputs, made of the same samples.
        """
        return {}

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        """The loss, a scalar with graph, mean over what it is about; `None` if nothing in the batch concerns it."""
        raise NotImplementedError
