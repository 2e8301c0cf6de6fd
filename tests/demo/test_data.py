"""The demo's questions: nothing leaks from training to held-out, and every answer is right."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from anyvlm.demo.data import KINDS, TrainingQuestions, draw, held_out_questions, shuffled_pictures, split_digits


def fingerprint(picture: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def split():
    return split_digits(seed=3)


def test_split_shares_out_every_picture_once(split):
    training, held_out = split
    everything = sorted(map(fingerprint, load_digits().images))
    assert sorted([*map(fingerprint, training.pictures), *map(fingerprint, held_out.pictures)]) == everything
    assert len(held_out) > 300


def test_training_asks_only_about_training_pictures(split):
    training, _ = split
    questions = TrainingQuestions(training, 400, seed=1)
    for index in range(len(questions)):
        question = questions.question(index)
        assert all(0 <= digit < len(training) for digit in question.digits)


def test_answers_follow_from_the_labels(split):
    """Recomputed from scikit-learn's labels, by looking the drawn pictures up."""
    training, held_out = split
    label_of = {fingerprint(image): int(label) for image, label in zip(load_digits().images, load_digits().target)}
    questions = [
        *((training, TrainingQuestions(training, 200).question(index)) for index in range(200)),
        *((held_out, question) for question in held_out_questions(held_out, per_kind=60)),
    ]
    seen = set()
    for digits, question in questions:
        labels = [label_of[fingerprint(digits.pictures[index])] for index in question.digits]
        expected = {
            "which digit": str(labels[0]),
            "even or odd": ("even", "odd")[labels[0] % 2],
            "larger than five": "yes" if labels[0] in (6, 7, 8, 9) else "no",
            "sum": str(sum(labels)),
        }[question.kind]
        assert question.answer == expected
        assert len(labels) == (2 if question.kind == "sum" else 1)
        seen.add(question.kind)
    assert seen == set(KINDS)


def test_held_out_pictures_are_those_of_their_digits(split):
    _, held_out = split
    for question in held_out_questions(held_out, per_kind=5):
        drawn = draw(held_out.pictures[list(question.digits)])
        assert np.array_equal(np.asarray(drawn), np.asarray(question.picture))


def test_equal_seeds_give_equal_questions(split):
    training, _ = split
    first, again, other = (TrainingQuestions(training, 50, seed=seed) for seed in (1, 1, 2))
    assert all(
        np.array_equal(np.asarray(first.question(i).picture), np.asarray(again.question(i).picture)) for i in range(50)
    )
    assert any(first.question(i).digits != other.question(i).digits for i in range(50))


def test_shuffled_pictures_come_from_another_question_of_the_kind(split):
    _, held_out = split
    questions = held_out_questions(held_out, per_kind=40)
    pictures = shuffled_pictures(questions, seed=0)
    for kind in KINDS:
        places = [place for place, question in enumerate(questions) if question.kind == kind]
        own = [id(questions[place].picture) for place in places]
        shuffled = [id(pictures[place]) for place in places]
        assert sorted(own) == sorted(shuffled), "a picture is missing or used twice"
        assert all(before != after for before, after in zip(own, shuffled)), "a question kept its picture"
