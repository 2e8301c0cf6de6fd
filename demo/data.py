"""Pictures of handwritten digits with questions about them, from scikit-learn alone.

The *pictures* are split before any question is made, so a held-out digit is never seen in training, not even as one
of the two digits of a sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits


#: Pixels of every picture: a strip of paper with room for two digits.
PICTURE_HEIGHT, PICTURE_WIDTH = 32, 64
#: Pixels a digit of 8x8 is enlarged to. The rest of the strip is margin, in which training pictures are moved about.
DIGIT_EDGE = 26
#: Farthest that a training picture is moved from its place, in pixels, in either direction.
LARGEST_SHIFT = 2

WHICH_DIGIT, EVEN_OR_ODD, LARGER_THAN_FIVE, SUM = KINDS = ("which digit", "even or odd", "larger than five", "sum")

#: Several wordings of each kind, so that the model must read the question and not its length.
WORDINGS = {
    WHICH_DIGIT: ("Which digit is this?", "What number do you see?"),
    EVEN_OR_ODD: ("Is this number even or odd?", "Even or odd?"),
    LARGER_THAN_FIVE: ("Is this number larger than five?", "Is the digit above 5?"),
    SUM: ("What is the sum of the two digits?", "Add the two numbers."),
}
#: Sums come twice as often in training: they have the most answers, and need both digits.
TRAINING_KINDS = (*KINDS, SUM)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `pictures` `(n, 8, 8)` with ink from 0 to 16, `labels` `(n,)` from 0 to 9."""

    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Question:
    """One question about one picture. `digits` are the indices of the digits drawn, in the `Digits` they came from."""

    kind: str
    text: str
    answer: str
    picture: Image.Image
    digits: tuple[int, ...]

    def messages(self) -> list[dict[str, Any]]:
        """The question as a conversation without its answer."""
        content = [{"type": "image"}, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": content}]

    def sample(self) -> dict[str, Any]:
        """The question with its answer, as `AnyVlmDataCollator` takes it."""
        return {
            "messages": [*self.messages(), {"role": "assistant", "content": self.answer}],
            "images": [self.picture],
        }


def split_digits(held_out_share: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 digits as `(training, held out)`; no picture is in both."""
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    num_held_out = round(held_out_share * len(order))
    parts = (order[num_held_out:], order[:num_held_out])
    return tuple(Digits(bunch.images[part], bunch.target[part]) for part in parts)


def answer_of(kind: str, labels: Sequence[int]) -> str:
    """The right answer to a question of this kind about digits with these labels."""
    if kind == SUM:
        return str(int(sum(labels)))
    (label,) = labels
    if kind == WHICH_DIGIT:
        return str(int(label))
    if kind == EVEN_OR_ODD:
        return "odd" if label % 2 else "even"
    if kind == LARGER_THAN_FIVE:
        return "yes" if label > 5 else "no"
    raise ValueError(f"Unknown kind of question {kind!r}. Choose one of: {', '.join(KINDS)}.")


def draw(pictures: Sequence[np.ndarray], generator: np.random.Generator | None = None) -> Image.Image:
    """Draw one digit in the middle of a strip, or two side by side: dark ink on white, 64x32 pixels.

    Args:
        pictures: One or two digits `(8, 8)`, ink from 0 to 16.
        generator: Moves each digit by up to `LARGEST_SHIFT` pixels. `None`: each stands in its place.
    """
    strip = Image.new("RGB", (PICTURE_WIDTH, PICTURE_HEIGHT), "white")
    cell = PICTURE_WIDTH / len(pictures)
    for position, picture in enumerate(pictures):
        paper = Image.fromarray(np.round(255 * (1 - picture / 16)).astype(np.uint8))
        paper = paper.resize((DIGIT_EDGE, DIGIT_EDGE), Image.Resampling.BICUBIC)
        shift = (0, 0) if generator is None else generator.integers(-LARGEST_SHIFT, LARGEST_SHIFT, 2, endpoint=True)
        left = round(cell * position + (cell - DIGIT_EDGE) / 2) + int(shift[0])
        top = (PICTURE_HEIGHT - DIGIT_EDGE) // 2 + int(shift[1])
        strip.paste(paper.convert("RGB"), (left, top))
    return strip


def make_question(
    kind: str, digits: Digits, indices: tuple[int, ...], wording: int, generator: np.random.Generator | None = None
) -> Question:
    """A question of this kind about the digits at `indices`; `generator` as in `draw`."""
    return Question(
        kind=kind,
        text=WORDINGS[kind][wording],
        answer=answer_of(kind, digits.labels[list(indices)]),
        picture=draw(digits.pictures[list(indices)], generator),
        digits=indices,
    )


class TrainingQuestions(torch.utils.data.Dataset):
    """`num_samples` random questions about `digits`, made when they are asked for; equal for equal seeds."""

    def __init__(self, digits: Digits, num_samples: int, seed: int = 0):
        self.digits = digits
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def question(self, index: int) -> Question:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        generator = np.random.default_rng((self.seed, index))
        kind = TRAINING_KINDS[index % len(TRAINING_KINDS)]
        indices = generator.integers(len(self.digits), size=2 if kind == SUM else 1)
        wording = int(generator.integers(len(WORDINGS[kind])))
        return make_question(kind, self.digits, tuple(indices.tolist()), wording, generator)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.question(index).sample()


def held_out_questions(digits: Digits, per_kind: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of every kind about digits of which none was trained on.

    Each digit is asked about once in each kind; in sums it stands once on the left and once on the right.

    Args:
        digits: The held-out digits.
        per_kind: Questions of each kind. Default, and at most: one for each digit.
        seed: For the order, the partners in sums and the wordings.
    """
    generator = np.random.default_rng(seed)
    per_kind = min(per_kind or len(digits), len(digits))
    questions = []
    for kind in KINDS:
        order = generator.permutation(len(digits))
        partners = np.roll(order, 1)
        for place in range(per_kind):
            indices = (order[place], partners[place]) if kind == SUM else (order[place],)
            wording = place % len(WORDINGS[kind])
            questions.append(make_question(kind, digits, tuple(int(index) for index in indices), wording))
    return questions


def shuffled_pictures(questions: Sequence[Question], seed: int = 0) -> list[Image.Image]:
    """For each question, the picture of another question of its kind.

    One cycle through all questions of a kind (Sattolo 1986), so that none keeps its own picture, and each picture is
    used once. A model that does not look at pictures answers as well with these as with the right ones.

    Raises:
        ValueError: a kind has only one question, which could only keep its picture.
    """
    generator = np.random.default_rng(seed)
    pictures = [question.picture for question in questions]
    for kind in dict.fromkeys(question.kind for question in questions):
        places = [place for place, question in enumerate(questions) if question.kind == kind]
        if len(places) < 2:
            raise ValueError(f"There is only one question of kind {kind!r}; pictures cannot be shuffled.")
        for last in range(len(places) - 1, 0, -1):
            other = int(generator.integers(last))
            first, second = places[last], places[other]
            pictures[first], pictures[second] = pictures[second], pictures[first]
    return pictures
