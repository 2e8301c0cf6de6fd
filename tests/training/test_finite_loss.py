"""A loss or gradient that is not finite stops the training before the weights are touched, and is explained."""

import json

import pytest
import torch
from test_safe_checkpoints import SafeTrainer, logged, new_trainer

from anyvlm.training.finite_loss import FiniteLossGuard, NonFiniteLossError
from anyvlm.training.objectives.base import Objective
from anyvlm.training.trainer import AnyVlmTrainer


STEP = 3


class SpoiledBatches:
    """The collator's batches; that of one step is changed."""

    def __init__(self, collator, change, at=STEP):
        self.collator, self.change, self.at, self.made = collator, change, at, 0

    def __call__(self, samples):
        batch = self.collator(samples)
        self.made += 1
        return self.change(batch) if self.made == self.at else batch


class Root(Objective):
    """Zero at every step, with a gradient that is not finite at one: the root's at zero."""

    def forward(self, batch):
        tokens = torch.cat(list(batch.outputs.image_features.pooler_output))
        spoiled = batch.progress * 6 >= STEP - 1
        return torch.sqrt((tokens * 0).sum()) if spoiled else (tokens * 0).sum()


class Inverse(Objective):
    def forward(self, batch):
        tokens = torch.cat(list(batch.outputs.image_features.pooler_output))
        return tokens.mean() / (batch.progress * 6 < STEP - 1)


def weights(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def spoiled_pixels(batch):
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    return batch


def stopped(run, folder) -> tuple[str, dict, list[dict]]:
    with pytest.raises(NonFiniteLossError) as raised:
        run.train()
    found = folder / f"non_finite_step_{STEP}"
    return str(raised.value), json.loads((found / "report.json").read_text()), torch.load(found / "batches.pt")


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory):
    run = new_trainer(tmp_path_factory.mktemp("two"), max_steps=2, lr_scheduler_type="constant")
    run.train()
    return weights(run)


@pytest.mark.parametrize("trainer_class", [AnyVlmTrainer, SafeTrainer], ids=["built in", "plain Trainer"])
def test_stops_before_the_weights_are_spoiled(tmp_path, trainer_class, after_two_steps):
    run = new_trainer(tmp_path, trainer_class=trainer_class, lr_scheduler_type="constant", save_strategy="no")
    run.data_collator = SpoiledBatches(run.data_collator, spoiled_pixels)
    if trainer_class is SafeTrainer:
        run.add_callback(FiniteLossGuard(run))
    message, report, batches = stopped(run, tmp_path)
    assert (
        "Step 3: the loss is not finite" in message
        and "The batch itself holds such values, in pixel_values" in message
    )
    assert all(torch.equal(tensor, after_two_steps[name]) for name, tensor in weights(run).items())
    assert report["inputs"] == ["pixel_values"] and len(report["batches"][0]["texts"]) == 4
    assert torch.isnan(batches[0]["pixel_values"]).sum() == 1
    assert report["module"].startswith("vision_tower")


def test_without_it_trainer_goes_on_and_logs_a_finite_loss(tmp_path):
    """What the guard is for; it fails when `Trainer` changes."""
    run = new_trainer(tmp_path, finite_loss_guard=False, logging_steps=1, save_strategy="no")
    run.data_collator = SpoiledBatches(run.data_collator, spoiled_pixels)
    run.train()
    assert not torch.isfinite(run.model.get_input_embeddings().weight).all()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logged(run))


def test_module_that_overflows_is_named(tmp_path):
    run = new_trainer(tmp_path, save_strategy="no")
    layer = run.model.language_model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *_: _[2] * float("inf") if run.state.global_step == STEP - 1 else None)
    message, report, _ = stopped(run, tmp_path)
    assert report["module"] == "language_model.model.layers.1.mlp.up_proj"
    assert f"They begin in {report['module']}." in message and "Lower the learning rate" in message


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradient_alone(tmp_path, max_grad_norm, after_two_steps):
    run = new_trainer(
        tmp_path,
        objectives={"root": Root()},
        max_grad_norm=max_grad_norm,
        lr_scheduler_type="constant",
        save_strategy="no",
    )
    message, report, _ = stopped(run, tmp_path)
    assert "the loss is finite, but its gradient is not" in message
    assert "multi_modal_projector.layers.0.weight" in report["gradients"]
    assert not any(name.startswith("language_model.lm_head") for name in report["gradients"])
    if max_grad_norm:
        assert all(torch.equal(tensor, after_two_steps[name]) for name, tensor in weights(run).items())


def test_losses_are_told_apart(tmp_path):
    run = new_trainer(tmp_path, objectives={"inverse": Inverse()}, save_strategy="no", gradient_accumulation_steps=2)
    message, report, batches = stopped(run, tmp_path)
    assert torch.isfinite(torch.tensor(report["losses"]["language_model"]))
    assert not torch.isfinite(torch.tensor(report["losses"]["inverse"]))
    assert "inverse: " in message and len(batches) == 1


def test_weights_that_are_not_finite_are_named(tmp_path):
    run = new_trainer(tmp_path, save_strategy="no")
    with torch.no_grad():
        run.model.multi_modal_projector.layers[0].bias[0] = float("inf")
    with pytest.raises(
        NonFiniteLossError, match="weights themselves hold such values: multi_modal_projector.layers.0.bias"
    ):
        run.train()
