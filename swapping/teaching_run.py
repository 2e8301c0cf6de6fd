"""Gradient steps of a projector that is taught, for a time or a number of them, and the best weights kept."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from rich.progress import Progress
from torch.nn.utils import parametrize

from ..composition.starting_scale import embedding_rms
from .student import Student
from .teacher_answers import TeacherAnswer
from .whitened_layers import whitened_layers


#: How often the held-out pictures are looked at.
EVALUATIONS = 16
WARM_UP_STEPS = 10
#: Largest image tokens, against the size of the text's embeddings; a projector trained with its language model ended at 14,
#: and `verify` doubts tokens of 50 times the size.
MAX_TOKEN_SIZE = 32.0
#: Steps between two looks at it.
SIZE_STEPS = 10
#: Pictures that whitening is measured on.
WHITENED_PICTURES = 512


@dataclass
class Limits:
    """When training ends."""

    seconds: float | None
    steps: int | None
    started: float

    def progress(self, step: int, first_step: float) -> float:
        """From 0 at the first step to 1 at the end."""
        by_steps = 0.0 if self.steps is None else step / max(self.steps, 1) if self.steps else 1.0
        if self.seconds is None:
            return by_steps
        end = self.started + self.seconds
        return max(by_steps, (time.monotonic() - first_step) / max(end - first_step, 1e-3))


class TeachingRun:
    """The training itself; keeps the projector that was best on held-out pictures."""

    def __init__(
        self,
        student: Student,
        lessons: Sequence[TeacherAnswer],
        held_out: Sequence[TeacherAnswer],
        limits: Limits,
        learning_rate: float,
        batch_size: int,
        seed: int,
    ):
        self.student, self.lessons, self.held_out, self.limits = student, lessons, held_out, limits
        self.projector = student.model.multi_modal_projector
        self.names = [name for name, _ in self.projector.named_parameters()]
        self.learning_rate, self.batch_size = learning_rate, batch_size
        self.chance = random.Random(seed)
        self.step, self.queue = 0, []
        self.losses: list[list[float]] = []
        self.held_out_losses: list[list[float]] = []

    def measure(self) -> dict[str, float]:
        """On held-out pictures: how often the old answer is given, and the loss of its words."""
        return self.student.measure(self.held_out, self.batch_size)

    def train(self, bar: Progress) -> bool:
        """Train to the end; `True` if interrupted. The best projector is in place afterwards."""
        self.best = math.inf, self._copied()
        with torch.no_grad():
            tokens = torch.cat(list(self.student.encoded(self.lessons[: self.batch_size]).pooler_output)).float()
            self.largest = max(
                MAX_TOKEN_SIZE * float(embedding_rms(self.student.model.language_model)),
                float(tokens.square().mean().sqrt()),
            )
        self.first = self._keep_if_better()
        try:
            with whitened_layers(self.projector, self._look) as groups:
                self.optimizer = torch.optim.Adam(groups)
                interrupted = self._steps(bar)
        finally:
            with torch.no_grad():
                for name, value in self.best[1].items():
                    attrgetter(name)(self.projector).copy_(value)
        return interrupted

    def _steps(self, bar: Progress) -> bool:
        first_step, evaluated = time.monotonic(), 0
        task = bar.add_task("Teaching", total=1.0, note="")
        try:
            while (progress := self.limits.progress(self.step, first_step)) < 1:
                loss = self._train_step(progress)
                self.step += 1
                if self.step == 1 or self.step % 10 == 0:
                    self.losses.append([self.step, loss])
                    bar.update(task, completed=progress, note=f"loss {loss:.3f}")
                if progress * EVALUATIONS >= evaluated + 1:
                    evaluated += 1
                    self._keep_if_better()
            if self.step:
                self._keep_if_better()
        except KeyboardInterrupt:
            return True
        finally:
            bar.update(task, completed=1.0)
        return False

    def _look(self) -> None:
        """Project a sample of the pictures."""
        for start in range(0, min(WHITENED_PICTURES, len(self.lessons)), self.batch_size):
            self.student.encoded(self.lessons[start : start + self.batch_size])

    def _copied(self) -> dict[str, torch.Tensor]:
        """The projector's weights, by the names that they have without whitening."""
        return {name: attrgetter(name)(self.projector).detach().clone() for name in self.names}

    def _keep_if_better(self) -> dict[str, float]:
        measured = self.measure()
        seconds = time.monotonic() - self.limits.started
        self.held_out_losses.append([self.step, measured["held_out_loss"], seconds])
        if measured["held_out_loss"] < self.best[0]:
            self.best = measured["held_out_loss"], self._copied()
        return measured

    def _train_step(self, progress: float) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.learning_rate * group["scale"] * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            )
        if len(self.queue) < self.batch_size:
            self.queue += self.chance.sample(self.lessons, len(self.lessons))
        batch, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        # Weights in whitened coordinates are computed once for each step.
        with parametrize.cached():
            loss = self.student.loss(batch, [self._drawn(lesson) for lesson in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        self.optimizer.step()
        if self.step % SIZE_STEPS == 0:
            self._limit_size(batch)
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def _limit_size(self, batch: Sequence[TeacherAnswer]) -> None:
        """Scale tokens down that grew too large: a language model with norms sees their direction, and little of their
        size, so nothing else keeps them from growing with every step."""
        layer = self.projector.output_layer
        if layer is None:
            return
        tokens = torch.cat(list(self.student.encoded(batch).pooler_output)).float()
        factor = float(self.largest / tokens.square().mean().sqrt().clamp(min=1e-12))
        if factor < 1:
            for parameter in layer.parameters():
                parameter.mul_(factor)

    def _drawn(self, lesson: TeacherAnswer) -> str:
        """An answer, drawn by the old model's own probabilities: in the mean the student learns all of them."""
        return self.chance.choices(list(lesson.probabilities), list(lesson.probabilities.values()))[0]
