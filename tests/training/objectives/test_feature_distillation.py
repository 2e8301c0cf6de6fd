"""Distances of features against scikit-learn's, the teacher stays what it was, and no checkpoint holds it."""

import numpy as np
import pytest
import torch
from model_tester import picture
from safetensors.torch import load_file
from tiny_parts import TOWERS, text_config, tiny_tokenizer, vision_config
from transformers import AutoModel, Qwen2VLImageProcessorPil, TrainingArguments

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from anyvlm.training.objectives.base import ObjectiveBatch
from anyvlm.training.objectives.feature_distillation import FeatureDistillationObjective
from anyvlm.training.trainer import AnyVlmTrainer


PACKED = {"image_processor": Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64)}


def composed(tower="clip_vision_model", **kwargs):
    vision = tiny_configs.vision_config(tower) if tower not in TOWERS else vision_config(tower)
    return anyvlm.compose(vision=vision, text=text_config("llama"), tokenizer=tiny_tokenizer(), **kwargs)


def samples(count=4):
    sizes = [(32, 32), (90, 70), (33, 120)]
    return [
        {
            "messages": [{"role": "user", "content": "w5 ?"}, {"role": "assistant", "content": "w1"}],
            "images": [picture(index).resize(sizes[index % 3])],
        }
        for index in range(count)
    ]


def batch_for(model, processor, objective) -> ObjectiveBatch:
    inputs = anyvlm.AnyVlmDataCollator(processor, objectives={"near": objective})(samples())
    extra = inputs.pop("objective_inputs", {}).get("near", {})
    return ObjectiveBatch(model, inputs, model(**inputs, output_image_features=True), extra, 0.5)


def change(tower):
    with torch.no_grad():
        for number, parameter in enumerate(tower.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def features_alone(model, processor) -> list[np.ndarray]:
    """Features of each picture, seen alone."""
    found = []
    for sample in samples():
        inputs = processor(text=["<image>"], images=sample["images"], return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            features = model.get_image_features(**inputs).last_hidden_state
        found.append(features.flatten(0, -2).double().numpy())
    return found


@pytest.mark.parametrize("distance", ["cosine", "mse", "smooth_l1"])
@pytest.mark.parametrize("tower, kwargs", [("clip_vision_model", {}), ("qwen2_5_vl_vision", PACKED)])
def test_distance_is_that_of_each_pictures_features(distance, tower, kwargs):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the [test] extra")
    scale = pytest.importorskip("sklearn.preprocessing").scale
    model, processor = composed(tower, **kwargs)
    objective = FeatureDistillationObjective(model, distance=distance)
    assert float(objective(batch_for(model, processor, objective)).detach()) == pytest.approx(0, abs=1e-6)
    before = features_alone(model, processor)
    change(model.vision_tower)
    after = features_alone(model, processor)
    expected = []
    for new, old in zip(after, before, strict=True):
        if distance == "cosine":
            expected.append(metrics.pairwise.paired_cosine_distances(new, old).mean())
        elif distance == "mse":
            expected.append(metrics.mean_squared_error(scale(old, axis=1), scale(new, axis=1)))
        else:
            gap = np.abs(scale(old, axis=1) - scale(new, axis=1))
            expected.append(np.where(gap < 2, gap**2 / 4, gap - 1).mean())
    loss = objective(batch_for(model, processor, objective))
    assert float(loss.detach()) == pytest.approx(np.mean(expected), rel=1e-3)
    assert float(loss.detach()) > 1e-3

    loss.backward()
    assert any(
        parameter.grad.abs().max() > 0 for parameter in model.vision_tower.parameters() if parameter.grad is not None
    )
    assert all(parameter.grad is None for parameter in objective.teacher.vision_tower.parameters())
    assert not objective.teacher.vision_tower.training


def test_another_tower_teaches_through_a_linear_map():
    """A convolutional teacher of another width and grid, with its own image processor; the map learns to follow it."""
    model, processor = composed()
    teacher = AutoModel.from_config(vision_config("resnet"))
    objective = FeatureDistillationObjective(model, teacher, image_size=64, distance="mse")
    assert objective.teacher.spec["hidden_size"] == objective.linear_map.out_features
    batch = batch_for(model, processor, objective)
    assert batch.extra["pixel_values"].shape == (4, 3, 64, 64)
    assert batch.inputs["pixel_values"].shape[-1] == 32
    optimizer = torch.optim.Adam([*objective.parameters(), *model.vision_tower.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective(batch_for(model, processor, objective))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_bad_input_is_one_clear_error(tmp_path):
    model, processor = composed()
    with pytest.raises(ValueError, match="Unknown distance 'kl'"):
        FeatureDistillationObjective(model, distance="kl")
    with pytest.raises(ValueError, match="takes other pixels"):
        FeatureDistillationObjective(model, composed("resnet", image_size=64)[0])
    with pytest.raises(ValueError, match="leave out linear_map=False"):
        FeatureDistillationObjective(
            model, AutoModel.from_config(vision_config("resnet")), image_size=64, linear_map=False
        )
    with pytest.raises(ValueError, match="needs weights, and a ResNetConfig has none"):
        FeatureDistillationObjective(model, vision_config("resnet"))
    objective = FeatureDistillationObjective(model)
    model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match="vision tower is frozen"):
        objective(batch_for(model, processor, objective))


def trainer(directory, model, processor, max_steps, **kwargs) -> AnyVlmTrainer:
    objectives = {"near": FeatureDistillationObjective(model, **kwargs)}
    return AnyVlmTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory),
            max_steps=max_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=5,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=samples(8),
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives),
        processing_class=processor,
        objectives=objectives,
    )


def test_resumed_equals_uninterrupted_and_the_teacher_is_saved_nowhere(tmp_path):
    def losses(run):
        return [entry["loss/near"] for entry in run.state.log_history if "loss/near" in entry]

    model, processor = composed()
    model.save_pretrained(tmp_path / "base")
    whole = trainer(tmp_path / "run", model, processor, 10)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-5"
    heads = load_file(checkpoint / "objectives.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == {"near._extra_state": (32,)}

    # From the model as it was made; from any model, with the teacher named.
    tuned = AnyVlmForConditionalGeneration.from_pretrained(checkpoint)
    for start, named in ((composed()[0], {}), (tuned, {"teacher": str(tmp_path / "base")})):
        again = trainer(tmp_path / "run", start, processor, 10, **named)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert len(losses(whole)) == 10
        assert losses(again) == pytest.approx(losses(whole), abs=1e-6)
    assert losses(whole)[-1] > 1e-5

    wrong = trainer(tmp_path / "run", AnyVlmForConditionalGeneration.from_pretrained(checkpoint), processor, 10)
    with pytest.raises(ValueError, match="not those that this training began with"):
        wrong.train(resume_from_checkpoint=str(checkpoint))
