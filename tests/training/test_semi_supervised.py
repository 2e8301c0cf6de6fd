"""The teacher's answers and confidences by hand, what is learnt from them, and the teacher in checkpoints alone."""

import copy
from collections import Counter

import pytest
import torch
from model_tester import picture
from safetensors.torch import load_file
from tiny_parts import make_sensitive, text_config, tiny_tokenizer, vision_config
from transformers import TrainingArguments

import anyvlm
from anyvlm.training.data.augmentation import Augmentation
from anyvlm.training.objectives.base import ObjectiveBatch
from anyvlm.training.semi_supervised import SemiSupervisedObjective, WithUnlabelled


ANSWERS = ["w1", "w1 w2", "w3 w4 w5", "w6"]


def question(index, answer=None):
    messages = [{"role": "user", "content": "<image> w5 w9"}]
    return {
        "messages": messages + ([{"role": "assistant", "content": answer}] if answer else []),
        "images": [picture(index)],
    }


LABELLED = [question(index, ANSWERS[index % 4]) for index in range(6)]
UNLABELLED = [question(10 + index) for index in range(10)]


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    make_sensitive(model)
    return model, processor


def forward(objective, model, samples, progress=0.0):
    batch = ObjectiveBatch(model, {}, None, objective.collate(samples, {}, objective.processor), progress)
    return objective(batch), batch.metrics


def test_every_sample_in_an_epoch():
    pairs = WithUnlabelled(LABELLED, UNLABELLED, per_sample=1)
    assert len(pairs) == 10
    assert Counter(id(pair["unlabelled"][0]) for pair in pairs) == Counter(map(id, UNLABELLED))
    assert [pair["messages"] for pair in pairs][6:] == [sample["messages"] for sample in LABELLED[:4]]
    assert len(WithUnlabelled(LABELLED, UNLABELLED, per_sample=4)) == 6
    with pytest.raises(ValueError, match="0 without"):
        WithUnlabelled(LABELLED, [])


def by_hand(model, processor, sample) -> dict[str, float]:
    """The probability of each answer when each next token is drawn among those that some answer has there."""
    collator, rows = anyvlm.AnyVlmDataCollator(processor), {}
    for answer in ANSWERS:
        batch = collator([{**sample, "messages": [*sample["messages"], {"role": "assistant", "content": answer}]}])
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            logs = model(**batch).logits[0].log_softmax(-1)
        places = (labels != -100).nonzero().squeeze(1)
        rows[tuple(labels[places].tolist())] = answer, logs[places - 1].exp()
    found = {}
    for tokens, (answer, probabilities) in rows.items():
        value = 1.0
        for place, token in enumerate(tokens):
            allowed = {other[place] for other in rows if other[:place] == tokens[:place]}
            value *= float(probabilities[place, token] / probabilities[place, list(allowed)].sum())
        found[answer] = value
    return found


def test_one_of_the_answers_with_its_probability_among_them(parts):
    model, processor = parts
    model.eval()
    objective = SemiSupervisedObjective(model, processor, ANSWERS)
    samples = [*UNLABELLED[:4], {"messages": [{"role": "user", "content": "w7"}]}]  # another length, no picture
    prompts = objective.collate([{"unlabelled": samples}], {}, processor)["prompts"]
    answers, confidences = objective.answer(model, prompts)
    for sample, answer, confidence in zip(samples, answers, confidences.tolist()):
        expected = by_hand(model, processor, sample)
        assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
        assert confidence == pytest.approx(expected[answer], rel=1e-4)
        if max(expected.values()) > 0.5:
            assert answer == max(expected, key=expected.get)
    assert any(confidence > 0.5 for confidence in confidences)


def test_answers_are_aligned_with_their_shares(parts):
    """Each step's probabilities are divided by their running mean, which begins as what is expected."""
    model, processor = parts
    model.eval()
    shares = {"w1": 1.0, "w1 w2": 1.0, "w3 w4 w5": 2.0, "w6": 4.0}
    plain = SemiSupervisedObjective(model, processor, ANSWERS)
    aligned = SemiSupervisedObjective(model, processor, ANSWERS, answer_shares=shares)
    prompts = aligned.collate([{"unlabelled": UNLABELLED}], {}, processor)["prompts"]
    first = [objective.answer(model, prompts) for objective in (plain, aligned)]
    assert first[0][0] == first[1][0] and torch.allclose(first[0][1], first[1][1])
    expected = [by_hand(model, processor, sample) for sample in UNLABELLED]
    firsts = torch.tensor([[one["w1"] + one["w1 w2"], one["w3 w4 w5"], one["w6"]] for one in expected])
    target = torch.tensor([0.25, 0.25, 0.5])
    means = target
    for _ in range(60):
        means = 0.95 * means + 0.05 * firsts.mean(0)
    for _ in range(59):
        aligned.answer(model, prompts)
    answers, confidences = aligned.answer(model, prompts)  # the last one is not among its own means
    adjusted = firsts * target / means
    adjusted = adjusted / adjusted.sum(1, keepdim=True)
    torch.testing.assert_close(aligned.answers.means[0], 0.95 * means + 0.05 * firsts.mean(0), rtol=1e-4, atol=1e-5)
    for row, (answer, confidence) in enumerate(zip(answers, confidences.tolist())):
        if answer in ("w3 w4 w5", "w6"):
            assert confidence == pytest.approx(float(adjusted[row].max()), rel=1e-3)
    assert answers != first[0][0]
    with pytest.raises(ValueError, match="a number above 0 for each"):
        SemiSupervisedObjective(model, processor, ANSWERS, answer_shares={"w1": 1.0})


def test_free_answers_are_generates_with_the_mean_of_their_tokens(parts):
    model, processor = parts
    model.eval()
    with torch.no_grad():  # so that one of them ends
        model.get_output_embeddings().weight[2] *= 6
    objective = SemiSupervisedObjective(model, processor, max_new_tokens=4)
    prompts = objective.collate([{"unlabelled": UNLABELLED[:3]}], {}, processor)["prompts"]
    answers, confidences = objective.answer(model, prompts)
    start = prompts["input_ids"].shape[1]
    output = model.generate(
        **prompts, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert answers == processor.batch_decode(output.sequences[:, start:], skip_special_tokens=True)
    for row, confidence in enumerate(confidences.tolist()):
        tokens, values = output.sequences[row, start:].tolist(), []
        for place, token in enumerate(tokens):
            logits = output.logits[place][row]
            logits[model.config.image_token_id] = -float("inf")
            values.append(float(logits.softmax(-1)[token]))
            if token == 2:
                break
        ended = 2 in tokens
        assert confidence == pytest.approx(float(torch.tensor(values).log().mean().exp()) if ended else 0.0, rel=1e-4)
    assert any(confidence > 0 for confidence in confidences)


def test_loss_is_the_models_on_confident_answers_about_changed_pictures(parts):
    model, processor = parts
    model.eval()  # no dropout here anyway
    seen = {"weak": [], "strong": []}

    def change(kind, image):
        seen[kind].append(image)
        return image.rotate(90 if kind == "strong" else 0)

    objective = SemiSupervisedObjective(
        model,
        processor,
        ANSWERS,
        threshold=0.5,
        weak=lambda image: change("weak", image),
        strong=lambda image: change("strong", image),
    )
    known = [
        {**sample, "messages": [*sample["messages"], {"role": "assistant", "content": "w6"}]} for sample in UNLABELLED
    ]
    value, metrics = forward(objective, model, [{"unlabelled": UNLABELLED}])
    with_known, metrics_of_known = forward(objective, model, [{"unlabelled": known}])
    assert torch.equal(value, with_known)  # nothing is learnt from them
    answers = [by_hand(model, processor, sample) for sample in UNLABELLED]
    best = [max(one, key=one.get) for one in answers]
    used = [place for place, one in enumerate(answers) if max(one.values()) >= 0.5]
    assert 0 < len(used) < len(UNLABELLED)
    rows = [
        {
            "messages": [*UNLABELLED[place]["messages"], {"role": "assistant", "content": best[place]}],
            "images": [UNLABELLED[place]["images"][0].rotate(90)],
        }
        for place in used
    ]
    expected = model(**anyvlm.AnyVlmDataCollator(processor)(rows)).loss * len(used) / len(UNLABELLED)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(metrics["confident"]) == pytest.approx(len(used) / len(UNLABELLED))
    assert "accuracy" not in metrics
    assert float(metrics_of_known["accuracy"]) == pytest.approx(sum(best[i] == "w6" for i in used) / len(used))
    assert len(seen["weak"]) == len(seen["strong"]) == 2 * len(UNLABELLED)
    objective.threshold = 1.0
    assert forward(objective, model, [{"unlabelled": UNLABELLED}])[0] is None
    assert forward(objective, model, LABELLED)[0] is None


def test_pictures_changed_by_an_augmentation_are_others_each_time(parts):
    model, processor = parts
    objective = SemiSupervisedObjective(model, processor, ANSWERS, strong=Augmentation(rotation=20))
    rows = [{"unlabelled": UNLABELLED[:1]}] * 2
    samples = [objective.collate([row], {}, processor)["samples"][0] for row in rows]
    first, second = (sample["images"][0].tobytes() for sample in samples)
    assert first != second
    torch.manual_seed(5)
    again = objective.collate(rows[:1], {}, processor)["samples"][0]["images"][0].tobytes()
    torch.manual_seed(5)
    assert again == objective.collate(rows[:1], {}, processor)["samples"][0]["images"][0].tobytes()


def trainer(directory, model, processor, max_steps):
    objectives = {"unlabelled": SemiSupervisedObjective(model, processor, ANSWERS, threshold=0.5, decay=0.9)}
    return anyvlm.AnyVlmTrainer(
        model=model,
        args=TrainingArguments(
            directory,
            max_steps=max_steps,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=WithUnlabelled(LABELLED, [*UNLABELLED[:5], *LABELLED[:5]], per_sample=2),
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives),
        processing_class=processor,
        objectives=objectives,
    )


def test_resumed_equals_uninterrupted_and_the_export_has_no_teacher(tmp_path, parts):
    model, processor = parts
    model.vision_tower.requires_grad_(False)
    start = copy.deepcopy(model)
    whole = trainer(tmp_path, model, processor, 6)
    whole.train()
    resumed = trainer(tmp_path, copy.deepcopy(start), processor, 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key in ("loss", "loss/unlabelled", "unlabelled/confidence"):
        logged = [[entry[key] for entry in run.state.log_history if key in entry] for run in (whole, resumed)]
        assert len(logged[0]) == 6 and logged[0] == pytest.approx(logged[1], abs=1e-6), key
    assert any("unlabelled/accuracy" in entry for entry in whole.state.log_history)
    held = load_file(tmp_path / "checkpoint-6" / "objectives.safetensors")
    assert any("teacher" in name for name in held) and not any("vision_tower" in name for name in held)
    whole.save_model(str(tmp_path / "exported"))
    assert not (tmp_path / "exported" / "objectives.safetensors").exists()
    teacher = whole.objectives["unlabelled"].teacher
    assert int(teacher.updates) == 5  # the last step's weights are taken in when the next begins
    trained = model.multi_modal_projector.state_dict()
    before = {name: tensor.clone() for name, tensor in trained.items()}
    teacher.copy_to(model)
    assert not all(torch.equal(before[name], tensor) for name, tensor in trained.items())


def test_answers_that_cannot_work_are_refused(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="two or more"):
        SemiSupervisedObjective(model, processor, ["w1"])
    with pytest.raises(ValueError, match="are the same tokens"):
        SemiSupervisedObjective(model, processor, ["w1", "w1 "])
    with pytest.raises(ValueError, match="at least 0.5"):
        SemiSupervisedObjective(model, processor, ANSWERS, threshold=0.3)
