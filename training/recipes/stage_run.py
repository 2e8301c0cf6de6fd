"""One stage of a recipe: the model is prepared, trained with `AnyVlmTrainer`, saved."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..collator import AnyVlmDataCollator
from ..feature_cache import FeatureCache
from ..forgetting import ForgettingCallback
from ..objectives.base import Objective
from ..objectives.registry import build_losses
from ..objectives.weights import UncertaintyMixing
from ..packing import enable_packing
from ..trainer import AnyVlmTrainer
from .arguments import training_arguments
from .domain_data import with_domains
from .run_folder import RunFolder, write_json
from .schema import Recipe, Stage
from .stage_data import first_samples, held_out_texts, stage_dataset
from .stage_parts import dtypes_of, in_single_precision, prepare_parts, restore_dtypes, without_adapters
from .summary import StageResult, losses_of
from .unlabelled_data import with_max_length


def run_stage(
    recipe: Recipe,
    stage: Stage,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: RunFolder,
    callbacks: list[TrainerCallback],
) -> tuple[PreTrainedModel, StageResult]:
    """Train one stage, from its last checkpoint if there is one, and save the model behind it.

    Returns:
        The model without adapters (they are merged into its weights, and stand beside it in `adapter`), and what came out.
    """
    arguments = stage_arguments(recipe, stage, folder)
    # Heads and adapters begin the same, whether this process trained the stage before or not.
    set_seed(arguments.seed)
    checkpoint = folder.last_checkpoint(stage)
    train_dataset, eval_dataset = stage_dataset(stage, recipe.seed, processor, folder.stage(stage))
    dtypes = dtypes_of(model)
    adapted, trained = prepare_parts(model, stage.parts, base_model=str(folder.model_before(stage) or ""))
    dtypes = {**dtypes_of(adapted), **dtypes}  # of bottleneck adapters too, which stay in the model
    if arguments.bf16 or arguments.fp16:
        in_single_precision(adapted)
    losses = with_max_length(with_domains(stage.losses, stage.data), stage.max_length)
    objectives, weights = build_losses(losses, adapted, processor)
    collator = stage_collator(recipe, stage, adapted, processor, arguments, objectives)
    if stage.packing:
        enable_packing(adapted, collator, first_samples(train_dataset))
    trainer = AnyVlmTrainer(
        model=adapted,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        objectives=objectives,
        loss_weights=weights,
        loss_mixing=_loss_mixing(stage),
        parameter_groups=trained.parameter_groups(arguments.learning_rate, arguments.weight_decay),
        callbacks=[*trained.callbacks(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    seconds = Seconds(folder.stage(stage), arguments.should_save)
    trainer.add_callback(seconds)
    trainer.add_callback(LastLoss())
    forgetting = _forgetting(trainer, stage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer.train(resume_from_checkpoint=checkpoint)
    eval_loss = trainer.evaluate()["eval_loss"] if eval_dataset is not None else None
    model = _save(trainer, processor, folder, stage, dtypes)
    result = StageResult(
        name=stage.folder,
        steps=trainer.state.global_step,
        seconds=round(seconds.total, 2),
        trained_parameters=trained.num_parameters(),
        losses=losses_of(trainer.state.log_history),
        eval_loss=eval_loss,
        text_perplexity=forgetting and {"before": forgetting.result.before, "after": forgetting.result.after},
        warnings=_of_this_package(caught),
        history=trainer.state.log_history,
    )
    if arguments.should_save:
        folder.finish(stage, asdict(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return model, result


def _loss_mixing(stage: Stage) -> UncertaintyMixing | None:
    if not stage.loss_mixing:
        return None
    settings = dict(stage.loss_mixing) if isinstance(stage.loss_mixing, dict) else {}
    return UncertaintyMixing(settings.pop("names", None) or list(stage.losses), **settings)


def stage_collator(
    recipe: Recipe,
    stage: Stage,
    model: nn.Module,
    processor: ProcessorMixin,
    arguments: TrainingArguments,
    objectives: dict[str, Objective],
) -> AnyVlmDataCollator:
    """What makes batches, with the features of a frozen tower where the stage keeps them."""
    cache = None
    if stage.feature_cache:
        settings = stage.feature_cache if isinstance(stage.feature_cache, dict) else {}
        named = stage.feature_cache if isinstance(stage.feature_cache, str) else settings.get("directory")
        cache = FeatureCache(
            named or os.path.join(recipe.output, "stages", "features"),
            model,
            processor,
            autocast_dtype=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            max_bytes=settings.get("max_bytes"),
        )
    return AnyVlmDataCollator(
        processor,
        max_length=stage.max_length,
        objectives=objectives,
        packing=bool(stage.packing),
        feature_cache=cache,
    )


def stage_arguments(recipe: Recipe, stage: Stage, folder: RunFolder) -> TrainingArguments:
    """`TrainingArguments` of a stage."""
    length = {"max_steps": stage.max_steps} if stage.max_steps else {"num_train_epochs": stage.epochs}
    return training_arguments(stage.training_arguments, str(folder.stage(stage)), recipe.seed, **length)


class Seconds(TrainerCallback):
    """How long a stage trained, over all its interruptions; known up to the last checkpoint of each."""

    def __init__(self, folder: Path, writes: bool):
        self.file, self.writes = folder / "seconds.json", writes
        self.before, self.begin, self.total = 0.0, time.monotonic(), 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.monotonic()
        if state.global_step and self.file.is_file():
            self.before = json.loads(self.file.read_text(encoding="utf-8"))["seconds"]

    def on_save(self, args, state, control, **kwargs):
        self.on_train_end(args, state, control)
        if self.writes:
            write_json(self.file, {"seconds": self.total})

    def on_train_end(self, args, state, control, **kwargs):
        self.total = self.before + time.monotonic() - self.begin


class LastLoss(TrainerCallback):
    """The last step's loss is logged, however seldom others are: the summary tells it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


def _forgetting(trainer: AnyVlmTrainer, stage: Stage) -> ForgettingCallback | None:
    if not stage.forgetting.get("texts"):
        return None
    settings = {key: value for key, value in stage.forgetting.items() if key != "texts"}
    callback = ForgettingCallback(trainer, held_out_texts(stage.forgetting["texts"]), **settings)
    trainer.add_callback(callback)
    return callback


def _save(
    trainer: AnyVlmTrainer,
    processor: ProcessorMixin,
    folder: RunFolder,
    stage: Stage,
    dtypes: Mapping[str, torch.dtype],
) -> PreTrainedModel:
    """The model behind the stage, whole or not there."""
    partial, model_folder = folder.stage(stage) / ".model.partial", folder.model(stage)
    is_main = trainer.args.should_save
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(model_folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    adapted: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(adapted, PreTrainedModel):
        restore_dtypes(adapted, dtypes)
        # Weights that are spread over processes are gathered.
        trainer.save_model(str(partial))
        model = adapted
    else:
        if is_main:
            adapted.save_pretrained(partial / "adapter")
        trainer.accelerator.wait_for_everyone()
        model = without_adapters(adapted)
        restore_dtypes(model, dtypes)
        if is_main:
            model.save_pretrained(partial)
    if is_main:
        processor.save_pretrained(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)
        os.replace(partial, model_folder)
    trainer.accelerator.wait_for_everyone()
    return model


def _of_this_package(caught: list[Any]) -> list[str]:
    """Warnings of this package, once each; those of others are shown as ever, now that the training is over."""
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found, shown = [], {}
    for warning in caught:
        if issubclass(warning.category, UserWarning) and os.path.abspath(warning.filename).startswith(own):
            found.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, registry=shown)
    return list(dict.fromkeys(found))
