"""`TrainingArguments` in a recipe: which fields it may set, and what a run sets where it does not."""

import dataclasses
import enum
import importlib.util
import types
import typing
from typing import Any

import torch
from transformers import TrainingArguments

from .checks import Findings, unknown
from .yaml_file import KeyPath


#: Where a recipe does not say otherwise. A share of the steps is written as `warmup_steps` below 1.
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_total_limit": 2,
}

#: Fields that a recipe says elsewhere, or that would not do what they say.
REFUSED = {
    "output_dir": "the recipe's own `output` says it",
    "num_train_epochs": "write `epochs` in each stage",
    "max_steps": "write `max_steps` in each stage",
    "seed": "the recipe's own `seed` says it",
    "resume_from_checkpoint": "leave it out: the same command again goes on where the run was",
    "remove_unused_columns": "leave it out: it is always false, since pictures and messages are no inputs of the model",
    "label_smoothing_factor": "leave it out: Trainer shifts the labels for it only for the classes it lists, so it would "
    "be smoothed against the wrong tokens",
    "do_train": "leave it out: each stage trains, and evaluates where the data has `eval`",
    "do_eval": "leave it out: a stage evaluates where the data has `eval`",
    "do_predict": "leave it out: a stage trains",
    "warmup_ratio": "write `warmup_steps`; below 1 it is a share of the steps",
    "logging_dir": "leave it out: TensorBoard's files are in `runs` of each stage's folder",
    "local_rank": "leave it out: the launcher sets it",
    "load_best_model_at_end": "leave it out: a stage goes on from its last weights, so that a resumed run does the same",
}


def check_training_arguments(values: dict[str, Any], path: KeyPath, findings: Findings) -> None:
    """Names and kinds of the fields. What they mean together is known when they are made (`training_arguments`)."""
    hints = typing.get_type_hints(TrainingArguments)
    fields = {item.name: item for item in dataclasses.fields(TrainingArguments) if item.init}
    for name, value in values.items():
        if name in REFUSED:
            findings.add((*path, name), f"{REFUSED[name]}.")
        elif name not in fields:
            near = unknown(name, [field for field in fields if field not in REFUSED], "training argument")
            findings.add((*path, name), f"{near} They are fields of transformers.TrainingArguments.")
        else:
            problem = _problem(value, hints[name])
            if problem:
                findings.add((*path, name), problem)


def _problem(value: Any, hint: Any) -> str | None:
    kinds = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices = [str(member.value) for member in kind]
            return None if value in choices else unknown(value, choices, "choice")
    simple = {bool, int, float, str, type(None)}
    if not simple.issuperset(kinds) or value is None and type(None) in kinds:
        return None
    if isinstance(value, bool):
        fits = bool in kinds or str in kinds
    elif isinstance(value, int):
        fits = int in kinds or float in kinds
    else:
        fits = type(value) in kinds
    if fits:
        return None
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return f"{value!r} is not {' or '.join(words[kind] for kind in kinds if kind in words)}."


def training_arguments(values: dict[str, Any], output_dir: str, seed: int, **length) -> TrainingArguments:
    """The arguments of one stage.

    Raises:
        ValueError: transformers refuses them, or the machine has no bfloat16.
    """
    # Where there is nothing to pin memory for, torch says so on every evaluation.
    has_accelerator = torch.accelerator.is_available() and not values.get("use_cpu")
    values = {**DEFAULTS, "report_to": report_to(), "dataloader_pin_memory": has_accelerator, **values}
    _check_precision(values)
    return TrainingArguments(output_dir=output_dir, seed=seed, remove_unused_columns=False, **length, **values)


def _check_precision(values: dict[str, Any]) -> None:
    """Say what to write where transformers says only that the setup does not support it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if values.get("use_cpu") or (accelerator is not None and accelerator.type not in ("cuda", "mps")):
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if values.get("bf16") and accelerator is None:
        raise ValueError(
            "bf16: true needs a graphics card, and there is none. Write bf16: false; or use_cpu: true for bfloat16 on the "
            "CPU, which is slow on most."
        )
    if values.get("bf16") and name and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"bf16: true, but {name} has no bfloat16. Write fp16: true; or neither, for float32.")
    if values.get("fp16") and accelerator is None:
        raise ValueError("fp16: true needs a graphics card, and there is none. Write fp16: false.")


def report_to() -> list[str]:
    """TensorBoard, where it is installed."""
    found = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    return ["tensorboard"] if found else []
