"""HF `Trainer` with rates per part and losses beside the language model's."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from .collator import AnyVlmDataCollator
from .data.samples import OpenedSamples, opened_in
from .finite_loss import FiniteLossGuard
from .objectives.base import OBJECTIVE_INPUTS, Objective, ObjectiveBatch
from .objectives.heads import LOSS_MIXING, load_heads, save_heads
from .objectives.weights import UncertaintyMixing, Weight
from .safe_checkpoints import SafeCheckpointsMixin


class AnyVlmTrainer(SafeCheckpointsMixin, Trainer):
    """`Trainer`, and with it everything that works with one: callbacks, `accelerate launch`, TensorBoard, resuming.

    A collator's `feature_cache` is checked and filled before the first step.

    Args:
        objectives: Losses beside the language model's, by the name under which they are logged (`loss/<name>`).
        loss_weights: Of each, and of `language_model`; 1 where left out. A weight may be a function of the training's
            progress, from 0 to 1 (`objectives.weights.loss_weight` makes one of a schedule). With weight 0 an objective is
            not computed.
        loss_mixing: Learns how much each loss counts, beside the weights (`objectives.weights.UncertaintyMixing`).
        finite_loss_guard: Stop at the first loss or gradient that is not finite (`training.finite_loss`).
        parameter_groups: What is trained and how fast, as torch's optimizers take it (see `training.parts`).
            Default: every parameter that requires a gradient at `learning_rate`, as `Trainer` does.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: a weight or a learned one for an objective that is not there.
    """

    def __init__(
        self,
        *args,
        objectives: Mapping[str, Objective] | None = None,
        loss_weights: Mapping[str, Weight] | None = None,
        loss_mixing: UncertaintyMixing | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
        finite_loss_guard: bool = True,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.objectives = nn.ModuleDict(objectives or {}).to(self.args.device)
        self.loss_weights = {"language_model": 1.0, **dict.fromkeys(self.objectives, 1.0), **(loss_weights or {})}
        self.loss_mixing = UncertaintyMixing([]) if loss_mixing is None else loss_mixing.to(self.args.device)
        self._check_names("a loss weight", self.loss_weights)
        self._check_names("a learned loss weight", self.loss_mixing.names)
        self.parameter_groups = parameter_groups
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._counted_steps: set[int] = set()
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        #: All that is trained beside the model, under the names that a checkpoint has.
        self.heads = nn.ModuleDict({**self.objectives, LOSS_MIXING: self.loss_mixing})
        for dataset in dict.fromkeys(opened_in(self.train_dataset)):
            for callback in dataset.callbacks():
                self.add_callback(callback)
        if any(True for _ in self.heads.parameters()):
            self.add_callback(_HeadGradients(self))
        self.finite_loss_guard = None
        if finite_loss_guard:
            self.finite_loss_guard = FiniteLossGuard(self, watch_forward=False, heads=self.heads)
            self.add_callback(self.finite_loss_guard)
        if isinstance(self.data_collator, AnyVlmDataCollator) and self.data_collator.feature_cache is not None:
            self.add_callback(self.data_collator.feature_cache.callback(self.train_dataset))

    def _check_names(self, what: str, names: Iterable[str]) -> None:
        known = ["language_model", *self.objectives]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"There is {what} for {', '.join(unknown)}, but the losses are {', '.join(known)}.")
        if LOSS_MIXING in self.objectives:
            raise ValueError(f"No objective can be called {LOSS_MIXING!r}. Give it another name.")

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        # Only lengths are read for it, which stand in a column of the rows.
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(
            train_dataset.rows if isinstance(train_dataset, OpenedSamples) else train_dataset
        )

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
        batch_given, inputs = inputs, dict(inputs)
        extras = inputs.pop(OBJECTIVE_INPUTS, {})
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.objectives:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._check_finite(batch_given, {"language_model": loss})
            return (loss, outputs) if return_outputs else loss
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_image_features": True}, True, num_items_in_batch
        )
        # The language model's loss is divided by all accumulated labels already; the others are means over one batch.
        is_scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        share = 1 / self.current_gradient_accumulation_steps
        self._count_loss("language_model", loss if is_scaled else share * loss)
        computed = {"language_model": self.loss_weight("language_model") * loss}
        shared: dict[str, Any] = {}
        # A stable order: those that read what others found come last.
        for name, objective in sorted(self.objectives.items(), key=lambda item: item[1].reads_shared):
            weight = self.loss_weight(name)
            if weight == 0:
                continue
            batch = ObjectiveBatch(model, inputs, outputs, extras.get(name, {}), self.progress, shared=shared)
            value = objective(batch)
            for metric, number in batch.metrics.items():
                self._metrics[f"{name}/{metric}"].append(number.detach())
            # The same losses are logged by all processes, also by one whose batch had nothing for this one.
            self._count_loss(name, torch.zeros_like(loss) if value is None else share * value)
            if value is not None:
                computed[name] = weight * (share if is_scaled else 1.0) * value
        self._check_finite(batch_given, computed)
        loss = sum(self.loss_mixing.factor(name) * value for name, value in computed.items())
        loss = loss + (share if is_scaled else 1.0) * self.loss_mixing.penalty(list(computed))
        return (loss, outputs) if return_outputs else loss

    def _check_finite(self, batch: Mapping[str, Any], losses: Mapping[str, torch.Tensor]) -> None:
        if self.finite_loss_guard is not None:
            self.finite_loss_guard.check_loss(batch, losses)

    def _count_loss(self, name: str, value: torch.Tensor) -> None:
        self._counted_steps.add(self.state.global_step)
        self._loss_sums[name] = self._loss_sums.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with the mean of each loss per step since the last time, over all processes, and of what
        objectives say beside theirs."""
        if "loss" in logs and self._loss_sums:
            sums = torch.stack(list(self._loss_sums.values()))
            means = self.accelerator.reduce(sums, "mean") / len(self._counted_steps)
            logs.update({f"loss/{name}": float(mean) for name, mean in zip(self._loss_sums, means)})
            for name in self.loss_mixing.names:
                logs[f"loss_factor/{name}"] = self.loss_mixing.factor(name).item()
            logs.update({name: float(torch.stack(numbers).mean()) for name, numbers in self._metrics.items()})
            self._loss_sums.clear()
            self._counted_steps.clear()
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
        for name, head in self.heads.items():
            parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
            if parameters:
                rate = self.args.learning_rate if head.learning_rate is None else head.learning_rate
                self.optimizer.add_param_group(
                    {"params": parameters, "lr": rate, "weight_decay": 0.0, "name": f"objectives.{name}"}
                )
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s. Only its own checkpoints get the objectives' heads."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            save_heads(output_dir, self.heads)

    def logging_state(self) -> dict[str, Any]:
        return {
            **super().logging_state(),
            "loss_sums": {name: float(value) for name, value in self._loss_sums.items()},
            "counted_steps": sorted(self._counted_steps),
            "metrics": {name: [float(number) for number in numbers] for name, numbers in self._metrics.items()},
        }

    def load_logging_state(self, state: dict[str, Any]) -> None:
        super().load_logging_state(state)

        def tensor(number: float) -> torch.Tensor:
            return torch.tensor(number, device=self.args.device)

        self._loss_sums = {name: tensor(value) for name, value in state["loss_sums"].items()}
        self._counted_steps = set(state["counted_steps"])
        for name, numbers in state["metrics"].items():
            self._metrics[name] = [tensor(number) for number in numbers]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_heads(resume_from_checkpoint, self.heads)


class _HeadGradients(TrainerCallback):
    """`Trainer` averages over processes, clips and clears the gradients of its model; this does it for the heads."""

    def __init__(self, trainer: AnyVlmTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.heads.zero_grad()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = [parameter for parameter in self.trainer.heads.parameters() if parameter.requires_grad]
        if self.trainer.accelerator.num_processes > 1:
            for parameter in parameters:
                # Every process takes part, also one whose batch had nothing for this head.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.trainer.accelerator.reduce(gradient, "mean")
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
