"""Layers are unfrozen from the top, at their steps, also after resuming and under gradient checkpointing."""

import pytest
import torch
from model_tester import picture
from tiny_parts import compose
from transformers import Trainer, TrainerCallback, TrainingArguments

import anyvlm
from anyvlm.training.parts.trained_parts import train_parts


STEPS = 8
PARTS = {
    "projector": 1e-3,
    "vision_tower": {"learning_rate": 1e-3, "layer_decay": 0.5, "unfreeze": ["0.25", 0.5, 0.75]},
}
#: The step in which each is trained for the first time; so is the norm behind the embeddings.
DUE = {"encoder.layers.1": 2, "encoder.layers.0": 4, "embeddings": 6}


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * STEPS

    def __getitem__(self, index):
        words = [{"role": "user", "content": "w5 ?"}, {"role": "assistant", "content": f"w{index % 4}"}]
        return {"messages": words, "images": [picture(index)]}


class Watch(TrainerCallback):
    """The first step in which each parameter changed."""

    def __init__(self, model):
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.changed = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter, self.before[name]):
                self.changed.setdefault(name, state.global_step - 1)


def trainer(folder, seed=0, max_steps=STEPS, **options):
    model, processor = compose(seed=seed)
    trained = train_parts(model, PARTS)
    watch = Watch(model)
    arguments = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=5,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    run = anyvlm.AnyVlmTrainer(
        model=model,
        args=arguments,
        train_dataset=Samples(),
        data_collator=anyvlm.AnyVlmDataCollator(processor),
        processing_class=processor,
        parameter_groups=trained.parameter_groups(1e-4),
        callbacks=[*trained.callbacks(), watch],
    )
    return run, watch


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_come_from_the_top_at_their_steps(tmp_path, checkpointing):
    run, watch = trainer(tmp_path, gradient_checkpointing=checkpointing)
    graphs = []
    run.model.vision_tower.register_forward_hook(
        lambda tower, args, output: graphs.append((torch.is_grad_enabled(), tower.training))
    )
    run.train()
    assert graphs == [(False, False)] * 2 + [(True, True)] * (STEPS - 2)
    for name in watch.before:
        if name.startswith("vision_tower.") and "post_layernorm" not in name:
            expected = next((due for layer, due in DUE.items() if name.startswith(f"vision_tower.{layer}.")), 6)
            # Keys' biases have no influence on attention, so nothing but noise may change them.
            assert watch.changed.get(name) in ((expected, None) if name.endswith("k_proj.bias") else (expected,)), name
        elif name.startswith("language_model."):
            assert name not in watch.changed


def test_resumed_equals_uninterrupted(tmp_path):
    whole, _ = trainer(tmp_path / "whole")
    whole.train()
    first, _ = trainer(tmp_path / "parts")
    first.add_callback(_StopAt(5))
    first.train()
    second, _ = trainer(tmp_path / "parts", seed=1)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert losses(second) == pytest.approx(losses(whole), abs=1e-6)
    assert len(losses(second)) == STEPS
    ends = [dict(run.model.named_parameters()) for run in (whole, second)]
    assert all(torch.equal(parameter, ends[1][name]) for name, parameter in ends[0].items())


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_evenly_between_two_fractions():
    model, _ = compose()
    trained = train_parts(model, {"vision_tower": {"unfreeze": {"from": 0.2, "to": 0.8}}})
    (callback,) = trained.callbacks()
    for progress in (0.0, 0.2, 0.49, 0.5, 0.8):
        callback.apply(progress)
        named = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tops = [any(f"vision_tower.{layer}." in name for name in named) for layer in DUE]
        assert tops == [progress >= due for due in (0.2, 0.5, 0.8)]
        assert ("vision_tower.post_layernorm.weight" in named) == (progress >= 0.2)
