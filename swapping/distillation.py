"""A short distillation after another tower was put in, without labels: the new path learns to give what the old path gave.

Two things are asked of it, on unlabelled pictures: the old path's image tokens, and the language model's own words, as it
would have said them had it been shown the old tokens (Hinton et al. 2015, "Distilling the knowledge in a neural network").
The language model is not trained.
"""

import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from rich.progress import Progress
from torch import nn

from ..modeling.image_features import AnyVlmImageFeatures
from .new_answers import NewPath
from .old_answers import Example, ask, in_batches, prompts_of
from .picture_paths import PicturePath
from .pictures import Pictures, variants
from .training_state import only_trained, training_bar


logger = logging.getLogger(__name__)

#: Share of the time for looking at the pictures: the old path's answers and the new tower's features.
PREPARATION_SHARE = 0.35
#: Share of the pictures that are not trained on, by which the best weights are chosen.
HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 64
#: How often each of them is looked at: the divergence of a few answers alone says little.
HELD_OUT_VARIANTS = 4
#: Examples that are kept in memory at most.
MAX_EXAMPLES = 4000
#: How often the held-out pictures are looked at.
EVALUATIONS = 6
#: Progress at which the old path is gone, where it is replaced gradually.
REPLACED_AT = 0.5
WARM_UP_STEPS = 10


@dataclass
class _Settings:
    seconds: float | None
    steps: int | None
    learning_rate: float
    batch_size: int
    token_weight: float
    word_weight: float
    gradual: bool
    seed: int


def distil(
    old_model,
    old_processor,
    new_model,
    new_processor,
    pictures: Any,
    *,
    texts: Sequence[str] | None = None,
    seconds: float | None = 60.0,
    steps: int | None = None,
    seed: int = 0,
    gradual: bool = True,
    learning_rate: float = 3e-4,
    batch_size: int = 16,
    num_variants: int = 4,
    tower_layers: int = 0,
    token_weight: float = 1.0,
    word_weight: float = 3.0,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the new path of `new_model`, in place, to give what the old path gives.

    Only the projector is trained, and the tower's last layers if asked for. The best weights by held-out pictures are
    kept, those it came with among them. An interrupt (Ctrl-C) ends it early, with the best so far.

    Args:
        old_model, old_processor: The model before the swap.
        new_model, new_processor: The one after, with the same language model.
        pictures: Without labels, as `Pictures` takes them.
        texts: Questions to ask about them, such as users will ask; each picture gets one, and its variants others.
            Default: plain ones (`old_answers.QUESTIONS`).
        seconds: Time for all of it, by the clock; `None` for no limit.
        steps: Most optimiser steps; `None` for no limit. One of both is needed.
        seed: For the order, what is held out, and the variants.
        gradual: While it learns, the language model is shown a mixture of old and new tokens, whose weight moves from
            old to new in the first half, so that it never meets a jump.
        learning_rate: The highest one, after a few steps; it falls to zero along a cosine.
        batch_size: Pictures per step.
        num_variants: How often each picture is looked at: as it is, and otherwise slightly changed (`pictures.variants`),
            as far as a third of the time allows.
        tower_layers: How many of the last layers of the new tower are trained too, at a tenth of the learning rate. Its
            features can then not be kept from one step to the next.
        token_weight: Of the distance of the tokens, against the variance of the old ones.
        word_weight: Of the divergence of the words.
        max_new_tokens: Longest answer of the old path.
        progress: Show a progress bar.

    Returns:
        `steps`, `seconds`, `losses` `[[step, loss], …]`; `agreement` `{"before", "after"}`, the share of held-out pictures,
        as they are and changed, about which the new path gives word for word the old path's answer; `held_out_loss` and
        `token_error`, likewise `{"before", "after"}`; `pictures`, `held_out_pictures`, `examples`, `trained_parameters`,
        `gradual`, and `interrupted`.

    Raises:
        ValueError: fewer than two pictures, neither `seconds` nor `steps`, or two models with different language models.
    """
    if seconds is None and steps is None:
        raise ValueError("Pass seconds=…, steps=…, or both: something must end the distillation.")
    if old_model.language_model is not new_model.language_model:
        raise ValueError(
            "Both models must hold the same language model, as after a swap of the tower. After a swap of the language "
            "model, the new one is taught by the old model instead."
        )
    started = time.monotonic()
    settings = _Settings(seconds, steps, learning_rate, batch_size, token_weight, word_weight, gradual, seed)
    old, new = PicturePath(old_model, old_processor), NewPath(new_model, new_processor, keep=tower_layers == 0)
    prompts = prompts_of(old_processor, texts)
    trained = [new_model.multi_modal_projector, *_last_layers(new_model.vision_tower, tower_layers)]
    with only_trained((old_model, new_model), trained) as (of_projector, *of_layers), training_bar(progress) as bar:
        groups = [{"params": of_projector, "scale": 1.0}, *({"params": each, "scale": 0.1} for each in of_layers)]
        parameters = [parameter for group in groups for parameter in group["params"]]
        if not parameters:
            raise ValueError(
                "This model's projector has no parameters, so there is nothing to distil. Pass tower_layers=…."
            )
        examples, held_out = _examples(
            old, new, pictures, prompts, num_variants, max_new_tokens, settings, started, bar
        )
        run = _Run(new, examples, held_out, parameters, groups, settings, started, bar)
        interrupted = run.train()
        after = run.best[0]
    if interrupted:
        logger.warning("Interrupted after %d steps; the best weights until then are kept.", run.step)
    keys = ("agreement", "held_out_loss", "token_error")
    return {
        "steps": run.step,
        "seconds": time.monotonic() - started,
        "losses": run.losses,
        **{key: {"before": run.before[key], "after": after[key]} for key in keys},
        "pictures": len({example.picture for example in examples}),
        "held_out_pictures": len({example.picture for example in held_out}),
        "examples": len(examples),
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "gradual": gradual and run.comparable,
        "interrupted": interrupted,
    }


def _examples(
    old: PicturePath,
    new: NewPath,
    pictures: Any,
    prompts: list[str],
    num_variants: int,
    max_new_tokens: int,
    settings: _Settings,
    started: float,
    bar: Progress,
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and held-out ones, of different pictures: all pictures as they are, then variants of them, for
    as long as there is time."""
    source = Pictures(pictures, limit=MAX_EXAMPLES, seed=settings.seed)
    originals = list(source)
    if len(originals) < 2:
        raise ValueError("Distilling needs at least two pictures, one of them held out. Give more.")
    order = torch.randperm(len(originals), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    count = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(originals))))
    held_out_numbers = {originals[index][0] for index in order[:count]}
    # In random order, so that what there is time for is a sample of all.
    originals = [originals[index] for index in order]
    chance = random.Random(settings.seed)
    until = math.inf if settings.seconds is None else started + PREPARATION_SHARE * settings.seconds
    examples, held_out = [], []
    total = min(MAX_EXAMPLES, count * min(num_variants, HELD_OUT_VARIANTS) + (len(originals) - count) * num_variants)
    task = bar.add_task("Looking at pictures", total=total, note="")
    for variant in range(num_variants):
        for batch in in_batches(originals[0 if variant < HELD_OUT_VARIANTS else count :], settings.batch_size):
            if variant > 0:
                batch = [(number, _changed(picture, chance)) for number, picture in batch]
            asked = ask(old, batch, prompts, max_new_tokens, seed=settings.seed + variant)
            new.look(asked)
            held_out += [example for example in asked if example.picture in held_out_numbers]
            examples += [example for example in asked if example.picture not in held_out_numbers]
            bar.advance(task, len(asked))
            if examples and (time.monotonic() > until or len(examples) >= MAX_EXAMPLES):
                bar.update(task, total=len(examples) + len(held_out))
                return examples, held_out
    return examples, held_out


def _changed(picture: Image.Image, chance: random.Random) -> Image.Image:
    _, changed = variants(picture, 2, seed=chance.randrange(2**32))
    return changed


class _Run:
    """The training itself; keeps the weights that were best on the held-out examples."""

    def __init__(
        self, new, examples, held_out, parameters, groups, settings: _Settings, started: float, bar: Progress
    ):
        self.new, self.examples, self.held_out = new, examples, held_out
        self.parameters, self.settings, self.started, self.bar = parameters, settings, started, bar
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
        self.step, self.losses, self.queue = 0, [], []
        tokens = torch.cat([example.tokens for example in examples]).float()
        self.variance = float((tokens - tokens.mean(0)).square().mean().clamp(min=1e-12))
        #: Whether old and new tokens can be compared one by one: there are as many of both.
        self.comparable = new.has_as_many_tokens(held_out)
        if not self.comparable and settings.word_weight == 0:
            raise ValueError(
                "The new path gives another number of tokens than the old one, so only its words can be compared. Leave "
                'word_weight above 0, or swap with image_tokens="keep".'
            )
        measuring = time.monotonic()
        self.before = self.measure()
        # The last look at the held-out pictures is within the time too.
        self.reserved = 1.5 * (time.monotonic() - measuring)
        self.start = self._copied()
        self.best = (self.before, self.start)

    def _copied(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def progress(self) -> float:
        """From 0 at the first step to 1, where it ends."""
        by_steps = 0.0 if self.settings.steps is None else self.step / self.settings.steps
        if self.settings.seconds is None:
            return by_steps
        now = time.monotonic()
        end = self.started + self.settings.seconds - self.reserved
        by_time = (now - self.first_step) / max(end - self.first_step, 1e-3)
        return max(by_steps, by_time)

    def train(self) -> bool:
        """Train to the end; `True` if interrupted. The best weights are in place afterwards."""
        self.first_step, evaluated, task = time.monotonic(), 0, self.bar.add_task("Distilling", total=1.0, note="")
        interrupted = False
        try:
            while (progress := self.progress()) < 1:
                loss = self._train_step(progress)
                self.step += 1
                if self.step == 1 or self.step % 10 == 0:
                    self.losses.append([self.step, loss])
                    self.bar.update(task, completed=progress, note=f"loss {loss:.3f}")
                if progress * EVALUATIONS >= evaluated + 1:
                    evaluated += 1
                    self._keep_if_better()
            if self.step:
                self._keep_if_better()
                self._halfway()
        except KeyboardInterrupt:
            interrupted = True
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best[1]):
                parameter.copy_(value)
        self.bar.update(task, completed=1.0)
        return interrupted

    @torch.no_grad()
    def _halfway(self) -> None:
        """Try weights half way back to those it came with, which often do better on other pictures than either (Wortsman et
        al. 2022, "Robust fine-tuning of zero-shot models")."""
        for parameter, start in zip(self.parameters, self.start):
            parameter.lerp_(start, 0.5)
        self._keep_if_better()

    def _keep_if_better(self) -> None:
        measured = self.measure()
        if measured["held_out_loss"] < self.best[0]["held_out_loss"]:
            self.best = (measured, self._copied())

    def _train_step(self, progress: float) -> float:
        settings = self.settings
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * group["scale"] * warm * 0.5 * (1 + math.cos(math.pi * progress))
        if len(self.queue) < settings.batch_size:
            self.queue += torch.randperm(len(self.examples), generator=self.generator).tolist()
        batch = [self.examples[index] for index in self.queue[: settings.batch_size]]
        del self.queue[: settings.batch_size]
        share = min(1.0, progress / REPLACED_AT) if settings.gradual and self.comparable else 1.0
        loss, _ = self._loss(batch, share)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _loss(self, batch: Sequence[Example], share: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and what it is made of: the error of the tokens, the mean divergence, and which answers agree.

        Args:
            share: Of the new path in what the language model is shown.
        """
        encoded = self.new.encode(batch)
        loss, parts = 0.0, {}
        if self.comparable:
            made, wanted = torch.cat(list(encoded.pooler_output)), torch.cat([example.tokens for example in batch])
            parts["token_error"] = (made.float() - wanted.float()).square().mean() / self.variance
            loss = self.settings.token_weight * parts["token_error"]
        if share < 1:
            mixed = [share * tokens + (1 - share) * one.tokens for tokens, one in zip(encoded.pooler_output, batch)]
            encoded = AnyVlmImageFeatures(pooler_output=mixed, token_grids=encoded.token_grids)
        if self.settings.word_weight > 0 or not torch.is_grad_enabled():
            divergence, parts["agrees"] = self.new.compare(batch, encoded)
            loss = loss + self.settings.word_weight * divergence
        return loss, parts

    @torch.no_grad()
    def measure(self) -> dict[str, float | None]:
        """On the held-out examples: loss, error of the tokens (`None` if there are not as many), agreement."""
        losses, errors, agrees = 0.0, 0.0, 0
        for batch in in_batches(self.held_out, self.settings.batch_size):
            loss, parts = self._loss(batch, 1.0)
            losses += float(loss) * len(batch)
            errors += float(parts.get("token_error", 0.0)) * len(batch)
            agrees += int(parts["agrees"].sum())
        count = len(self.held_out)
        return {
            "held_out_loss": losses / count,
            "token_error": errors / count if self.comparable else None,
            "agreement": agrees / count,
        }


def _last_layers(tower: nn.Module, count: int) -> list[nn.Module]:
    """The last `count` entries of the tower's longest list of layers."""
    if count == 0:
        return []
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=[])
    if not 0 < count <= len(longest):
        raise ValueError(
            f"tower_layers must be from 0 to {len(longest)}, the layers that this tower has, not {count}."
        )
    return list(longest)[-count:]
