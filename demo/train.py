"""Train the composed model with the ordinary `Trainer`, and show how far it is."""

import os
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..training.collator import AnyVlmDataCollator


@dataclass(frozen=True)
class Recipe:
    """How long and on what is trained and asked.

    Args:
        steps: Optimiser steps.
        batch_size: Questions per step.
        learning_rate: Highest learning rate, after warming up; it falls to zero along a cosine.
        held_out_per_kind: Held-out questions of each kind; `None` for one about each held-out picture.
        num_threads: Threads of torch; `None` for its own choice. In a small model they wait for one another longer than
            they compute, and for minutes where another process takes one of the cores.
    """

    steps: int
    batch_size: int
    learning_rate: float
    held_out_per_kind: int | None = None
    num_threads: int | None = None


#: By size, for small parts with random weights.
SMALL_PARTS = {
    "quick": Recipe(steps=60, batch_size=32, learning_rate=1e-3, held_out_per_kind=24, num_threads=1),
    "small": Recipe(steps=800, batch_size=64, learning_rate=1e-3, num_threads=1),
    "large": Recipe(steps=2500, batch_size=64, learning_rate=1e-3, num_threads=1),
}
#: By size, for pretrained parts, whose steps and answers take far longer.
PRETRAINED_PARTS = {
    "quick": Recipe(steps=20, batch_size=16, learning_rate=5e-4, held_out_per_kind=12),
    "small": Recipe(steps=200, batch_size=32, learning_rate=5e-4, held_out_per_kind=100),
    "large": Recipe(steps=1500, batch_size=32, learning_rate=5e-4),
}
SIZES = tuple(SMALL_PARTS)


def progress_bar(console: Console, *columns: str) -> Progress:
    """A progress bar with counts and remaining time; `columns` name further fields of its task."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn("{task.fields[" + column + "]}") for column in columns),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


class _ProgressCallback(TrainerCallback):
    """A progress bar with the latest loss."""

    def __init__(self, console: Console):
        self.bar = progress_bar(console, "loss")

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.start()
        self.task = self.bar.add_task("Training", total=state.max_steps, loss="")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)


def train(
    model,
    processor,
    questions: Dataset,
    recipe: Recipe,
    output_dir: str | os.PathLike,
    seed: int,
    console: Console,
) -> list[tuple[int, float]]:
    """Train on `questions`, one pass, on the CPU; returns the loss history as `(step, mean loss since the last)`.

    The CPU, because the answers of the trained model are compared, string by string, with those of a fresh process.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, recipe.steps // 10),
        weight_decay=0.05,
        logging_steps=max(1, recipe.steps // 100),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    progress = _ProgressCallback(console)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=questions,
        data_collator=AnyVlmDataCollator(processor),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        progress.bar.stop()
    model.eval()
    return [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
