"""After a swap of the language model: what the old model answers, and the new projector that learns it."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import VOCABULARY, compose, make_sensitive, text_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

import anyvlm
from anyvlm.composition.starting_scale import embedding_rms
from anyvlm.modeling.image_features import AnyVlmImageFeatures
from anyvlm.swapping.cached_pictures import CachedPictures
from anyvlm.swapping.closed_form_text import TARGETS, _fit, solve_last_layer
from anyvlm.swapping.picture_paths import PicturePath
from anyvlm.swapping.student import Student
from anyvlm.swapping.teacher_answers import Teacher, TeacherAnswer, compare_answers
from anyvlm.swapping.teaching import teach
from anyvlm.swapping.text_swap import swap_language_model
from anyvlm.swapping.whitened_layers import whitened_layers


QUESTIONS = ["w1 w2 ?", "w3 ?"]


def _pictures(number: int, size=(48, 40), seed=0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (number, 2, 2, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize(size, Image.Resampling.NEAREST) for picture in small]


def _second_language_model(seed: int = 3):
    """Of another family, width and vocabulary order, with a chat template of its own."""
    torch.manual_seed(seed)
    config = text_config("gpt2")
    config.n_embd, config.n_head = 40, 4
    language_model = AutoModelForCausalLM.from_config(config)
    make_sensitive(language_model, seed)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}w79 {{ message.content }} </s>"
        "{%- else -%}w78 {{ message.content }} {% endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}w79{%- endif -%}"
    )
    return language_model, tokenizer


@pytest.fixture(scope="module")
def models():
    """An old model that answers differently about different pictures, and the same with another language model."""
    model, processor = compose("clip_vision_model", "llama")
    make_sensitive(model)
    with torch.no_grad():
        model.multi_modal_projector.output_layer.weight.mul_(5)
    language_model, tokenizer = _second_language_model()
    bare = copy.deepcopy(language_model).eval()
    return model, processor, *swap_language_model(model, processor, language_model, tokenizer=tokenizer), bare


def _cached(models, pictures) -> CachedPictures:
    cached = CachedPictures(PicturePath(models[0], models[1]))
    cached.add(pictures)
    return cached


def test_pictures_seen_once_give_the_tokens_of_the_whole_path(models):
    """Oracle: `get_image_features` from pixels, with pictures of one view and cut into tiles."""
    for model, processor in (
        models[:2],
        compose("clip_vision_model", "llama", views={"type": "tiles", "layout": "dynamic", "max_tiles": 3}),
    ):
        path = PicturePath(model, processor)
        pictures = [*_pictures(2), *_pictures(2, size=(96, 33), seed=1)]
        cached = CachedPictures(path)
        assert cached.add(pictures[:2]) + cached.add(pictures[2:]) == [0, 1, 2, 3]
        wanted = path.tokens(path.inputs([pictures[index] for index in (3, 0)]))
        for tokens, its in zip(cached.encoded([3, 0], model).pooler_output, wanted, strict=True):
            torch.testing.assert_close(tokens, its)


def test_the_old_model_answers_as_it_does_when_asked_itself(models):
    """Oracle: the processor and `generate`, one picture at a time."""
    model, processor = models[:2]
    pictures = _pictures(6)
    answers = Teacher(_cached(models, pictures), max_new_tokens=4).answer(range(6), QUESTIONS * 3)
    assert len({answer.answer for answer in answers}) > 1
    for answer, picture in zip(answers, pictures, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": answer.question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[prompt], images=[[picture]], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert list(answer.token_ids) == generated.tolist()
        assert answer.answer == processor.decode(generated, skip_special_tokens=True).strip()


def test_probabilities_of_answers_are_those_of_their_tokens(models):
    """Oracle: each answer of one word scored by the old model itself, and normalised over the answers."""
    model, processor = models[:2]
    pictures = _pictures(8)
    answers = Teacher(_cached(models, pictures), max_new_tokens=1).answer(range(8), QUESTIONS[:1] * 8)
    compare_answers(answers)
    words = sorted({answer.answer for answer in answers})
    assert len(words) > 1
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    for answer, picture in zip(answers, pictures, strict=True):
        logits = model(**processor(text=[prompt], images=[[picture]], return_tensors="pt")).logits[0, -1]
        kept = set(logits.topk(32).indices.tolist())
        scores = logits.softmax(-1)
        wanted = {w: float(scores[VOCABULARY.index(w)]) for w in words if VOCABULARY.index(w) in kept}
        total = sum(wanted.values())
        assert answer.probabilities == pytest.approx({word: score / total for word, score in wanted.items()}, rel=1e-4)


def test_answers_that_part_late_share_what_their_beginning_got():
    def answer(text, ids, top):
        kept = torch.tensor([list(step) for step in top]), torch.tensor([list(step.values()) for step in top])
        return TeacherAnswer(0, "?", text, ids, *kept)

    first = answer("a b", (1, 2, 0), [{1: 0.6, 5: 0.4}, {2: 0.5, 3: 0.5}, {0: 1.0, 9: 0.0}])
    second = answer("a c", (1, 3, 0), [{1: 0.9, 5: 0.1}, {3: 0.8, 2: 0.2}, {0: 1.0, 9: 0.0}])
    third = answer("d", (5, 0), [{5: 0.9, 1: 0.1}, {0: 1.0, 9: 0.0}])
    compare_answers([first, second, third])
    assert first.probabilities == pytest.approx({"a b": 0.3, "a c": 0.3, "d": 0.4})
    assert second.probabilities == pytest.approx({"a b": 0.18, "a c": 0.72, "d": 0.1})
    # Both begin with "a", which got 0.1.
    assert third.probabilities == pytest.approx({"a b": 0.05, "a c": 0.05, "d": 0.9})


def test_the_student_reads_what_the_collator_makes(models):
    """Oracle: the loss of a batch of the collator with pixels, and `generate`."""
    new_model, new_processor = models[2:4]
    pictures = _pictures(3)
    student = Student(new_model, new_processor, _cached(models, pictures))
    empty = torch.zeros(1, 1)
    lessons = [TeacherAnswer(index, QUESTIONS[index % 2], "w5 w6", (), empty, empty) for index in range(3)]
    samples = [
        {
            "messages": [
                {"role": "user", "content": lesson.question},
                {"role": "assistant", "content": lesson.answer},
            ],
            "images": [picture],
        }
        for lesson, picture in zip(lessons, pictures)
    ]
    batch = anyvlm.AnyVlmDataCollator(new_processor)(samples)
    with torch.no_grad():
        wanted = new_model(**batch).loss
        torch.testing.assert_close(student.loss(lessons, ["w5 w6"] * 3), wanted)
    assert student.measure(lessons, 2)["held_out_loss"] == pytest.approx(float(wanted), rel=1e-5)

    words, agrees = [], 0
    for lesson, picture in zip(lessons, pictures):
        content = [{"type": "image"}, {"type": "text", "text": lesson.question}]
        prompt = new_processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = new_processor(text=[prompt], images=[[picture]], return_tensors="pt")
        word, end = new_model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -2:].tolist()
        words.append(VOCABULARY[word])
        agrees += end == new_processor.tokenizer.eos_token_id
    said = [
        TeacherAnswer(lesson.picture, lesson.question, word, (), empty, empty) for lesson, word in zip(lessons, words)
    ]
    assert student.measure(said, 2)["agreement"] == agrees / 3


@pytest.mark.parametrize("start", ["closed_form", "kept"])
def test_teaching_changes_the_projector_alone_and_lowers_the_loss(models, start):
    old_model, old_processor, _, _, bare = models
    language_model, tokenizer = _second_language_model()
    new_model, new_processor = swap_language_model(old_model, old_processor, language_model, tokenizer=tokenizer)
    text = new_processor.tokenizer("w4 w5 w6 w7", return_tensors="pt")
    before = {name: tensor.clone() for name, tensor in new_model.state_dict().items()}
    old_state = {name: tensor.clone() for name, tensor in old_model.state_dict().items()}
    required = {name: parameter.requires_grad for name, parameter in new_model.named_parameters()}

    report = teach(
        old_model,
        old_processor,
        new_model,
        new_processor,
        _pictures(40),
        texts=QUESTIONS,
        seconds=None,
        steps=25,
        start=start,
        batch_size=8,
        max_new_tokens=3,
        progress=False,
    )
    assert report["steps"] == 25 and report["start"] == start and not report["interrupted"]
    assert report["pictures"] == 40 and report["held_out_pictures"] == 4 and report["answers"] > 1
    losses = report["held_out_loss"]
    assert losses["after"] < losses["started"] and losses["after"] < losses["before"]
    assert losses["started"] == losses["before"] or start == "closed_form"
    for name, tensor in new_model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("multi_modal_projector.")), name
    assert all(torch.equal(tensor, old_state[name]) for name, tensor in old_model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in new_model.named_parameters()} == required
    path = PicturePath(new_model, new_processor)
    tokens = torch.cat(path.tokens(path.inputs(_pictures(8))))
    assert float(tokens.square().mean().sqrt()) < 40 * float(embedding_rms(language_model))
    vocabulary = bare.config.vocab_size
    assert torch.equal(new_model(**text).logits[..., :vocabulary], bare(**text).logits)


def test_the_best_projector_stays_when_interrupted(models, monkeypatch):
    old_model, old_processor = models[:2]
    language_model, tokenizer = _second_language_model()
    new_model, new_processor = swap_language_model(old_model, old_processor, language_model, tokenizer=tokenizer)
    before = copy.deepcopy(new_model.multi_modal_projector.state_dict())
    calls = []
    loss = Student.loss

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(Student, "loss", stopped)
    report = teach(
        old_model, old_processor, new_model, new_processor, _pictures(8), seconds=None, steps=100, start="kept",
        max_new_tokens=3, progress=False, texts=QUESTIONS,
    )  # fmt: skip
    assert report["interrupted"] and report["steps"] == 2
    # No step was evaluated yet, so the best is what it came with, bit for bit.
    for name, tensor in new_model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert math.isclose(report["held_out_loss"]["after"], report["held_out_loss"]["before"], rel_tol=1e-6)


def test_what_cannot_be_taught_is_refused(models):
    old_model, old_processor, new_model, new_processor, _ = models
    arguments = (old_model, old_processor, new_model, new_processor)
    with pytest.raises(ValueError, match="seconds"):
        teach(*arguments, _pictures(4), seconds=None)
    with pytest.raises(ValueError, match="closed_form, kept"):
        teach(*arguments, _pictures(4), start="other")
    with pytest.raises(ValueError, match="list of questions"):
        teach(*arguments, _pictures(4), texts="What is this?")
    with pytest.raises(ValueError, match="at least two pictures"):
        teach(*arguments, _pictures(1), texts=QUESTIONS, progress=False)


def test_both_parts_swapped_are_taught_by_the_old_tower():
    """The old model answers through its own tower; the new one learns with its own."""
    old_model, old_processor = compose("clip_vision_model", "llama")
    make_sensitive(old_model)
    new_model, new_processor = compose("dinov2", "gpt2")
    before = {name: tensor.clone() for name, tensor in new_model.state_dict().items()}
    report = teach(
        old_model, old_processor, new_model, new_processor, _pictures(20), seconds=None, steps=10, texts=QUESTIONS,
        max_new_tokens=2, progress=False,
    )  # fmt: skip
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    for name, tensor in new_model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("multi_modal_projector.")), name


def _lessons(models, pictures):
    cached = _cached(models, pictures)
    lessons = Teacher(cached, max_new_tokens=2).answer(range(len(pictures)), QUESTIONS[:1] * len(pictures))
    compare_answers(lessons)
    return cached, lessons


def test_the_last_layer_is_solved_for_any_tokens(models):
    """Oracle: tokens that another last layer gives are found again."""
    old_model, old_processor = models[:2]
    language_model, tokenizer = _second_language_model()
    new_model, new_processor = swap_language_model(old_model, old_processor, language_model, tokenizer=tokenizer)
    new_model.requires_grad_(False)
    cached, lessons = _lessons(models, _pictures(24))
    student = Student(new_model, new_processor, cached)
    layer = new_model.multi_modal_projector.output_layer
    wanted = torch.cat(list(student.encoded(lessons).pooler_output))
    targets = dict(zip(range(24), wanted.split(16)))
    layer.weight.normal_()
    layer.bias.normal_()
    explained = _fit(student, layer, lessons, lambda batch, counts: torch.cat([targets[one.picture] for one in batch]))
    assert explained > 0.999
    torch.testing.assert_close(torch.cat(list(student.encoded(lessons).pooler_output)), wanted, atol=1e-3, rtol=1e-3)


def test_the_closed_form_that_reads_best_is_kept(models):
    old_model, old_processor = models[:2]
    language_model, tokenizer = _second_language_model()
    new_model, new_processor = swap_language_model(old_model, old_processor, language_model, tokenizer=tokenizer)
    new_model.requires_grad_(False)
    cached, lessons = _lessons(models, _pictures(24))
    student = Student(new_model, new_processor, cached)
    before = copy.deepcopy(new_model.state_dict())
    solved = solve_last_layer(student, lessons[4:], lessons[:4], cached)
    losses = {one["kind"]: one["held_out_loss"] for one in solved["candidates"]}
    assert set(losses) == {"kept", *TARGETS}
    assert solved["kind"] == min(losses, key=losses.get)
    assert student.measure(lessons[:4], 4)["held_out_loss"] == pytest.approx(losses[solved["kind"]])
    layer = {"multi_modal_projector.layers.1.weight", "multi_modal_projector.layers.1.bias"}
    changed = {name for name, tensor in new_model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == (set() if solved["kind"] == "kept" else layer)


def test_words_of_old_tokens_are_spelled_in_the_new_embeddings(models):
    """Oracle: an image token that the old output head reads as one word for certain."""
    old_model, old_processor = models[:2]
    language_model, tokenizer = _second_language_model()
    new_model, new_processor = swap_language_model(old_model, old_processor, language_model, tokenizer=tokenizer)
    cached, lessons = _lessons(models, _pictures(2))
    head = old_model.get_output_embeddings().weight
    with torch.no_grad():
        word = VOCABULARY.index("w9")
        certain = 1e4 * torch.linalg.pinv(head)[:, word]
        cached.encoded = lambda indices, model: AnyVlmImageFeatures(
            pooler_output=[certain.expand(16, -1)] * len(indices)
        )
        found = TARGETS["tokens_as_words"](Student(new_model, new_processor, cached), lessons, cached)(
            lessons, [16, 16]
        )
    wanted = new_model.get_input_embeddings().weight[new_processor.tokenizer.convert_tokens_to_ids("w9")]
    torch.testing.assert_close(found, wanted.expand(32, -1))


def test_a_model_whose_tower_was_frozen_is_swapped():
    model, processor = compose("clip_vision_model", "llama")
    model.vision_tower.requires_grad_(False)
    language_model, tokenizer = _second_language_model()
    new_model, _ = swap_language_model(model, processor, language_model, tokenizer=tokenizer)
    assert new_model.vision_tower is model.vision_tower
    assert not any(parameter.requires_grad for parameter in new_model.vision_tower.parameters())


def test_whitened_layers_compute_what_they_did():
    """And afterwards they are ordinary layers; in between, inputs have the moments of whitened ones."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    features = torch.randn(2, 50, 6) @ torch.randn(6, 6) + torch.randn(6)
    wanted, names = module(features), [name for name, _ in module.named_parameters()]
    with whitened_layers(module, lambda: module(features)) as groups:
        torch.testing.assert_close(module(features), wanted)
        parameters = [parameter for group in groups for parameter in group["params"]]
        assert {id(one) for one in parameters} == {id(one) for one in module.parameters()} and len(parameters) == 6
        # A step in whitened coordinates moves outputs as far in directions of little variance as in others.
        seen = features.flatten(0, 1) @ module[0].parametrizations.weight[0].transform.T
        moments = seen.T @ seen / len(seen)
        assert float((moments - torch.eye(6)).abs().max()) < 0.5
        with torch.no_grad():
            module[0].parametrizations.weight.original.add_(0.1)
        changed = module(features)
    assert sorted(name for name, _ in module.named_parameters()) == sorted(names)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in module.parameters())
    torch.testing.assert_close(module(features), changed)
    assert not torch.allclose(changed, wanted)
