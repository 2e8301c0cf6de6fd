"""The divergence is torch's, the original is what the training began with, and no checkpoint holds it."""

import copy

import pytest
import torch
from model_tester import picture
from safetensors import safe_open
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import TrainingArguments

import anyvlm
from anyvlm.training.objectives.base import ObjectiveBatch
from anyvlm.training.objectives.registry import build_losses
from anyvlm.training.objectives.text_kl import TextKLObjective


QUESTION = {
    "messages": [{"role": "user", "content": "<image> w5"}, {"role": "assistant", "content": "w1"}],
    "images": [picture(0)],
}
TALK = {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w1 w3"}]}
SAMPLES = [QUESTION, {"text": "w20 w21 w22 w23"}, TALK, {"text": "w30 w31"}]
LORA = {"target_modules": r"language_model\..*\.(q_proj|v_proj)", "r": 4}


@pytest.fixture
def parts():
    return anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def divergence(objective, model, processor, samples=SAMPLES) -> torch.Tensor | None:
    extra = objective.collate(samples, {}, processor)
    return objective(ObjectiveBatch(model, {}, None, extra, 0.0))


def by_hand(original, trained, processor) -> float:
    """By torch.distributions, text for text, without padding."""
    rows = [anyvlm.AnyVlmDataCollator(processor)([sample])["input_ids"] for sample in SAMPLES[1:]]
    values = []
    with torch.no_grad():
        for ids in rows:
            logits = [model(input_ids=ids).logits[0, :-1] for model in (original, trained)]
            old, new = (torch.distributions.Categorical(logits=one) for one in logits)
            values.append(torch.distributions.kl_divergence(old, new))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("chunk_size", [3, 256])
def test_is_torchs_divergence_from_the_model_as_it_was(parts, chunk_size):
    model, processor = parts
    objective = TextKLObjective(model, chunk_size=chunk_size)
    original = copy.deepcopy(model.language_model)
    assert float(divergence(objective, model, processor).detach()) == pytest.approx(0, abs=1e-6)
    disturb(model)
    value = divergence(objective, model, processor)
    assert float(value.detach()) == pytest.approx(by_hand(original, model.language_model, processor), rel=1e-4)
    value.backward()
    assert model.language_model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.multi_modal_projector.parameters())
    assert divergence(objective, model, processor, SAMPLES[:1]) is None


def test_original_of_a_folder_in_another_dtype(tmp_path, parts):
    """As a recipe names it."""
    model, processor = parts
    original = copy.deepcopy(model.language_model)
    original.save_pretrained(tmp_path)
    disturb(model)
    losses = {"text_kl": {"weight": 0.5, "original": str(tmp_path), "dtype": "bfloat16"}}
    objective = build_losses(losses, model)[0]["text_kl"]
    assert objective._copy[0].dtype == torch.bfloat16
    expected = by_hand(original, model.language_model, processor)
    assert float(divergence(objective, model, processor).detach()) == pytest.approx(expected, rel=0.05)


def test_chunks_change_no_gradient(parts):
    model, processor = parts
    gradients = []
    originals = copy.deepcopy(model.language_model)
    disturb(model)
    for chunk_size in (2, 256):
        model.zero_grad()
        divergence(TextKLObjective(model, originals, chunk_size=chunk_size), model, processor).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.language_model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_adapters_are_switched_off_in_place_of_a_copy(parts):
    peft = pytest.importorskip("peft", reason="peft is in the [train] extra")
    model, processor = parts
    original = copy.deepcopy(model.language_model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**LORA, init_lora_weights=False, modules_to_save=["multi_modal_projector"])
    ).train()
    objective, with_copy = TextKLObjective(adapted), TextKLObjective(adapted, original)
    assert not objective._copy
    gradients = []
    for one in (objective, with_copy):
        adapted.zero_grad()
        value = divergence(one, adapted, processor)
        value.backward()
        assert float(value.detach()) == pytest.approx(by_hand(original, model.language_model, processor), rel=1e-4)
        gradients.append([p.grad.clone() for n, p in adapted.named_parameters() if "lora_" in n])
    assert all(torch.equal(one, other) for one, other in zip(*gradients)) and gradients[0]
    assert adapted.training and all(p.requires_grad for n, p in adapted.named_parameters() if "lora_" in n)


def test_weights_beside_adapters_are_refused(parts):
    peft = pytest.importorskip("peft", reason="peft is in the [train] extra")
    adapted = peft.get_peft_model(parts[0], peft.LoraConfig(**LORA))
    parts[0].language_model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained beside them"):
        TextKLObjective(adapted)


def trainer(directory, model, processor, max_steps, objective=None):
    objectives = {"text_kl": objective or TextKLObjective(model)}
    return anyvlm.AnyVlmTrainer(
        model=model,
        args=TrainingArguments(
            directory,
            max_steps=max_steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            logging_steps=1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=SAMPLES * 4,
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives),
        processing_class=processor,
        objectives=objectives,
    )


def kl_losses(run) -> list[float]:
    return [entry["loss/text_kl"] for entry in run.state.log_history if "loss/text_kl" in entry]


def test_resuming_has_the_same_original_and_no_checkpoint_holds_it(tmp_path, parts):
    model, processor = parts
    start = copy.deepcopy(model)
    whole = trainer(tmp_path, model, processor, 4)
    whole.train()
    assert kl_losses(whole)[0] == pytest.approx(0, abs=1e-6)
    assert kl_losses(whole)[-1] > 1e-4
    with safe_open(tmp_path / "checkpoint-2" / "objectives.safetensors", "pt") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {"text_kl._extra_state": (32,)}  # noqa: SIM118
    resumed = trainer(tmp_path, copy.deepcopy(start), processor, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert kl_losses(resumed) == pytest.approx(kl_losses(whole), abs=1e-6)
    # A model loaded from the checkpoint is not what the training began with.
    with pytest.raises(ValueError, match="not the one that this training began with"):
        trainer(tmp_path, whole.model, processor, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_training_without_text_is_warned_about(parts):
    objective = TextKLObjective(parts[0])
    with pytest.warns(UserWarning, match="no text in 50 batches"):
        for _ in range(50):
            divergence(objective, *parts, SAMPLES[:1])
