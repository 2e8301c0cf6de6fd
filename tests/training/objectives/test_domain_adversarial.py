"""The reversed gradient against plain autograd on pictures seen one at a time, and a run of the trainer on two domains."""

import numpy as np
import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import Qwen2VLImageProcessorPil, TrainingArguments

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.training.domains import MixedDomains, without_answers
from anyvlm.training.objectives.base import ObjectiveBatch
from anyvlm.training.objectives.domain_adversarial import (
    DomainAdversarialObjective,
    classifier_gradient_penalty,
    reversal_strength,
)
from anyvlm.training.trainer import AnyVlmTrainer


def sample(domain: str, *numbers: int, size=None, answer: str | None = "w1", **more) -> dict:
    pictures = [picture(number) for number in numbers]
    pictures = [one.resize(size) for one in pictures] if size else pictures
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "w5 ?"}]
    answers = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [{"role": "user", "content": content}, *answers], "images": pictures, "domain": domain, **more}


def composed(tower="clip_vision_model", **kwargs):
    vision = tiny_configs.vision_config(tower) if kwargs else vision_config(tower)
    return anyvlm.compose(vision=vision, text=text_config("llama"), tokenizer=tiny_tokenizer(), **kwargs)


def objective_for(model, **kwargs) -> DomainAdversarialObjective:
    return DomainAdversarialObjective(model, ["photo", "drawing"], hidden_features=8, **kwargs)


def batch_for(model, processor, objective, samples, progress=0.3) -> ObjectiveBatch:
    inputs = anyvlm.AnyVlmDataCollator(processor, objectives={"domain": objective})(samples)
    extra = inputs.pop("objective_inputs")["domain"]
    outputs = model(**inputs, output_image_features=True)
    return ObjectiveBatch(model, inputs, outputs, extra, progress)


MIXED = [
    sample("photo", 0, 1, size=(90, 70)),
    sample("drawing", 2, answer=None),
    sample("photo", answer="w2"),
    sample("drawing", 3, size=(33, 120), answer=None),
]


@pytest.mark.parametrize(
    "model_and_processor",
    [
        lambda: composed(),
        lambda: composed(
            "qwen2_5_vl_vision",
            image_processor=Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64),
        ),
        lambda: composed("clip_vision_model", views={"type": "tiles", "layout": "dynamic", "max_tiles": 4}),
    ],
    ids=["one size", "packed", "tiles"],
)
def test_gradient_is_reversed_for_the_tower_alone(model_and_processor):
    model, processor = model_and_processor()
    objective = objective_for(model, strength=0.5)
    tower, head = list(model.vision_tower.parameters()), list(objective.parameters())
    batch = batch_for(model, processor, objective, MIXED)
    loss = objective(batch)
    found = torch.autograd.grad(loss, tower + head, allow_unused=True)

    pooled, domains = [], []
    for one in MIXED:
        for shown in one["images"]:
            alone = processor(text=["<image>"], images=[shown], return_tensors="pt")
            features = model.get_image_features(
                **{name: value for name, value in alone.items() if name not in ("input_ids", "attention_mask")}
            ).last_hidden_state
            pooled.append(features.flatten(0, -2).mean(0))
            domains.append(["photo", "drawing"].index(one["domain"]))
    logits = objective.classifier(torch.stack(pooled))
    plain_loss = torch.nn.CrossEntropyLoss()(logits, torch.tensor(domains))
    plain = torch.autograd.grad(plain_loss, tower + head, allow_unused=True)

    torch.testing.assert_close(loss, plain_loss)
    strength = 0.5 * (2 / (1 + np.exp(-3)) - 1)  # progress 0.3
    num_moved = 0
    for number, (ours, expected) in enumerate(zip(found, plain, strict=True)):
        if expected is None:
            assert ours is None
            continue
        factor = -strength if number < len(tower) else 1
        torch.testing.assert_close(ours, factor * expected, rtol=1e-4, atol=1e-7)
        num_moved += number < len(tower) and bool(expected.abs().max() > 1e-6)
    assert num_moved > 5
    correct = (logits.argmax(-1) == torch.tensor(domains)).float().mean()
    assert batch.metrics["accuracy"] == correct


def test_a_video_is_one_picture():
    model, processor = composed()
    objective = objective_for(model)
    video = [picture(number) for number in range(3)]
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "w5"}]}
    answer = {"role": "assistant", "content": "w1"}
    samples = [{"messages": [asked, answer], "videos": [video], "domain": "drawing"}, sample("photo", 5)]
    batch = batch_for(model, processor, objective, samples)
    assert batch.extra["domains"].tolist() == [1, 0]
    assert torch.isfinite(objective(batch))


def test_the_ramp_is_the_papers():
    """Figures computed from the formula in §5.2.2 of the paper, by hand."""
    assert [reversal_strength(progress) for progress in (0, 0.1, 0.5, 1)] == pytest.approx(
        [0, 0.46211716, 0.98661430, 0.99990920]
    )


def test_gradient_penalty_is_that_of_finite_differences():
    torch.manual_seed(0)
    classifier = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    features, domains = torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 1, 0])
    found = classifier_gradient_penalty(classifier, features, domains)

    def margin(row: torch.Tensor, domain: int) -> float:
        scores = classifier(row).tolist()
        return scores.pop(domain) - sum(scores) / 2

    lengths = []
    for row, domain in zip(features, domains.tolist()):
        steps = 1e-5 * torch.eye(4, dtype=torch.double)
        slopes = [(margin(row + step, domain) - margin(row - step, domain)) / 2e-5 for step in steps]
        lengths.append(sum(slope**2 for slope in slopes))
    assert found.item() == pytest.approx(np.mean(lengths), rel=1e-6)
    # Twice the scores, twice the gradient: what is learnt from it is a smaller scale, in the last weights too.
    (slope,) = torch.autograd.grad(found, [classifier[2].weight])
    assert (slope * classifier[2].weight).sum().item() == pytest.approx(2 * found.item(), rel=1e-6)


def test_the_penalty_is_the_classifiers_alone():
    model, processor = composed()
    plain, penalised = objective_for(model), objective_for(model, gradient_penalty=3.0)
    penalised.load_state_dict(plain.state_dict())
    tower = list(model.vision_tower.parameters())
    gradients, losses = [], []
    for objective in (plain, penalised):
        batch = batch_for(model, processor, objective, MIXED)
        losses.append(objective(batch))
        parameters = tower + list(objective.parameters())
        gradients.append(torch.autograd.grad(losses[-1], parameters, allow_unused=True))
    torch.testing.assert_close(losses[1] - losses[0], 3 * batch.metrics["gradient_penalty"])
    torch.testing.assert_close(gradients[0][: len(tower)], gradients[1][: len(tower)])
    assert not torch.allclose(gradients[0][-2], gradients[1][-2])


def test_bad_input_is_one_clear_error():
    model, processor = composed()
    with pytest.raises(ValueError, match="gradient_penalty must be 0 or more"):
        objective_for(model, gradient_penalty=-1.0)
    with pytest.raises(ValueError, match="two or more different domains"):
        DomainAdversarialObjective(model, ["photo"])
    objective = objective_for(model)
    with pytest.raises(ValueError, match="Sample 1 of the batch has None in its column 'domain'"):
        batch_for(model, processor, objective, [sample("photo", 0), sample(None, 1)])
    model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match="vision tower is frozen"):
        objective(batch_for(model, processor, objective, MIXED))
    text_alone = [sample("photo"), sample(None), {"text": "w1 w2"}]
    inputs = anyvlm.AnyVlmDataCollator(processor, objectives={"domain": objective})(text_alone)
    outputs = model(**inputs, output_image_features=True)
    assert objective(ObjectiveBatch(model, inputs, outputs, {}, 0.5)) is None


def test_answers_of_a_target_are_not_seen():
    told = {
        "messages": [
            {"role": "user", "content": "<image> w5"},
            {"role": "assistant", "content": "w1"},
            {"role": "user", "content": "<image> w6"},
            {"role": "assistant", "content": "w2"},
        ],
        "images": [picture(0), picture(1)],
    }
    kept = without_answers(told)
    assert kept["messages"] == told["messages"][:1]
    assert kept["images"] == told["images"][:1]
    placed = without_answers({"messages": [{"role": "user", "content": "w5"}], "images": [picture(0)]})
    assert placed["messages"][0]["content"][0] == {"type": "image"}
    assert len(placed["images"]) == 1

    mixed = MixedDomains([sample("?", 0), sample("?", 1)], {"drawing": [told, told, sample("?", 4)]}, "photo")
    assert len(mixed) == 3
    pairs = list(mixed)
    assert [[one["domain"] for one in pair] for pair in pairs] == [["photo", "drawing"]] * 3
    assert all(message["role"] != "assistant" for _, target in pairs for message in target["messages"])
    assert all(source["messages"][-1]["role"] == "assistant" for source, _ in pairs)
    with pytest.raises(ValueError, match="no sample in drawing"):
        MixedDomains([told], {"drawing": []})


def trainer(directory, model, processor, max_steps, objectives, **kwargs) -> AnyVlmTrainer:
    source = [sample("?", number, answer=["w1", "w2 w3"][number % 2]) for number in range(8)]
    target = [sample("?", number + 20) for number in range(8)]
    options = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 5, **kwargs}
    return AnyVlmTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory),
            max_steps=max_steps,
            per_device_train_batch_size=options.pop("batch_size", 2),
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            **options,
        ),
        train_dataset=MixedDomains(source, {"drawing": target}, "photo"),
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives),
        processing_class=processor,
        objectives=objectives,
    )


def test_trainer_counts_the_sources_labels_alone(tmp_path):
    model, processor = composed()
    run = trainer(tmp_path, model, processor, 1, {"domain": objective_for(model)}, learning_rate=0.0, batch_size=8)
    run.train()
    logged = run.state.log_history[0]
    source = [run.train_dataset[index][0] for index in range(8)]
    with torch.no_grad():
        alone = model(**anyvlm.AnyVlmDataCollator(processor)(source)).loss
    assert logged["loss/language_model"] == pytest.approx(float(alone), abs=1e-5)
    assert 0 <= logged["domain/accuracy"] <= 1
    assert logged["loss"] == pytest.approx(logged["loss/language_model"] + logged["loss/domain"], abs=1e-3)


def test_resumed_equals_uninterrupted(tmp_path):
    def run(directory, steps, seed=0):
        model, processor = composed()
        torch.manual_seed(seed)
        return trainer(directory, model, processor, steps, {"domain": objective_for(model)})

    whole = run(tmp_path / "whole", 10)
    whole.train()
    # As far as the ramp goes, the first half must be one of a run of ten steps.
    second = run(tmp_path / "whole", 10, seed=1)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name in ("loss", "loss/domain", "domain/accuracy"):
        losses = [[entry[name] for entry in each.state.log_history if name in entry] for each in (whole, second)]
        assert len(losses[0]) == len(losses[1]) == 10
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
