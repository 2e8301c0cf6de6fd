"""Exact answers per kind of question, beside what pictures of other questions and plain guessing reach."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .data import Question


@dataclass(frozen=True)
class Score:
    """Shares from 0 to 1 over `num_questions` questions.

    Args:
        kind: Kind of question, or `"all"`.
        num_questions: How many were asked.
        exact: Answered with exactly the right string.
        shuffled: The same with each picture taken from another question of the kind.
        chance: Reached by always giving the kind's most common answer, without looking at any picture.
    """

    kind: str
    num_questions: int
    exact: float
    shuffled: float
    chance: float

    def to_dict(self) -> dict:
        return asdict(self)


def score(questions: Sequence[Question], answers: Sequence[str], shuffled_answers: Sequence[str]) -> list[Score]:
    """One score for each kind, in the order the kinds come, and last the one for all questions.

    Args:
        questions: Held-out questions.
        answers: The answer to each, given its picture.
        shuffled_answers: The answer to each, given the picture of another.

    Raises:
        ValueError: the lists are not equally long.
    """
    if not len(questions) == len(answers) == len(shuffled_answers):
        raise ValueError(
            f"{len(questions)} questions cannot be scored with {len(answers)} and {len(shuffled_answers)} answers."
        )
    rows = list(zip(questions, answers, shuffled_answers))
    scores = []
    guessed_right = 0
    for kind in dict.fromkeys(question.kind for question in questions):
        of_kind = [row for row in rows if row[0].kind == kind]
        most_common = Counter(question.answer for question, _, _ in of_kind).most_common(1)[0][1]
        guessed_right += most_common
        scores.append(_score(kind, of_kind, most_common))
    return [*scores, _score("all", rows, guessed_right)]


def _score(kind: str, rows: Sequence[tuple[Question, str, str]], guessed_right: int) -> Score:
    return Score(
        kind=kind,
        num_questions=len(rows),
        exact=sum(answer == question.answer for question, answer, _ in rows) / len(rows),
        shuffled=sum(answer == question.answer for question, _, answer in rows) / len(rows),
        chance=guessed_right / len(rows),
    )
