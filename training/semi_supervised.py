"""Training on pictures without answers, with the model's own answers where it is sure of them.

FixMatch (Sohn et al. 2020) for answers in words: a teacher, the moving average of what is trained (Tarvainen & Valpola
2017), answers about a picture as it is; where it is confident, the model learns that answer about the picture changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from PIL import Image
from torch import nn
from transformers import LogitsProcessorList, ProcessorMixin

from ..processing.pictures import to_rgb_picture
from .collator import AnyVlmDataCollator, place_media
from .data.augmentation import Augmentation
from .domains import without_answers
from .fixed_answers import FixedAnswers
from .objectives.base import Objective, ObjectiveBatch
from .weight_average import WeightAverage


#: Column of a sample that holds those without answers which come along with it.
UNLABELLED = "unlabelled"

#: A picture, changed.
Change = Callable[[Image.Image], Image.Image] | Augmentation


class WithUnlabelled(torch.utils.data.Dataset):
    """Samples with answers; each brings some without. An epoch is one through the larger of the two, and the other
    begins again.

    Args:
        labelled: Samples as `AnyVlmDataCollator` takes them; anything with a length and indices.
        unlabelled: Likewise. What stands before the first answer is used; an answer, if there is one, only to say how often
            the model's own is right.
        per_sample: How many come with each labelled one.
        seed: For which samples come together.

    Raises:
        ValueError: one of them is empty.
    """

    def __init__(
        self,
        labelled: Sequence[Mapping[str, Any]],
        unlabelled: Sequence[Mapping[str, Any]],
        per_sample: int = 2,
        seed: int = 0,
    ):
        if not (len(labelled) and len(unlabelled)):
            raise ValueError(
                f"There are {len(labelled)} samples with answers and {len(unlabelled)} without. Both need some."
            )
        self.labelled, self.unlabelled, self.per_sample = labelled, unlabelled, per_sample
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(unlabelled), generator=generator).tolist()

    def __len__(self) -> int:
        return max(len(self.labelled), -(-len(self.unlabelled) // self.per_sample))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} samples, and no number {index}.")
        first = index * self.per_sample
        places = [self._order[number % len(self._order)] for number in range(first, first + self.per_sample)]
        return {**self.labelled[index % len(self.labelled)], UNLABELLED: [self.unlabelled[place] for place in places]}


class SemiSupervisedObjective(Objective):
    """The loss on answers that a teacher is sure of, about pictures without any (see `WithUnlabelled`).

    The teacher is the moving average of what is trained; its weights are in the trainer's checkpoints and not in the
    exported model. To export the teacher itself, which is often the better model: `objective.teacher.copy_to(model)`.

    Logs `confident` (the share of the unlabelled samples that is used), `confidence` (mean over all of them) and, where
    answers are known, `accuracy` of the teacher's answers that are used.

    Args:
        model: What is trained, after it was chosen which parts are.
        processor: Its processor.
        answers: All possible answers, for questions that have a few. The teacher chooses one, and its confidence is the
            probability of that among all. Without them it answers freely, and its confidence is the mean (geometric)
            probability of the tokens.
        answer_shares: How often each of the answers is right, if that is known: `"equal"`, or a number for each. With few
            labels this decides whether the model's own answers help at all, see `FixedAnswers`.
        threshold: Least confidence of an answer that is learnt.
        decay: Of the moving average.
        weak: Change of the pictures that the teacher sees: a function from picture to picture, or an
            `anyvlm.training.data.Augmentation`. Default: none.
        strong: Change of the pictures that the model learns from. Without one the model learns what its average knows
            about the same picture, which is little. It must leave the answer true.
        max_new_tokens: Of a free answer; one that has not ended by then is not learnt.
        max_length: Of a sample, as for `AnyVlmDataCollator`.

    Raises:
        ValueError: `threshold` is not a probability, or with `answers` not at least 0.5; the answers cannot be told apart.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        answers: Sequence[str] | None = None,
        answer_shares: str | Mapping[str, float] | None = None,
        threshold: float = 0.95,
        decay: float = 0.999,
        weak: Change | None = None,
        strong: Change | None = None,
        max_new_tokens: int = 32,
        max_length: int | None = None,
    ):
        super().__init__()
        if not (0.5 if answers else 0) <= threshold <= 1:
            raise ValueError(
                f"threshold={threshold} must be a probability" + (", with answers=… at least 0.5." if answers else ".")
            )
        self.processor, self.threshold, self.max_new_tokens = processor, threshold, max_new_tokens
        self.weak, self.strong = weak, strong
        self.collator = AnyVlmDataCollator(processor, max_length=max_length)
        self.end_tokens = _end_tokens(model, processor)
        self.answers = FixedAnswers(processor, answers, self.end_tokens, answer_shares) if answers else None
        self.teacher = WeightAverage(model, decay)
        self.register_buffer("updated_at", torch.zeros(()))

    @classmethod
    def settings_errors(cls, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
        errors = []
        answers, shares = settings.get("answers"), settings.get("answer_shares")
        is_list = isinstance(answers, (list, tuple)) and all(isinstance(answer, str) for answer in answers)
        if answers is not None and not (is_list and len(set(answers)) == len(answers) > 1):
            errors.append(("answers", "write a list of all answers that there are, two or more, each a text."))
        elif shares is not None and answers is None:
            errors.append(("answer_shares", "shares are those of `answers`; write these too, or leave it out."))
        elif shares not in (None, "equal") and not (
            isinstance(shares, Mapping)
            and set(shares) == set(answers)
            and all(_is_number(share) and share > 0 for share in shares.values())
        ):
            errors.append(("answer_shares", "write equal, or a number above 0 for each of the answers."))
        bounds = {"threshold": (0.5 if answers else 0, 1), "decay": (0, 0.999999)}
        for key, (least, most) in bounds.items():
            if key in settings and not (_is_number(settings[key]) and least <= settings[key] <= most):
                errors.append((key, f"{settings[key]!r} is not a number from {least:g} to {most:g}."))
        for key in ("max_new_tokens", "max_length"):
            if settings.get(key) is not None and (not _is_number(settings[key]) or settings[key] < 1):
                errors.append((key, f"{settings[key]!r} is not a number of tokens."))
        for key in ("weak", "strong"):
            try:
                Augmentation.from_settings(settings.get(key))
            except ValueError as error:
                errors.append((key, str(error).removeprefix("augmentation: ")))
        return errors

    @classmethod
    def try_settings(cls, model: nn.Module, processor: ProcessorMixin, settings: Mapping[str, Any]) -> None:
        if settings.get("answers"):
            FixedAnswers(processor, settings["answers"], _end_tokens(model, processor), settings.get("answer_shares"))

    @classmethod
    def from_settings(
        cls, model: nn.Module, settings: Mapping[str, Any], processor: ProcessorMixin | None = None
    ) -> "SemiSupervisedObjective":
        """As of all objectives; `weak` and `strong` as a recipe says `augmentation`, and `strong` is `true` there if nothing
        is said."""
        changes = {
            "weak": Augmentation.from_settings(settings.get("weak")),
            "strong": Augmentation.from_settings(settings.get("strong", True)),
        }
        return super().from_settings(model, {**settings, **changes}, processor)

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """`prompts`: the teacher's inputs, padded on the left; `samples`: what the model will learn from, still without
        answers; `known`: their answers, or `None`."""
        unlabelled = [one for sample in samples for one in sample.get(UNLABELLED) or ()]
        if not unlabelled:
            return {}
        asked = [without_answers(one) for one in unlabelled]
        weak = [_changed(one, self.weak) for one in asked]
        texts = [
            processor.apply_chat_template(one["messages"], add_generation_prompt=True, tokenize=False) for one in weak
        ]
        bos = processor.tokenizer.bos_token
        pictures = [one["images"] for one in weak]
        prompts = processor(
            text=texts,
            images=pictures if any(pictures) else None,
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return {
            "prompts": dict(prompts),
            "samples": [_changed(one, self.strong) for one in asked],
            "known": [_answer(one) for one in unlabelled],
        }

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        """The language model's loss on the answers that the teacher is sure of, times their share of the unlabelled
        samples: the fewer there are, the less they weigh."""
        model = extract_model_from_parallel(batch.model)
        if batch.progress > float(self.updated_at):  # a step was made since
            self.teacher.update(model)
            self.updated_at.fill_(batch.progress)
        if not batch.extra:
            return None
        answers, confidences = self.answer(model, batch.extra["prompts"])
        used = [place for place, confidence in enumerate(confidences.tolist()) if confidence >= self.threshold]
        device = confidences.device
        batch.metrics["confident"] = torch.tensor(len(used) / len(answers), device=device)
        batch.metrics["confidence"] = confidences.mean()
        known = [place for place in used if batch.extra["known"][place] is not None]
        if known:
            right = [answers[place] == batch.extra["known"][place] for place in known]
            batch.metrics["accuracy"] = torch.tensor(sum(right) / len(right), device=device)
        if not used:
            return None
        samples = [batch.extra["samples"][place] for place in used]
        answered = [
            {**sample, "messages": [*sample["messages"], {"role": "assistant", "content": answers[place]}]}
            for place, sample in zip(used, samples)
        ]
        inputs = {name: tensor.to(device) for name, tensor in self.collator(answered).items()}
        # Not through what wraps the model in a run of several processes: that counts on one forward pass per step.
        return model(**inputs).loss * (len(used) / len(answers))

    @torch.no_grad()
    def answer(self, model: nn.Module, prompts: Mapping[str, torch.Tensor]) -> tuple[list[str], torch.Tensor]:
        """The teacher's answers, and its confidence in each, `(batch,)`.

        Args:
            prompts: As the processor makes them, padded on the left.
        """
        was_training = model.training
        model.eval()
        start = prompts["input_ids"].shape[1]
        chooser = None if self.answers is None else self.answers.chooser(start)
        try:
            with self.teacher.applied(model):
                output = model.generate(
                    **prompts,
                    logits_processor=None if chooser is None else LogitsProcessorList([chooser]),
                    max_new_tokens=self.max_new_tokens if self.answers is None else self.answers.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=self.end_tokens,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
        finally:
            model.train(was_training)
        tokens = output.sequences[:, start:]
        logs = torch.stack([scores.float().log_softmax(-1) for scores in output.scores], dim=1)
        logs = logs.gather(-1, tokens[..., None]).squeeze(-1)
        is_end = torch.isin(tokens, torch.tensor(self.end_tokens, device=tokens.device))
        counts = (is_end.cumsum(1) - is_end.long() == 0).float()  # up to the first end, itself included
        total = (logs * counts).masked_fill(counts == 0, 0).sum(1)
        if self.answers is None:
            confidences = (total / counts.sum(1)).exp() * is_end.any(1)
            texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
            return [text.strip() for text in texts], confidences
        chooser.learn()
        lengths = counts.sum(1).long().tolist()
        rows = [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths)]
        return [self.answers.answers[row] for row in rows], total.exp()


def _end_tokens(model: nn.Module, processor: ProcessorMixin) -> list[int]:
    ends = extract_model_from_parallel(model).generation_config.eos_token_id
    ends = processor.tokenizer.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _changed(sample: Mapping[str, Any], change: Change | None) -> dict[str, Any]:
    """The sample with its pictures in `images`, each changed."""
    messages, media = place_media(sample)
    if media["video"]:
        raise ValueError("Samples without answers have a video, which semi-supervised training does not take yet.")
    for message in messages:
        if not isinstance(message.get("content"), str):
            message["content"] = [
                {"type": "image"} if block.get("type") == "image" else block for block in message.get("content") or ()
            ]
    pictures = [to_rgb_picture(picture) for picture in media["image"]]
    if isinstance(change, Augmentation):
        # It changes by a key alone; torch's numbers are those that a resumed training goes on with.
        pictures = [change(one, [int(torch.randint(2**31, ()))]) for one in pictures]
    elif change is not None:
        pictures = [change(one) for one in pictures]
    return {"messages": messages, "images": pictures}


def _answer(sample: Mapping[str, Any]) -> str | None:
    """The first answer of a sample, if it has one."""
    for message in sample["messages"]:
        if message["role"] == "assistant":
            content = message["content"]
            return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
    return None
