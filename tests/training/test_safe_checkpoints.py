"""Checkpoints that are whole or not there: what is torn is passed over, what cannot be written leaves nothing."""

import resource

import pytest
import torch
from test_trainer import Samples, losses, new_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import anyvlm
from anyvlm.training.safe_checkpoints import SafeCheckpointsMixin, last_complete_checkpoint, what_is_torn
from anyvlm.training.trainer import AnyVlmTrainer


class SafeTrainer(SafeCheckpointsMixin, Trainer):
    pass


OF_TRAINER = ("objectives", "finite_loss_guard")


def new_trainer(folder, max_steps=6, trainer_class=AnyVlmTrainer, seed=0, callbacks=(), **options):
    of_trainer = {name: options.pop(name) for name in OF_TRAINER if name in options}
    model, processor = new_model(seed=seed)
    defaults = {
        "save_steps": 2,
        "logging_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return trainer_class(
        model=model,
        args=TrainingArguments(output_dir=str(folder), max_steps=max_steps, **{**defaults, **options}),
        train_dataset=Samples(),
        eval_dataset=torch.utils.data.Subset(Samples(), range(4)),
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=of_trainer.get("objectives", {})),
        processing_class=processor,
        callbacks=list(callbacks),
        **of_trainer,
    )


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class DiskFull(TrainerCallback):
    """From a step on, no file can grow beyond some bytes."""

    def __init__(self, step, size):
        self.step, self.size, self.before = step, size, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def make_room(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def logged(run) -> list[dict]:
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("trainer_class", [AnyVlmTrainer, SafeTrainer])
def test_logs_after_resuming_are_those_of_the_uninterrupted_training(tmp_path, trainer_class):
    """Checkpoint 4 is between the logs at 3 and 6."""
    whole = new_trainer(tmp_path / "whole", trainer_class=trainer_class)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path / "parts", trainer_class=trainer_class, callbacks=[StopAfter(4)]).train()
    resumed = new_trainer(tmp_path / "parts", trainer_class=trainer_class, seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert len(losses(whole)) == 2
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def cut_off(name):
    def tear(checkpoint):
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[:-200])

    return tear


@pytest.mark.parametrize(
    "tear, reason",
    [
        (lambda checkpoint: (checkpoint / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (cut_off("trainer_state.json"), "trainer_state.json is cut off"),
        (cut_off("model.safetensors"), "model.safetensors is cut off"),
        (cut_off("optimizer.pt"), "optimizer.pt is cut off"),
        (cut_off("rng_state.pth"), "rng_state.pth is cut off"),
    ],
)
def test_torn_checkpoints_are_passed_over(tmp_path, shared_run, tear, reason):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(shared_run, folder)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    assert what_is_torn(folder / "checkpoint-4") is None
    tear(folder / "checkpoint-4")
    assert what_is_torn(folder / "checkpoint-4") == reason
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=f"{reason}.*checkpoint-2"):
        new_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    new_trainer(folder, max_steps=4).train()
    return folder


@pytest.mark.parametrize("size", [0, 100_000], ids=["at once", "in the weights"])
def test_full_disk_leaves_the_last_checkpoint(tmp_path, size):
    """Also where only one is kept: it is deleted when the next one is there."""
    whole = new_trainer(tmp_path / "whole")
    whole.train()
    full = DiskFull(4, size)
    run = new_trainer(tmp_path / "run", callbacks=[full], save_total_limit=1)
    try:
        with pytest.raises(Exception, match="too large|writing|write"):
            run.train()
    finally:
        full.make_room()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    resumed = new_trainer(tmp_path / "run", save_total_limit=1, seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]


def test_best_checkpoint_is_known_by_its_last_name(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 1e-2,
    }
    run = new_trainer(tmp_path, **options)
    run.train()
    best = run.state.best_model_checkpoint
    scores = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert best == str(tmp_path / f"checkpoint-{min(scores, key=scores.get)}")
    assert what_is_torn(best) is None


def test_without_a_checkpoint_training_begins_at_its_start(tmp_path, caplog):
    run = new_trainer(tmp_path, max_steps=2)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 2
