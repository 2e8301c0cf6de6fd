"""What a trained model answers about pictures without labels, and how sure it is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .cached_pictures import CachedPictures
from .prompts import PictureTexts


#: Tokens of each step of an answer whose probabilities are kept.
_KEPT_TOKENS = 32


@dataclass
class TeacherAnswer:
    """An answer about one picture.

    Args:
        picture: Index of the picture.
        question: What was asked.
        answer: What was answered, greedily, without special tokens.
        token_ids: The same in the teacher's tokens, end of the answer included.
        top_ids, top_probabilities: `(len(token_ids), kept)`: the likeliest tokens at each step of the answer.
        probabilities: What the answer could have been, as far as others were answered to the same question, with the
            teacher's probability; sums to 1. Filled in by `compare_answers`.
    """

    picture: int
    question: str
    answer: str
    token_ids: tuple[int, ...]
    top_ids: torch.Tensor
    top_probabilities: torch.Tensor
    probabilities: dict[str, float] = field(default_factory=dict)


class Teacher:
    """Asks the old model.

    Args:
        pictures: What its tower saw; the model and its processor are those of the pictures' path.
        max_new_tokens: Longest answer, in tokens; longer ones are cut off.
    """

    def __init__(self, pictures: CachedPictures, max_new_tokens: int = 32):
        self.pictures = pictures
        self.model, self.processor = pictures.path.model, pictures.path.processor
        self.texts = PictureTexts(self.processor)
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def answer(self, indices: Sequence[int], questions: Sequence[str]) -> list[TeacherAnswer]:
        """One greedy answer for each picture (by its index) and question."""
        prompts = self.texts.prompts(questions, [self.pictures.sizes[index] for index in indices])
        prompts = {name: value.to(self.model.device) for name, value in prompts.items()}
        outputs = self.model.generate(
            **prompts,
            mm_encoder_outputs={"image": self.pictures.encoded(indices, self.model)},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        generated = outputs.sequences[:, prompts["input_ids"].shape[1] :].cpu()
        logits = torch.stack(outputs.logits, dim=1).float().cpu()
        top = logits.topk(min(_KEPT_TOKENS, logits.shape[-1]), dim=-1)
        probabilities = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
        ends = self._ends()
        answers = []
        for row, (index, question) in enumerate(zip(indices, questions, strict=True)):
            ids = generated[row].tolist()
            length = next((step + 1 for step, token in enumerate(ids) if token in ends), len(ids))
            text = self.processor.decode(ids[:length], skip_special_tokens=True).strip()
            top_ids, likely = top.indices[row, :length].clone(), probabilities[row, :length].clone()
            answers.append(TeacherAnswer(index, question, text, tuple(ids[:length]), top_ids, likely))
        return answers

    def _ends(self) -> set[int]:
        stated = self.model.generation_config.eos_token_id
        stated = stated if isinstance(stated, (list, tuple)) else [stated]
        return {token for token in (*stated, self.processor.tokenizer.eos_token_id) if token is not None}


def compare_answers(answers: Sequence[TeacherAnswer], max_alternatives: int = 64) -> None:
    """Fill in the probability of every answer that was given to the same question, for each picture.

    Two answers part at one token, and what the teacher thought of either there was computed while it answered. So the
    probability of another answer is that of the common beginning times that of its first other token, and what follows
    is taken for certain: right where the answers to a question are few and differ early ("a boot", "a bag"), and free.
    With more than `max_alternatives` different answers to a question (descriptions, which hardly repeat) only the most
    frequent are compared. Unlike probabilities of tokens, those of answers mean the same for any tokenizer.
    """
    tokens: dict[str, dict[str, tuple[int, ...]]] = {}
    frequency: dict[str, Counter] = {}
    for answer in answers:
        tokens.setdefault(answer.question, {}).setdefault(answer.answer, answer.token_ids)
        frequency.setdefault(answer.question, Counter())[answer.answer] += 1
    common = {question: counts.most_common(max_alternatives) for question, counts in frequency.items()}
    for answer in answers:
        alternatives = {text: tokens[answer.question][text] for text, _ in common[answer.question]}
        alternatives[answer.answer] = answer.token_ids
        # Several answers may begin with the same other token: they share what it got as they share the answers given.
        shares = {text: _parting(answer, ids) for text, ids in alternatives.items()}
        groups: dict[tuple, float] = {}
        for text, (place, _) in shares.items():
            groups[place] = groups.get(place, 0.0) + frequency[answer.question][text]
        weights = {
            text: probability * frequency[answer.question][text] / groups[place]
            for text, (place, probability) in shares.items()
        }
        total = sum(weights.values())
        answer.probabilities = {text: weight / total for text, weight in weights.items() if weight > 0}


def _parting(answer: TeacherAnswer, other: tuple[int, ...]) -> tuple[tuple, float]:
    """Where another answer parts from this one, and its probability there."""
    probability = 1.0
    for step, token in enumerate(answer.token_ids):
        its = other[step] if step < len(other) else None
        probability_of = dict(zip(answer.top_ids[step].tolist(), answer.top_probabilities[step].tolist()))
        if its != token:
            return (step, its), probability * probability_of.get(its, 0.0)
        probability *= probability_of.get(token, 0.0)
    return (len(answer.token_ids), None), probability
