"""What pictures without labels do for a swap: the choice of a layer, the closed form, and a short training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .alignment import AlignmentError, align
from .distillation import distil
from .layer_choice import best_layer
from .pictures import Pictures
from .report import SwapReport
from .teaching import teach


Swapped = tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor]

#: Seconds of training where nothing is said: a tower's features are mapped already, another language model must be taught.
DISTILLATION_SECONDS = 60.0
TEACHING_SECONDS = 90.0


@dataclass
class Fitting:
    """How a swap learns from pictures.

    Args:
        images: A source of pictures (`pictures.py`).
        texts: Questions to ask about them; `None` for plain ones.
        seconds: Of training, at most; 0 for none. `None`: 60 for a tower, 90 for a language model.
        steps: Of training, at most; 0 for none.
        num_pictures: At most so many pictures, a random sample.
        seed: For the sample, what is held out, and the order.
        progress: Show bars.
    """

    images: Any
    texts: Sequence[str] | None = None
    seconds: float | None = None
    steps: int | None = None
    num_pictures: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        if self.num_pictures is not None:
            self.images = list(Pictures(self.images, limit=self.num_pictures, seed=self.seed).items())

    @property
    def trains(self) -> bool:
        return self.seconds != 0 and self.steps != 0

    def _budget(self, seconds: float) -> dict[str, Any]:
        """`steps` alone have no limit by the clock, so that they give the same on any machine."""
        if self.seconds is None and self.steps is None:
            return {"seconds": seconds}
        return {"seconds": self.seconds, "steps": self.steps}

    def choose_layer(
        self,
        model: AnyVlmForConditionalGeneration,
        processor: AnyVlmProcessor,
        swap_layer: Callable,
        report: SwapReport,
    ) -> int | None:
        """The layer of the new tower that says most of what the old one said."""
        layer, report.layers = best_layer(model, processor, swap_layer, self.images, self.seed, self.progress)
        return layer

    def align(self, old: Swapped, new: Swapped, is_replaced: bool, report: SwapReport) -> bool:
        """Solve for the new tower's projector; false, with a warning in the report, where places cannot be compared."""
        try:
            found = align(*old, *new, self.images, is_replaced=is_replaced, seed=self.seed, progress=self.progress)
        except AlignmentError as error:
            report.warnings.append(f"Not solved in closed form: {error}")
            return False
        report.modality_gap = found.pop("modality_gap") or report.modality_gap
        report.alignment = found
        return True

    def distil(self, old: Swapped, new: Swapped, report: SwapReport) -> bool:
        """Train the new tower's projector to do as the old path did; whether anything changed."""
        return self._trained(distil, DISTILLATION_SECONDS, old, new, report)

    def teach(self, old: Swapped, new: Swapped, report: SwapReport) -> bool:
        """Train the projector so that the new language model answers as the old model; whether anything changed."""
        return self._trained(teach, TEACHING_SECONDS, old, new, report)

    def _trained(self, train: Callable, seconds: float, old: Swapped, new: Swapped, report: SwapReport) -> bool:
        projector = new[0].multi_modal_projector
        if not any(True for _ in projector.parameters()):
            report.warnings.append(
                f"Not trained: a {type(projector).__name__} has no weights. Train the tower's last layers, or swap with "
                "another projector=…."
            )
            return False
        before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
        report.distillation = train(
            *old,
            *new,
            self.images,
            texts=self.texts,
            seed=self.seed,
            progress=self.progress,
            **self._budget(seconds),
        )
        # The best weights are kept, which may be those that it began with.
        after = new[0].multi_modal_projector.state_dict()
        return any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def no_pictures(texts: Any, seconds: Any, steps: Any, num_pictures: Any) -> None:
    """Refuse what needs pictures where there are none.

    Raises:
        ValueError: naming the argument.
    """
    given = {"texts": texts, "seconds": seconds, "steps": steps, "num_pictures": num_pictures}
    named = [f"{name}=…" for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"{', '.join(named)} say how to learn from pictures. Pass images=…, or leave them out.")
