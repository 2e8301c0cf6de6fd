"""Heads of objectives in training: resumed exactly, never exported, the same over processes and accumulated batches."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_training import Described, gradients, new_model, train, trainer_of
from safetensors.torch import load_file

import anyvlm
from anyvlm.training.objectives.base import ObjectiveBatch
from anyvlm.training.objectives.contrastive import ContrastiveObjective
from anyvlm.training.objectives.heads import OBJECTIVES_NAME, load_heads
from anyvlm.training.objectives.weights import UncertaintyMixing


LOSSES = {
    "language_model": 1.0,
    "contrastive": {"weight": 0.5, "schedule": {"type": "warmup", "until": 0.5}, "embedding_size": 8},
    "matching": {"weight": 0.3},
}


def logged(run, name="loss") -> np.ndarray:
    return np.array([entry[name] for entry in run.state.log_history if name in entry])


def test_resumed_equals_uninterrupted(tmp_path):
    def run(folder, seed=0, **kwargs):
        mixing = UncertaintyMixing(["language_model", "matching"], learning_rate=1e-2)
        return trainer_of(tmp_path / folder, new_model(seed=seed), LOSSES, loss_mixing=mixing, save_steps=5, **kwargs)

    whole = run("whole", max_steps=10)
    whole.train()
    run("parts", max_steps=10, stop_after=5).train()
    resumed = run("parts", seed=1, max_steps=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    for name in ("loss", "loss/contrastive", "loss/matching", "loss_factor/matching"):
        # At the first step the contrastive loss has weight 0, and is not computed.
        assert len(logged(whole, name)) == (9 if name == "loss/contrastive" else 10)
        assert np.abs(logged(resumed, name) - logged(whole, name)).max() <= 1e-6, name
    for name, tensor in whole.heads.state_dict().items():
        assert torch.allclose(tensor, resumed.heads.state_dict()[name], atol=1e-6), name
    assert logged(whole, "loss_factor/matching")[-1] != 1


def test_heads_are_in_checkpoints_and_never_in_the_exported_model(tmp_path):
    with_heads = train(tmp_path / "a", new_model(), LOSSES, max_steps=1, save_steps=1)
    plain = train(tmp_path / "b", new_model(), {}, max_steps=1, save_steps=1)
    for run, folder in ((with_heads, "a"), (plain, "b")):
        run.save_model(str(tmp_path / folder / "exported"))
    for where in ("exported", "checkpoint-1"):
        weights = [load_file(tmp_path / folder / where / "model.safetensors").keys() for folder in ("a", "b")]
        configs = [json.loads((tmp_path / folder / where / "config.json").read_text()) for folder in ("a", "b")]
        assert weights[0] == weights[1] and configs[0] == configs[1]
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob(OBJECTIVES_NAME)}
    assert found == {f"a/checkpoint-1/{OBJECTIVES_NAME}"}

    fresh = ContrastiveObjective(with_heads.model, embedding_size=8)
    load_heads(tmp_path / "a" / "checkpoint-1", {"contrastive": fresh})
    trained = with_heads.objectives["contrastive"]
    processor, texts = with_heads.processing_class, ["w1 w2", "w3"]
    assert torch.equal(
        fresh.embed_texts(with_heads.model, processor, texts), trained.embed_texts(with_heads.model, processor, texts)
    )
    with pytest.raises(ValueError, match="settings it was trained with"):
        load_heads(tmp_path / "a" / "checkpoint-1", {"contrastive": ContrastiveObjective(with_heads.model, 16)})
    with pytest.raises(ValueError, match=f"has no {OBJECTIVES_NAME}"):
        load_heads(tmp_path / "b" / "checkpoint-1", {"contrastive": fresh})


def test_accumulated_gradients_are_of_all_labels_and_of_the_mean_over_batches(tmp_path):
    """The language model's loss is that of one large batch; a loss that compares the samples of a batch is the mean over
    the small batches, which have fewer negatives each."""
    losses = {"language_model": 1.0, "contrastive": {"weight": 0.5, "embedding_size": 8}}
    model, processor = new_model()
    run = trainer_of(
        tmp_path,
        (model, processor),
        losses,
        max_steps=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        learning_rate=0.0,
        shuffle=False,
    )
    found = gradients(run)
    model.zero_grad()
    objective = run.objectives["contrastive"]
    objective.zero_grad()
    given = [Described()[index] for index in range(8)]
    collator = anyvlm.AnyVlmDataCollator(processor, objectives={"contrastive": objective})
    whole = collator(given)
    whole.pop("objective_inputs")
    model.train()
    total = model(**whole).loss
    for part in (given[:4], given[4:]):
        inputs = collator(part)
        extra = inputs.pop("objective_inputs")["contrastive"]
        outputs = model(**inputs, output_image_features=True)
        total = total + 0.5 * objective(ObjectiveBatch(model, inputs, outputs, extra, 0.0)) / 2
    total.backward()
    named = [*model.named_parameters(), *((f"objectives.contrastive.{n}", p) for n, p in objective.named_parameters())]
    for name, parameter in named:
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, atol=2e-5), name
    assert logged(run)[0] == pytest.approx(total.item(), abs=1e-4)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=["checkpointing", "bf16"])
def test_memory_and_speed_options(tmp_path, options):
    plain = train(tmp_path / "a", new_model(), LOSSES, max_steps=3)
    other = train(tmp_path / "b", new_model(), LOSSES, max_steps=3, **options)
    # Autocast rounds to 8 bits of mantissa; checkpointing computes the same again.
    tolerance = 0.05 if "bf16" in options else 1e-6
    for name in ("loss", "loss/contrastive", "loss/matching"):
        assert np.abs(logged(plain, name) - logged(other, name)).max() <= tolerance, name
    assert all(parameter.dtype == torch.float32 for parameter in other.heads.parameters())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_are_one_with_both_batches(tmp_path):
    losses = {"language_model": 1.0, "contrastive": {"weight": 0.5, "embedding_size": 8}}
    (tmp_path / "losses.json").write_text(json.dumps(losses))
    script = Path(__file__).parent / "objective_training.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", script, tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"gradients-{rank}.safetensors") for rank in range(2)]
    run = trainer_of(
        tmp_path, new_model(), losses, max_steps=1, per_device_train_batch_size=8, max_grad_norm=0.0, shuffle=False
    )
    alone = gradients(run)
    assert ranks[0].keys() == ranks[1].keys() == alone.keys()
    assert any(name.startswith("objectives.contrastive") for name in alone)
    for name, gradient in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.allclose(ranks[0][name], gradient, atol=2e-5), name
    with_loss = json.loads((tmp_path / "logged-0.json").read_text())
    for name in ("loss", "loss/language_model", "loss/contrastive"):
        assert with_loss[name] == pytest.approx(logged(run, name)[0], abs=1e-4), name


def test_names_that_are_not_there(tmp_path):
    for options in ({"loss_weights": {"contrast": 1.0}}, {"loss_mixing": UncertaintyMixing(["contrast"])}):
        with pytest.raises(ValueError, match="contrast, but the losses are language_model, contrastive, matching"):
            trainer_of(tmp_path, new_model(), LOSSES, max_steps=1, **options)
