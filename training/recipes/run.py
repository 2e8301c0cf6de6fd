"""A whole recipe: its stages one after another, from where it was if it was interrupted."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from ..collator import AnyVlmDataCollator
from ..objectives.registry import try_losses
from ..packing import enable_packing
from .arguments import training_arguments
from .run_folder import RunFolder
from .schema import Recipe, Stage
from .stage_data import first_samples, held_out_texts, stage_dataset
from .stage_run import run_stage
from .summary import StageResult, write_summary


def train_recipe(
    recipe: Recipe,
    restart: bool = False,
    callbacks: Callable[[Stage], Sequence[TrainerCallback]] = lambda stage: (),
    say: Callable[[str], None] = lambda line: None,
    loaded: tuple[PreTrainedModel, ProcessorMixin] | None = None,
) -> list[StageResult]:
    """Run a recipe. The same call again goes on where it was interrupted, and returns at once if it was finished.

    Args:
        recipe: From `load_recipe`.
        restart: Begin again, whatever is in the folder.
        callbacks: For the trainer of each stage.
        say: Gets a line on what happens; called in the main process only.
        loaded: The model that the recipe begins with and its processor, if they are there already.

    Returns:
        What came out of each stage. The model is in `recipe.output`, with `summary.json` and `summary.md`.

    Raises:
        ValueError: the folder holds a run of another recipe; what the model, the data or the machine cannot do.
    """
    folder = RunFolder(recipe)
    # The first to touch the processes: `TrainingArguments` starts what the launcher wants.
    first = training_arguments(recipe.stages[0].training_arguments, str(folder.output), recipe.seed)
    is_main = first.process_index == 0
    say = say if is_main else lambda line: None
    if folder.is_finished and not restart:
        if is_main:
            folder.open(restart=False)
        say(f"This was trained already: {folder.output} (--restart trains again).")
        return [StageResult(**folder.result(stage)) for stage in recipe.stages]
    with first.main_process_first(desc="the run's folder"):
        if is_main:
            folder.open(restart)

    results, model, processor = [], None, None
    for index, stage in enumerate(recipe.stages):
        finished = folder.result(stage)
        if finished is not None:
            say(f"Stage {stage.folder} is done already.")
            results.append(StageResult(**finished))
            continue
        if model is None:
            say("Loading the model…")
            before = recipe.stages[index - 1] if index else None
            if before is None and loaded is not None:
                model, processor = loaded
            else:
                model, processor = load_model(recipe, None if before is None else str(folder.model_after(before)))
            say("Looking at the data of all stages…")
            try_data(recipe.stages[index:], recipe.seed, model, processor)
        on = " from its last checkpoint" if folder.last_checkpoint(stage) else ""
        say(f"Stage {stage.folder}{on}: {stage.why}" if stage.why else f"Stage {stage.folder}{on}")
        model, result = run_stage(recipe, stage, model, processor, folder, list(callbacks(stage)))
        results.append(result)
        for warning in result.warnings:
            say(f"Warning: {warning}")
    if is_main:
        folder.promote(recipe.stages[-1])
        write_summary(folder.output, results, recipe.values)
    return results


def try_data(stages: Sequence[Stage], seed: int, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Open the data of every stage and make a batch of it, so that no stage fails hours later for what is seen at once.

    Raises:
        ValueError: what is wrong, with the stage.
    """
    for stage in stages:
        try:
            train, held_out = stage_dataset(stage, seed, processor)
            collator = AnyVlmDataCollator(processor, max_length=stage.max_length)
            for dataset in (train, held_out):
                if dataset is not None:
                    collator(first_samples(dataset))
            if stage.packing:
                enable_packing(model, collator, first_samples(train))
            try_losses(stage.losses, model, processor)
            if stage.forgetting.get("texts"):
                held_out_texts(stage.forgetting["texts"])
        except (ValueError, OSError) as error:
            raise ValueError(f"Nothing was run: the data of stage {stage.folder}: {error}") from error


def load_model(recipe: Recipe, checkpoint: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model a recipe begins with, or one of its stages left behind."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    dtype = {} if recipe.dtype == "auto" else {"dtype": getattr(torch, recipe.dtype)}
    source = checkpoint or recipe.model
    if source is None:
        from anyvlm.composition.compose import compose

        return compose(**recipe.compose, **dtype, seed=recipe.seed, trust_remote_code=recipe.trust_remote_code)
    trust = {"trust_remote_code": recipe.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(source, **trust, **dtype)
    return model, AutoProcessor.from_pretrained(source, **trust)
