"""An ordinary `Trainer`: resuming equals going on, the checkpoint loads alone, and its options do what they say."""

import numpy as np
import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    MiniCPMV4_6ImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    Trainer,
    TrainingArguments,
)

import anyvlm
from anyvlm.compatibility import tiny_configs


NUM_SAMPLES = 48


class Samples(torch.utils.data.Dataset):
    """Bright pictures are w1, dark ones w2; every third sample has no picture, every fifth has two."""

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        bright = index % 2 == 0
        image = picture(index).point(lambda value: value // 3 + (170 if bright else 0))
        images = [] if index % 3 == 0 else [image] * (2 if index % 5 == 0 else 1)
        question = [{"type": "image"} for _ in images] + [{"type": "text", "text": "w5 w6 ?"}]
        answer = "w1" if bright else "w2"
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{answer} {answer}" if index % 4 == 0 else answer},
            ],
            "images": images,
        }


class SizedSamples(Samples):
    """The same, with pictures of four sizes."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        size = [(70, 90), (200, 64), (40, 40), (33, 120)][index % 4]
        return {**sample, "images": [image.resize(size) for image in sample["images"]]}


def new_model(text="llama", **kwargs):
    return anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config(text), tokenizer=tiny_tokenizer(), **kwargs
    )


def trainer(directory, model, processor, max_steps, **kwargs) -> Trainer:
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 20,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = TrainingArguments(output_dir=str(directory), max_steps=max_steps, **{**options, **kwargs})
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(),
        data_collator=anyvlm.AnyVlmDataCollator(processor),
        processing_class=processor,
    )


def losses(run: Trainer) -> np.ndarray:
    return np.array([entry["loss"] for entry in run.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=["plain", "checkpointing and accumulation", "bf16"],
)
def test_resumed_equals_uninterrupted(tmp_path, options):
    whole = trainer(tmp_path / "whole", *new_model(), max_steps=40, **options)
    whole.train()
    first = trainer(tmp_path / "parts", *new_model(), max_steps=20, **options)
    first.train()
    second = trainer(tmp_path / "parts", *new_model(seed=1), max_steps=40, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-20"))
    assert len(losses(whole)) == 40
    # After resuming, the log holds the first part's losses as they were restored.
    assert np.abs(losses(second) - losses(whole)).max() <= 1e-6
    assert losses(whole)[-5:].mean() < losses(whole)[:5].mean() - 1


def test_checkpoint_directory_loads_alone(tmp_path):
    run = trainer(tmp_path, *new_model(), max_steps=20)
    run.train()
    checkpoint = tmp_path / "checkpoint-20"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    assert (checkpoint / "anyvlm_checkpoint.py").is_file()
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    run.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, run.model(**inputs).logits)


def test_accumulation_equals_one_large_batch(tmp_path):
    """The loss is divided by the labels of all accumulated batches, so splitting a batch changes nothing."""
    options = {"max_steps": 3, "learning_rate": 0.0}
    small = trainer(tmp_path / "a", *new_model(), **{**options, "gradient_accumulation_steps": 4})
    large = trainer(tmp_path / "b", *new_model(), **options, per_device_train_batch_size=16)
    small.train()
    large.train()
    assert np.abs(losses(small) - losses(large)).max() <= 2e-5


@pytest.mark.parametrize(
    "tower, image_processor",
    [
        ("qwen2_5_vl_vision", Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64)),
        ("siglip2_vision_model", Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)),
        ("minicpmv4_6_vision", MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=64, slice_mode=False)),
    ],
    ids=["packed", "padded", "strip"],
)
def test_pictures_of_several_sizes(tower, image_processor, tmp_path):
    """Patches of all pictures come without an axis of samples, or with another number of places in each batch."""
    model, processor = anyvlm.compose(
        vision=tiny_configs.vision_config(tower),
        text=text_config("llama"),
        tokenizer=tiny_tokenizer(),
        image_processor=image_processor,
    )
    options = {"max_steps": 2, "learning_rate": 0.0, "data_seed": 0, "per_device_eval_batch_size": 3}
    small = trainer(tmp_path / "a", model, processor, **{**options, "gradient_accumulation_steps": 4})
    large = trainer(tmp_path / "b", model, processor, **options, per_device_train_batch_size=16)
    for run in (small, large):
        run.train_dataset = SizedSamples()
        run.train()
    assert np.abs(losses(small) - losses(large)).max() <= 2e-5
    samples = [SizedSamples()[index] for index in (0, 1, 4, 5, 10, 15, 20)]
    predicted = small.predict(samples)
    with torch.no_grad():
        alone = [model(**anyvlm.AnyVlmDataCollator(processor)([sample])).loss.item() for sample in samples]
    weights = [int((anyvlm.AnyVlmDataCollator(processor)([sample])["labels"] != -100).sum()) for sample in samples]
    assert len(predicted.label_ids) == len(samples)
    batches = [slice(0, 3), slice(3, 6), slice(6, 7)]
    means = [np.average(alone[batch], weights=weights[batch]) for batch in batches]
    assert predicted.metrics["test_loss"] == pytest.approx(np.average(means, weights=[3, 3, 1]), abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = [trainer(tmp_path / str(on), *new_model(), max_steps=5, gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    assert np.abs(losses(runs[0]) - losses(runs[1])).max() <= 1e-6


def test_frozen_tower_stays_as_it_was(tmp_path):
    model, processor = new_model()
    model.vision_tower.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer(tmp_path, model, processor, max_steps=5, gradient_checkpointing=True)
    run.train()
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model"}
    assert not model.vision_tower.training
    assert model.language_model.training


def test_frozen_tower_with_batch_norm_keeps_its_statistics(tmp_path):
    model, processor = anyvlm.compose(
        vision=vision_config("resnet"), text=text_config("llama"), tokenizer=tiny_tokenizer(), image_size=64
    )
    model.vision_tower.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.vision_tower.state_dict().items()}
    trainer(tmp_path, model, processor, max_steps=2).train()
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_evaluation_gives_the_loss_of_training(tmp_path):
    model, processor = new_model()
    run = trainer(tmp_path, model, processor, max_steps=1)
    batch = anyvlm.AnyVlmDataCollator(processor)([Samples()[i] for i in range(8)])
    with torch.no_grad():
        expected = model(**batch).loss
    metrics = run.evaluate(torch.utils.data.Subset(Samples(), range(8)))
    assert metrics["eval_loss"] == pytest.approx(float(expected), abs=0.05)


def test_lora_trains_and_keeps_the_projector(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is in the [train] extra")
    model, processor = new_model()
    config = peft.LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector"], r=4
    )
    adapted = peft.get_peft_model(model, config)
    run = trainer(tmp_path, adapted, processor, max_steps=5, gradient_checkpointing=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    assert any("multi_modal_projector" in name for name in trained)
