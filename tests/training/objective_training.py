"""A tiny training with objectives; as a script, one process of several that writes its gradients."""

import json
import os
import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from model_tester import picture
from safetensors.torch import save_file
from tiny_parts import text_config, tiny_tokenizer, vision_config
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments

import anyvlm
from anyvlm.training.objectives.registry import build_losses


CAPTIONS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8 w9", "w10 w11", "w1 w2", "w12", "w13 w14", "w15"]


class Described(torch.utils.data.Dataset):
    """Pictures with captions, one of which is there twice; the third sample has no picture."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict:
        return {
            "messages": [
                {"role": "user", "content": "w20 ?"},
                {"role": "assistant", "content": CAPTIONS[index % len(CAPTIONS)]},
            ],
            "images": [] if index == 2 else [picture(index)],
        }


class InOrder(anyvlm.AnyVlmTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


class KeepGradients(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.found = trainer, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = [
            *self.trainer.model.named_parameters(),
            *((f"objectives.{name}", parameter) for name, parameter in self.trainer.heads.named_parameters()),
        ]
        self.found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def new_model(seed: int = 0):
    return anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer(), seed=seed
    )


def trainer_of(directory, parts, losses, shuffle=True, stop_after=None, loss_weights=None, loss_mixing=None, **kwargs):
    model, processor = parts
    torch.manual_seed(kwargs.get("seed", 0))
    objectives, weights = build_losses(losses, model)
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 1000,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    run = (anyvlm.AnyVlmTrainer if shuffle else InOrder)(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **{**options, **kwargs}),
        train_dataset=Described(),
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives),
        processing_class=processor,
        objectives=objectives,
        loss_weights=weights if loss_weights is None else loss_weights,
        loss_mixing=loss_mixing,
        callbacks=[] if stop_after is None else [StopAfter(stop_after)],
    )
    return run


def train(*args, **kwargs) -> anyvlm.AnyVlmTrainer:
    run = trainer_of(*args, **kwargs)
    run.train()
    return run


def gradients(run: anyvlm.AnyVlmTrainer) -> dict[str, torch.Tensor]:
    """By name, as they were before the optimizer's first step."""
    keep = KeepGradients(run)
    run.add_callback(keep)
    run.train()
    return keep.found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank = os.environ["RANK"]
    losses = json.loads((folder / "losses.json").read_text())
    run = trainer_of(folder / "run", new_model(), losses, max_steps=1, max_grad_norm=0.0, shuffle=False)
    found = gradients(run)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"gradients-{rank}.safetensors")
    (folder / f"logged-{rank}.json").write_text(json.dumps(run.state.log_history[0]))
