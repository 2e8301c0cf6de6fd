"""Where the projector starts after another language model was put in: its last layer, solved for in closed form.

The last layer is a linear map, so for any tokens that one would like to see in a picture's place, the layer that comes
nearest is a ridge regression away (`ridge.py`). What one would like to see is text that the new language model can read:
its own embeddings of words, or a prompt that was tuned for an answer. All ideas are tried, and the one with which the new
language model finds the old answers on held-out pictures least surprising is kept, or none.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .cached_pictures import CachedPictures
from .ridge import RidgeSums, solve
from .student import Student
from .teacher_answers import TeacherAnswer
from .tuned_prompts import tune_prompts


STARTS = ("closed_form", "kept")
#: Pictures that are fitted to; more make the last layer hardly better.
MAX_FITTED = 512
BATCH_SIZE = 32
FOLDS = 4
#: Words of the old language model that an image token is read as.
READ_WORDS = 8


def solve_last_layer(
    student: Student, lessons: Sequence[TeacherAnswer], held_out: Sequence[TeacherAnswer], seen: CachedPictures
) -> dict[str, Any]:
    """Give the projector's last layer the best of the closed forms, if that is better than what it has.

    Args:
        student: Whose projector is changed, in place.
        lessons: To fit to, with `probabilities`.
        held_out: To choose by.
        seen: The same pictures as the old model sees them.

    Returns:
        `kind`: `"kept"` or one of `TARGETS`; `candidates`: each with its `held_out_loss`, and the `explained_variance` of
        its targets on pictures that it was not fitted to; `seconds`. `reason` where nothing could be tried.
    """
    started = time.monotonic()
    lessons = lessons[:MAX_FITTED]
    layer = student.model.multi_modal_projector.output_layer
    best = student.measure(held_out, BATCH_SIZE)["held_out_loss"]
    found: dict[str, Any] = {"kind": "kept", "candidates": [{"kind": "kept", "held_out_loss": best}]}
    if not isinstance(layer, nn.Linear) or not _gives_tokens(student, layer, lessons[:1]):
        found["reason"] = "the projector's last layer is not a linear map that gives the image tokens"
    elif len(lessons) < FOLDS:
        found["reason"] = f"fewer than {FOLDS} pictures"
    else:
        kept = [parameter.detach().clone() for parameter in layer.parameters()]
        for kind, prepared in TARGETS.items():
            targets = prepared(student, lessons, seen)
            if targets is None:
                continue
            explained = _fit(student, layer, lessons, targets)
            loss = student.measure(held_out, BATCH_SIZE)["held_out_loss"]
            found["candidates"].append({"kind": kind, "held_out_loss": loss, "explained_variance": explained})
            if loss < best and math.isfinite(loss):
                best, found["kind"] = loss, kind
                kept = [parameter.detach().clone() for parameter in layer.parameters()]
        with torch.no_grad():
            for parameter, value in zip(layer.parameters(), kept, strict=True):
                parameter.copy_(value)
    return {**found, "seconds": time.monotonic() - started}


class _Seen:
    """What goes into a layer, and what comes out, while it is watched."""

    def __init__(self, layer: nn.Module):
        self.inputs = self.outputs = None
        self._handle = layer.register_forward_hook(self._keep)

    def _keep(self, module, inputs, outputs) -> None:
        self.inputs, self.outputs = inputs[0], outputs

    def __enter__(self) -> "_Seen":
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()


@torch.no_grad()
def _gives_tokens(student: Student, layer: nn.Linear, lessons: Sequence[TeacherAnswer]) -> bool:
    """Whether the layer's outputs are the image tokens, each once and in order."""
    with _Seen(layer) as seen:
        tokens = torch.cat(list(student.encoded(lessons).pooler_output))
    outputs = None if seen.outputs is None else seen.outputs.flatten(0, -2)
    return outputs is not None and outputs.shape == tokens.shape and torch.equal(outputs, tokens)


@torch.no_grad()
def _fit(
    student: Student,
    layer: nn.Linear,
    lessons: Sequence[TeacherAnswer],
    targets: Callable[[Sequence[TeacherAnswer], Sequence[int]], torch.Tensor],
) -> float:
    """Solve for the layer; returns the explained variance."""
    size = min(BATCH_SIZE, len(lessons) // FOLDS)
    folds = [RidgeSums(layer.in_features, layer.out_features) for _ in range(FOLDS)]
    with _Seen(layer) as seen:
        for number, start in enumerate(range(0, len(lessons), size)):
            batch = lessons[start : start + size]
            tokens = student.encoded(batch).pooler_output
            wanted = targets(batch, [len(of_one) for of_one in tokens])
            folds[number % FOLDS].update(seen.inputs.flatten(0, -2), wanted)
    solution = solve(folds)
    layer.weight.copy_(solution.weight)
    if layer.bias is not None:
        layer.bias.copy_(solution.bias)
    return solution.explained_variance


@dataclass
class _AnswerWords:
    """The answer itself stands where the picture is, over and over; the language model has only to repeat it.

    Answers of which the old model is not sure are mixed as it weighs them.
    """

    student: Student
    in_order: bool

    def __post_init__(self):
        self._embedded: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, lessons: Sequence[TeacherAnswer], counts: Sequence[int]) -> torch.Tensor:
        """Targets `(all tokens, width)` for pictures of so many tokens each."""
        mixed: list[torch.Tensor] = []
        for lesson, count in zip(lessons, counts, strict=True):
            parts = []
            for answer, probability in lesson.probabilities.items():
                words = self._words(lesson, answer)
                if self.in_order:
                    words = words.repeat(-(-count // len(words)), 1)[:count]
                else:
                    words = words.mean(0).expand(count, -1)
                parts.append(probability * words)
            mixed.append(sum(parts))
        return torch.cat(mixed)

    def _words(self, lesson: TeacherAnswer, answer: str) -> torch.Tensor:
        key = lesson.question, answer
        if key not in self._embedded:
            ids = self.student.answer_ids(lesson, answer)
            self._embedded[key] = self.student.model.get_input_embeddings()(ids.unsqueeze(0))[0].float()
        return self._embedded[key]


@dataclass
class _TokensAsWords:
    """Each old image token is read as words through the old language model's output head, and those words are spelled in
    the new one's embeddings (the "logit lens" of nostalgebraist 2020, on image tokens)."""

    student: Student
    seen: CachedPictures

    def __post_init__(self):
        self._embedded: dict[int, torch.Tensor] = {}

    def __call__(self, lessons: Sequence[TeacherAnswer], counts: Sequence[int]) -> torch.Tensor:
        old = self.seen.path
        indices = [lesson.picture for lesson in lessons]
        tokens = torch.cat(list(self.seen.encoded(indices, old.model).pooler_output))
        logits = old.model.get_output_embeddings()(tokens).float()
        top = logits.topk(min(READ_WORDS, logits.shape[-1]), dim=-1)
        weights = top.values.softmax(-1)
        return torch.stack(
            [
                sum(weight * self._word(token, old.processor) for weight, token in zip(of_one, ids))
                for of_one, ids in zip(weights, top.indices.tolist())
            ]
        )

    def _word(self, token: int, processor) -> torch.Tensor:
        if token not in self._embedded:
            embeddings = self.student.model.get_input_embeddings()
            text = processor.tokenizer.decode([token], skip_special_tokens=True)
            ids = self.student.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([ids], dtype=torch.long, device=self.student.model.device)
            spelled = embeddings(ids)[0].float()
            self._embedded[token] = spelled.mean(0) if len(spelled) else spelled.new_zeros(spelled.shape[-1])
        return self._embedded[token]


@torch.no_grad()
def _tokens_as_words(student: Student, lessons: Sequence[TeacherAnswer], seen: CachedPictures) -> Callable | None:
    """`None` where the old tower gave another number of tokens."""
    indices = [lesson.picture for lesson in lessons]
    old = seen.encoded(indices, seen.path.model).pooler_output
    new = student.encoded(lessons).pooler_output
    same = [len(tokens) for tokens in old] == [len(tokens) for tokens in new]
    return _TokensAsWords(student, seen) if same else None


def _tuned_prompts(student: Student, lessons: Sequence[TeacherAnswer], seen: CachedPictures) -> Callable | None:
    """Prompts tuned for each answer by itself, mixed by the answers' probabilities; `None` if there are too many answers.

    The one idea here that takes gradient steps, few of them and on the answers' texts alone.
    """
    prompts = tune_prompts(student, lessons)

    def targets(batch: Sequence[TeacherAnswer], counts: Sequence[int]) -> torch.Tensor:
        return torch.cat(
            [
                sum(share * prompts[lesson.question, answer] for answer, share in lesson.probabilities.items())
                for lesson in batch
            ]
        )

    return targets if prompts else None


#: What an image token should be like, by name; each makes, of a student and its lessons, what gives the targets of a batch.
TARGETS: dict[str, Callable[[Student, Sequence[TeacherAnswer], CachedPictures], Callable | None]] = {
    "answer_words": lambda student, lessons, seen: _AnswerWords(student, in_order=True),
    "mean_answer_word": lambda student, lessons, seen: _AnswerWords(student, in_order=False),
    "tokens_as_words": _tokens_as_words,
    "tuned_prompts": _tuned_prompts,
}
