"""Verify a composed model step by step against what it was made of, and name the first thing that is wrong.

A swap that went wrong shows as a wrong answer, and an answer says nothing about where it comes from. So each part is
compared with its source by itself, in the order in which data passes: what fails first is where to look.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from ..composition.running import in_mode
from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..publishing.fresh_worker import picture
from . import (
    verification_language_model,
    verification_processor,
    verification_projector,
    verification_vision_tower,
    verification_whole,
)
from .pictures import Pictures
from .verification_checks import Check, CheckFailed, NotChecked, Subject
from .verification_files import check_files, check_version, folder_of, load_model, load_processor
from .verification_report import FAILED, NOT_CHECKED, PASSED, CheckResult, StepResult, VerificationReport
from .verification_source_types import sort_sources
from .verification_sources import Sources


#: Parts that may be said to be trained.
TRAINABLE = ("vision_tower", "language_model")

#: More show nothing new.
_MOST_PICTURES = 8

_SAVE_AGAIN = (
    "Save it again, whole: model.save_pretrained(path) and processor.save_pretrained(path), of a model that works."
)

#: Steps after loading: name, title, checks.
_STEPS: tuple[tuple[str, str, tuple[Check, ...]], ...] = (
    ("language_model", "Language model", verification_language_model.CHECKS),
    ("vision_tower", "Vision tower", verification_vision_tower.CHECKS),
    ("projector", "Projector", verification_projector.CHECKS),
    ("processor", "Processor", verification_processor.CHECKS),
    ("whole", "Whole", verification_whole.CHECKS),
)


def verify(
    checkpoint: str | os.PathLike | tuple[PreTrainedModel, Any],
    against: Any = None,
    *,
    images: Any = None,
    trained: Sequence[str] = (),
    all_steps: bool = False,
    fresh_process: bool = True,
    scale_limit: float = 50.0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    timeout: float = 3600,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Verify a composed model: files and loading, the language model alone, the vision tower alone, the projector, the
    processor, and the whole.

    Args:
        checkpoint: A folder or Hub id; or `(model, processor)`, which are left as they are.
        against: What the model was made of: paths, Hub ids or instances of its vision tower, its language model, a model
            that holds either (a whole CLIP, a LLaVA), its tokenizer or image processor, or the composed model before a swap.
            They are sorted by what they are; `{"vision": …, "text": …}` or `"vision=PATH"` says it. Without any, only what
            needs no source is checked.
        images: Pictures to look at, at least two: a folder, paths, pictures or rows with an `image`
            (`swapping/pictures.py`). Default: patches of colour.
        trained: Parts that were trained after composing, of `"vision_tower"` and `"language_model"`: they may differ from
            their sources, and by how much is reported.
        all_steps: Go on after the first failure.
        fresh_process: Also load the checkpoint in a process without anyvlm; a model in memory is saved for it.
        scale_limit: Largest factor, either way, between the RMS of image tokens and that of the text's embeddings. Where the
            composed model before the swap is given and has the same language model, ten times its factor counts instead.
        dtype: To load a checkpoint, and so the sources, in. Default: the checkpoint's own.
        device: To load a checkpoint on. Default: the CPU.
        timeout: Seconds for the fresh process.
        trust_remote_code: Allow parts and sources whose code is in their own checkpoint.
        on_step: Called with each check's name as it begins.

    Returns:
        The report; its `first_failure` is `None` if nothing is wrong.

    Raises:
        ValueError: what is passed is no composed model, a source is nothing that a model could be made of, or two sources
            could be meant for one part.
        OSError: nothing is at a path.
    """
    started = time.monotonic()
    unknown = set(trained) - set(TRAINABLE)
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))} cannot be said to be trained. Choose of: {', '.join(TRAINABLE)}."
        )
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    subject = Subject(None, None, Sources(), _pictures(images), trained=frozenset(trained), scale_limit=scale_limit)
    subject.timeout = timeout if fresh_process else None
    name = _take(subject, checkpoint)
    loading = [Check("files", check_files, _SAVE_AGAIN), Check("code version", check_version, "")]
    if subject.model is None:
        arguments = {"dtype": dtype} if dtype is not None else {}
        load = partial(load_model, trust_remote_code=trust_remote_code, **arguments)
        loading.append(Check("weights", load, _SAVE_AGAIN))
        loading.append(Check("processor", partial(load_processor, trust_remote_code=trust_remote_code), _SAVE_AGAIN))
    runner = _Runner(subject, all_steps, on_step)
    steps = [runner.step("checkpoint", "Checkpoint", loading)]
    if subject.model is not None:
        subject.sources = sort_sources(against, subject.config, trust_remote_code)
        subject.notes += subject.sources.notes
        if device is not None and subject.checkpoint is not None:
            subject.model.to(device)
    # TF32, which cuDNN uses by default, is no rounding of float32.
    with (
        in_mode(subject.model) if subject.model is not None else contextlib.nullcontext(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        for step_name, title, checks in _STEPS:
            steps.append(runner.step(step_name, title, checks))
            subject.sources.release()
    return VerificationReport(
        checkpoint=name,
        against=subject.sources.described(),
        steps=steps,
        notes=list(dict.fromkeys(subject.notes)),
        seconds=time.monotonic() - started,
    )


class _Runner:
    """Makes checks in order, until one fails."""

    def __init__(self, subject: Subject, all_steps: bool, on_step: Callable[[str], None] | None):
        self.subject, self.all_steps, self.on_step = subject, all_steps, on_step
        self.failed = False

    def step(self, name: str, title: str, checks: Sequence[Check]) -> StepResult:
        return StepResult(name, title, [self._result(title, check) for check in checks])

    def _result(self, title: str, check: Check) -> CheckResult:
        result = CheckResult(check.name, advice=check.advice)
        if self.failed and not self.all_steps:
            return result
        if self.on_step is not None:
            self.on_step(f"{title}: {check.name}")
        try:
            if title != "Checkpoint" and (self.subject.model is None or self.subject.processor is None):
                raise NotChecked("the checkpoint could not be loaded")
            finding = check.run(self.subject)
            result.status = PASSED
        except NotChecked as reason:
            result.status, result.detail = NOT_CHECKED, str(reason)
            return result
        except CheckFailed as failure:
            result.status, finding, self.failed = FAILED, failure.finding, True
        except Exception as error:  # noqa: BLE001 - a broken model fails in any way, and what it says is what was found
            result.status, result.detail, self.failed = FAILED, f"{type(error).__name__}: {error}", True
            return result
        result.detail, result.figures = finding.detail, finding.figures
        result.tolerance, result.tolerance_reason = finding.tolerance, finding.tolerance_reason
        return result


def _take(subject: Subject, checkpoint: str | os.PathLike | tuple[PreTrainedModel, Any]) -> str:
    """Put what is to be verified into the subject; returns its name."""
    if isinstance(checkpoint, (str, os.PathLike)):
        subject.checkpoint = folder_of(checkpoint)
        return os.fspath(checkpoint)
    try:
        subject.model, subject.processor = checkpoint
    except (TypeError, ValueError):
        raise ValueError("Pass a path, a Hub id, or (model, processor).") from None
    if not isinstance(getattr(subject.model, "config", None), AnyVlmConfig):
        raise ValueError(
            f"{type(subject.model).__name__} is not a composed model. Pass what anyvlm.compose or anyvlm.swap "
            "returned, and what it is made of with against=…."
        )
    return subject.model.name_or_path or "a model in memory"


def _pictures(images: Any) -> list[Image.Image]:
    """At least two pictures.

    Raises:
        ValueError: fewer.
    """
    if images is None:
        return [picture(seed, (320, 240)) for seed in (0, 1, 2)]
    pictures = [shown for _, shown in islice(Pictures(images), _MOST_PICTURES)]
    if len(pictures) < 2:
        raise ValueError(f"Verifying takes two pictures at least, to see that they differ; there are {len(pictures)}.")
    return pictures
