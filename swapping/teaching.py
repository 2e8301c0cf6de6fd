"""After another language model was put in: the old model teaches the new projector, on pictures without labels.

Two language models read different embeddings, and a linear map between those does not carry a projector over. What both
share is the pictures and the words. So the old model is asked about unlabelled pictures, and the new projector is trained
until the new language model, which stays as it is bit for bit, gives the same answers: distillation (Hinton et al. 2015)
through answers in place of tokens, because the two have different ones (Kim & Rush 2016, "Sequence-level knowledge
distillation"). To a frozen language model, image tokens are a prompt that is tuned (Lester et al. 2021, "The power of
scale for parameter-efficient prompt tuning"), and like those they want high learning rates.
"""

import logging
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import Progress

from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .cached_pictures import CachedPictures
from .closed_form_text import STARTS, solve_last_layer
from .picture_paths import PicturePath
from .pictures import Pictures
from .student import Student
from .teacher_answers import Teacher, TeacherAnswer, compare_answers
from .teaching_run import Limits, TeachingRun
from .training_state import only_trained, training_bar


logger = logging.getLogger(__name__)

#: Asked where no questions are given.
QUESTIONS = ("What is this?", "What is in the picture?", "Describe the picture.")
MAX_PICTURES = 4096
#: Share of the time in which the old model looks and answers.
PREPARATION_SHARE = 0.35
HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 96
ANSWER_BATCH_SIZE = 64


def teach(
    old_model: AnyVlmForConditionalGeneration,
    old_processor: AnyVlmProcessor,
    new_model: AnyVlmForConditionalGeneration,
    new_processor: AnyVlmProcessor,
    pictures: Any,
    *,
    texts: Sequence[str] | None = None,
    seconds: float | None = 90.0,
    steps: int | None = None,
    start: str = "closed_form",
    seed: int = 0,
    learning_rate: float = 0.15,
    batch_size: int = 32,
    max_pictures: int = MAX_PICTURES,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the projector of `new_model`, in place and nothing else, to make it answer as the old model does.

    The best projector by held-out pictures is kept, the one it starts with among them. An interrupt (Ctrl-C) ends it early,
    with the best so far.

    Args:
        old_model, old_processor: The trained model.
        new_model, new_processor: The same with another language model (`swap_language_model`), and another tower or not.
        pictures: Without labels, as `Pictures` takes them.
        texts: Questions to ask, such as users will ask; pictures get them in turn. Default: plain ones (`QUESTIONS`).
        seconds: Time for all of it by the clock, the old model's answers included; `None` for no limit.
        steps: Most optimiser steps; `None` for no limit. One of both is needed.
        start: `"closed_form"`: the last layer is solved for (`closed_form_text.py`) from what the old model answered;
            `"kept"`: it stays as it came.
        seed: For the order, and which pictures are held out.
        learning_rate: The highest one, after a few steps, as a share of the weights' size (`whitened_layers.py`); it falls
            to zero along a cosine.
        batch_size: Pictures per step.
        max_pictures: Most pictures that are looked at; a random sample of more.
        max_new_tokens: Longest answer of the old model, in its tokens.
        progress: Show a progress bar.

    Returns:
        `steps`, `seconds`, `preparation_seconds`; `losses` `[[step, loss], …]` and `held_out_losses`
        `[[step, loss, seconds], …]`, of the old model's words, in nats per token. `agreement` and `held_out_loss`, each
        `{"before", "started", "after"}`: with the projector as it came, from where it started, and after; agreement is the
        share of held-out pictures about which the new model gives, word for word, the old one's answer. `start`, and
        what was `solved` for it; `pictures`, `held_out_pictures`, `answers` (how many different ones), `trained_parameters`,
        `interrupted`.

    Raises:
        ValueError: fewer than two pictures, neither `seconds` nor `steps`, a projector without parameters, or an unknown
            start.
    """
    _check(seconds, steps, start)
    questions = _questions(texts)
    started = time.monotonic()
    trained = [new_model.multi_modal_projector]
    with only_trained((old_model, new_model), trained) as (parameters,), training_bar(progress) as bar:
        if not parameters:
            raise ValueError("This model's projector has no parameters, so there is nothing to teach.")
        source = Pictures(pictures, limit=max_pictures, seed=seed)
        until = math.inf if seconds is None else started + PREPARATION_SHARE * seconds
        seen = CachedPictures(PicturePath(old_model, old_processor))
        own = seen if _sees_the_same(old_model, new_model) else CachedPictures(PicturePath(new_model, new_processor))
        lessons = _ask(seen, own, source, questions, max_new_tokens, until, seed, bar)
        held_out, lessons = _split(lessons, seed)
        compare_answers(lessons)
        student = Student(new_model, new_processor, own)
        limits = Limits(seconds, steps, started)
        run = TeachingRun(student, lessons, held_out, limits, learning_rate, batch_size, seed)
        before = run.measure()
        solved = None
        if start == "closed_form":
            solved = solve_last_layer(student, lessons, held_out, seen)
        prepared = time.monotonic()
        interrupted = run.train(bar)
        after = run.measure()
    if interrupted:
        logger.warning("Interrupted after %d steps; the best projector until then is kept.", run.step)
    return {
        "steps": run.step,
        "seconds": time.monotonic() - started,
        "preparation_seconds": prepared - started,
        "losses": run.losses,
        "held_out_losses": run.held_out_losses,
        **{key: {"before": before[key], "started": run.first[key], "after": after[key]} for key in before},
        "start": start,
        "solved": solved,
        "pictures": len(seen),
        "held_out_pictures": len(held_out),
        "answers": len({lesson.answer for lesson in lessons}),
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "interrupted": interrupted,
    }


def _check(seconds: float | None, steps: int | None, start: str) -> None:
    if seconds is None and steps is None:
        raise ValueError("Pass seconds=…, steps=…, or both: something must end the teaching.")
    if start not in STARTS:
        raise ValueError(f"Unknown start {start!r}. Choose one of: {', '.join(STARTS)}.")


def _questions(texts: Sequence[str] | None) -> list[str]:
    questions = list(QUESTIONS) if texts is None else texts
    if isinstance(questions, str) or not questions or not all(isinstance(question, str) for question in questions):
        raise ValueError(
            "texts must be a list of questions, at least one, each a string. Leave it out for plain ones."
        )
    return list(questions)


def _sees_the_same(old_model, new_model) -> bool:
    """Whether both models' towers give the same features, so that one of them need not look."""
    keys = ("vision_tower_spec", "vision_feature_layer", "vision_feature_select_strategy", "image_views")
    same = all(getattr(old_model.config, key) == getattr(new_model.config, key) for key in keys)
    return same and old_model.vision_tower is new_model.vision_tower


def _ask(
    seen: CachedPictures,
    own: CachedPictures,
    source: Pictures,
    questions: Sequence[str],
    max_new_tokens: int,
    until: float,
    seed: int,
    bar: Progress,
) -> list[TeacherAnswer]:
    """The old model's answers, about each picture one; as many as there is time for, at least one batch."""
    teacher = Teacher(seen, max_new_tokens)
    task = bar.add_task("The old model answers", total=source.num_pictures, note="")
    lessons: list[TeacherAnswer] = []
    for batch in source.batches(ANSWER_BATCH_SIZE):
        images = [picture for _, picture in batch]
        indices = seen.add(images)
        if own is not seen:
            own.add(images)
        lessons += teacher.answer(indices, [questions[index % len(questions)] for index in indices])
        bar.update(task, completed=len(lessons))
        if time.monotonic() > until:
            break
    bar.update(task, total=len(lessons))
    empty = sum(not lesson.answer for lesson in lessons)
    if empty == len(lessons):
        raise ValueError(
            "The old model answers nothing to these questions. Pass texts=… that it was trained to answer."
        )
    return [lesson for lesson in lessons if lesson.answer]


def _split(lessons: list[TeacherAnswer], seed: int) -> tuple[list[TeacherAnswer], list[TeacherAnswer]]:
    """Held-out ones, and those to train on."""
    if len(lessons) < 2:
        raise ValueError("Teaching needs at least two pictures, one of them held out. Give more.")
    order = random.Random(seed).sample(lessons, len(lessons))
    count = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(lessons))))
    return order[:count], order[count:]
