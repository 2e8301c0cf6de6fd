"""Stop at the first loss or gradient that is not finite, before it reaches the weights, and say where it began."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..publishing.written_aside import written_aside


class NonFiniteLossError(ValueError):
    """A loss or gradient was nan or infinite; the message says where it began and what to look at."""


class FiniteLossGuard(TrainerCallback):
    """Stops a training at the step whose loss or gradient norm is nan or infinite.

    `Trainer` goes on, and with `logging_nan_inf_filter`, its default, logs the mean of the losses before in the place of a
    nan one; one such step makes every weight nan. Here the optimizer does not run: the weights are those of the step
    before. The batches of the step, decoded texts, losses, and the module that gave the first non-finite values are
    written to `non_finite_step_<n>` in the output folder.

    `AnyVlmTrainer` has one. For a plain one: `trainer.add_callback(FiniteLossGuard(trainer))`.

    With fp16 only losses are looked at: there gradients overflow now and then, and accelerate skips the step and scales
    them less.
    """

    def __init__(self, trainer: Trainer, watch_forward: bool = True, heads: nn.Module | None = None):
        """
        Args:
            watch_forward: Take batches and losses from the model's `forward`. Not for a trainer that passes them on
                itself (`check_loss`).
            heads: What is trained beside the model.
        """
        self.trainer, self.watch_forward, self.heads = trainer, watch_forward, heads
        self.batches: list[Mapping[str, Any]] = []
        self._hook = None
        self._is_diagnosing = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.batches.clear()
        if self.watch_forward and self._hook is None:
            self._hook = self.trainer.model.register_forward_hook(self._after_forward, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.batches.clear()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches.clear()

    def _after_forward(self, model: nn.Module, args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            self.check_loss(inputs, {} if loss is None else {"loss": loss})

    def check_loss(self, batch: Mapping[str, Any], losses: Mapping[str, torch.Tensor]) -> None:
        """Remember a batch of this step, and stop if one of its losses is not finite.

        Args:
            batch: The inputs, on the model's device.
            losses: By name, scalars.

        Raises:
            NonFiniteLossError: after everything was written.
        """
        if self._is_diagnosing:
            return
        self.batches.append(batch)
        means = [loss.detach().float().mean() for loss in losses.values()]
        if not means or torch.isfinite(torch.stack(means)).all():
            return
        values = {name: mean.item() for name, mean in zip(losses, means)}
        named = ", ".join(f"{name}: {value:.4g}" for name, value in values.items())
        self._stop(f"the loss is not finite ({named})", {"losses": values})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.fp16:
            return
        for module in (self.trainer.model, self.heads):
            if module is None or all(parameter.grad is None for parameter in module.parameters()):
                continue
            # With no limit this changes nothing, and gives the norm.
            norm = self.trainer.accelerator.clip_grad_norm_(module.parameters(), float("inf"))
            if norm is not None and not math.isfinite(float(norm)):  # a tensor, of whatever kind, or a number
                self._stop("the loss is finite, but its gradient is not", {})

    def _stop(self, what: str, found: dict[str, Any]) -> None:
        state = self.trainer.state
        step = state.global_step + 1
        with self._diagnosing():
            report = {
                "step": step,
                "epoch": state.epoch,
                "what": what,
                **found,
                "weights": [name for name, tensor in self.trainer.model.named_parameters() if not _is_finite(tensor)],
                "inputs": sorted({name for batch in self.batches for name in _non_finite_inputs(batch)}),
                "module": None if "losses" not in found else self._first_module(),
                "gradients": self._gradients() if "losses" not in found else [],
                "learning_rates": [group["lr"] for group in self.trainer.optimizer.param_groups],
                "batches": [self._described(batch) for batch in self.batches],
            }
        folder = self._write(step, report)
        raise NonFiniteLossError(
            f"Step {step}: {what}. {_where(report)} The optimizer has not run: the weights are those of step {step - 1}. "
            f"Its batches are in {folder}: batches.pt, and report.json with their texts. {_advice(report, self.trainer)}"
        )

    @contextmanager
    def _diagnosing(self) -> Iterator[None]:
        self._is_diagnosing = True
        try:
            yield
        finally:
            self._is_diagnosing = False

    def _first_module(self) -> str | None:
        """The innermost module that gave the first non-finite values, when the batches are run once more."""
        first: list[str] = []

        def look(name: str):
            def hook(module, args, outputs):
                if not first and not all(_is_finite(tensor) for tensor in _tensors(outputs)):
                    first.append(name)

            return hook

        modules = [(name, module) for name, module in self.trainer.model.named_modules() if name]
        hooks = [module.register_forward_hook(look(name)) for name, module in modules]
        try:
            with torch.no_grad():
                self._loss_again(self.batches[-1])
        finally:
            for hook in hooks:
                hook.remove()
        return first[0] if first else None

    def _gradients(self) -> list[str]:
        """Parameters whose gradients are not finite when the batches are run once more: clipping has spread them to all."""
        named = dict(self.trainer.model.named_parameters())
        if self.heads is not None:
            named |= {f"objectives.{name}": parameter for name, parameter in self.heads.named_parameters()}
        found: list[str] = []
        for batch in self.batches:
            for parameter in named.values():
                parameter.grad = None
            loss = self._loss_again(batch)
            if loss is not None:
                loss.backward()
            found += [name for name, p in named.items() if p.grad is not None and not _is_finite(p.grad)]
        for parameter in named.values():
            parameter.grad = None
        return list(dict.fromkeys(found))

    def _loss_again(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        if self.watch_forward:
            return self.trainer.model(**batch).get("loss")
        return self.trainer.compute_loss(self.trainer.model, dict(batch))

    def _described(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
        ids, labels = batch.get("input_ids"), batch.get("labels")
        facts: dict[str, Any] = {
            "inputs": {
                name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
                for name, value in batch.items()
                if isinstance(value, torch.Tensor)
            }
        }
        if ids is not None and tokenizer is not None:
            facts["texts"] = tokenizer.batch_decode(ids)
        if labels is not None:
            facts["labels"] = (labels != -100).sum(-1).tolist()
        return facts

    def _write(self, step: int, report: dict[str, Any]) -> Path:
        rank = self.trainer.args.process_index
        name = f"non_finite_step_{step}" + (f"_process_{rank}" if rank else "")
        folder = Path(self.trainer.args.output_dir, name)
        with written_aside(folder) as partial:
            torch.save([_on_cpu(batch) for batch in self.batches], os.path.join(partial, "batches.pt"))
            (partial / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        return folder


def _where(report: Mapping[str, Any]) -> str:
    if report["inputs"]:
        return f"The batch itself holds such values, in {', '.join(report['inputs'])}."
    if report["weights"]:
        return f"The weights themselves hold such values: {_few(report['weights'])}."
    if report["module"]:
        return f"They begin in {report['module']}."
    if report["gradients"]:
        return f"Such gradients have: {_few(report['gradients'])}."
    return "Run once more, the same batches gave finite values in all modules."


def _advice(report: Mapping[str, Any], trainer: Trainer) -> str:
    """What to look at, the likeliest first."""
    if report["inputs"]:
        return "Look at these samples' pictures, and at what the processor makes of them."
    if report["weights"]:
        return (
            "They were so before this training, or another step spoiled them: begin from an earlier checkpoint. Weights "
            "saved in float16 overflow beyond 65504."
        )
    if any(not all(batch.get("labels", [1])) for batch in report["batches"]):
        return "Some samples have no supervised token: look at what the data collator makes of their answers."
    if trainer.args.fp16:
        return "float16 overflows beyond 65504: train with bf16=True."
    rates = max(report["learning_rates"], default=0.0)
    clipping = "" if trainer.args.max_grad_norm else " and set max_grad_norm=1.0"
    return f"Lower the learning rate (now up to {rates:.1e}) or warm up longer{clipping}; look at the samples of the batch."


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _non_finite_inputs(batch: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and not _is_finite(value):
            yield prefix + name
        elif isinstance(value, Mapping):
            yield from _non_finite_inputs(value, f"{prefix}{name}.")


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_cpu(item) for item in value]
    return value
