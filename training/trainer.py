"""HF `Trainer` with rates per part and losses beside the language model's."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from .objectives.base import OBJECTIVE_INPUTS, Objective, ObjectiveBatch


#: Heads of objectives, in a checkpoint of the trainer.
OBJECTIVES_NAME = "objectives.safetensors"

#: A weight, or one that depends on how far the training is (0 to 1).
Weight = float | Callable[[float], float]


class AnyVlmTrainer(Trainer):
    """`Trainer`, and with it everything that works with one: callbacks, `accelerate launch`, TensorBoard, resuming.

    Args:
        objectives: Losses beside the language model's, by the name under which they are logged (`loss/<name>`).
        loss_weights: Of each, and of `language_model`; 1 where left out. A weight may be a function of the training's
            progress, from 0 to 1. With weight 0 an objective is not computed.
        parameter_groups: What is trained and how fast, as torch's optimizers take it (see `training.parts`).
            Default: every parameter that requires a gradient at `learning_rate`, as `Trainer` does.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: a weight for an objective that is not there.
    """

    def __init__(
        self,
        *args,
        objectives: Mapping[str, Objective] | None = None,
        loss_weights: Mapping[str, Weight] | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.objectives = nn.ModuleDict(objectives or {}).to(self.args.device)
        self.loss_weights = {"language_model": 1.0, **dict.fromkeys(self.objectives, 1.0), **(loss_weights or {})}
        unknown = self.loss_weights.keys() - {"language_model", *self.objectives}
        if unknown:
            raise ValueError(
                f"There is a loss weight for {', '.join(sorted(unknown))}, but the losses are language_model"
                + "".join(f", {name}" for name in self.objectives)
                + "."
            )
        self.parameter_groups = parameter_groups
        self._loss_sums: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        if any(True for _ in self.objectives.parameters()):
            self.add_callback(_HeadGradients(self))

    @property
    def progress(self) -> float:
        """From 0 at the beginning of the training to 1 at its end."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def loss_weight(self, name: str) -> float:
        """The weight of a loss now."""
        weight = self.loss_weights[name]
        return float(weight(self.progress)) if callable(weight) else float(weight)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The language model's loss and the objectives', each by its weight."""
        inputs = dict(inputs)
        extras = inputs.pop(OBJECTIVE_INPUTS, {})
        if not (self.objectives and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_image_features": True}, True, num_items_in_batch
        )
        self._loss_sums["language_model"].append(loss.detach())
        loss = self.loss_weight("language_model") * loss
        # The language model's loss is divided by all accumulated labels already; the others are means over one batch.
        is_scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        share = 1 / self.current_gradient_accumulation_steps if is_scaled else 1.0
        for name, objective in self.objectives.items():
            weight = self.loss_weight(name)
            if weight == 0:
                continue
            batch = ObjectiveBatch(model, inputs, outputs, extras.get(name, {}), self.progress)
            value = objective(batch)
            for metric, number in batch.metrics.items():
                self._metrics[f"{name}/{metric}"].append(number.detach())
            if value is not None:
                loss = loss + weight * share * value
                self._loss_sums[name].append(share * value.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with the mean of each loss since the last time, and of what objectives say beside theirs."""
        if "loss" in logs and self._loss_sums:
            steps = max(len(self._loss_sums["language_model"]) / self.args.gradient_accumulation_steps, 1)
            for name, values in self._loss_sums.items():
                logs[f"loss/{name}"] = float(torch.stack(values).sum()) / steps
            logs.update({name: float(torch.stack(numbers).mean()) for name, numbers in self._metrics.items()})
            self._loss_sums.clear()
            self._metrics.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, over `parameter_groups` and the objectives' own parameters."""
        if self.optimizer is not None:
            return self.optimizer
        if self.parameter_groups is None:
            super().create_optimizer(model)
        else:
            optimizer_class, arguments = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model if model is None else model
            )
            # What `Trainer` does for optimizers that bring their own groups.
            self.optimizer_cls_and_kwargs = optimizer_class, {**arguments, "params": list(self.parameter_groups)}
            super().create_optimizer(model)
        for name, objective in self.objectives.items():
            parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
            if parameters:
                rate = self.args.learning_rate if objective.learning_rate is None else objective.learning_rate
                self.optimizer.add_param_group(
                    {"params": parameters, "lr": rate, "weight_decay": 0.0, "name": f"objectives.{name}"}
                )
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s. Only its own checkpoints get the objectives' heads."""
        super().save_model(output_dir, _internal_call)
        state = self.objectives.state_dict()
        if _internal_call and state and self.args.should_save:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, _heads_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.objectives.state_dict():
            self.objectives.load_state_dict(load_file(_heads_file(resume_from_checkpoint)))


class _HeadGradients(TrainerCallback):
    """`Trainer` averages over processes, clips and clears the gradients of its model; this does it for the heads."""

    def __init__(self, trainer: AnyVlmTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.objectives.zero_grad()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = [p for p in self.trainer.objectives.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad = self.trainer.accelerator.reduce(parameter.grad, "mean")
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)


def _heads_file(folder: str | os.PathLike) -> str:
    return os.path.join(folder, OBJECTIVES_NAME)
