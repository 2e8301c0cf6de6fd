"""What a new language model makes of pictures that the old one answered about."""

from collections.abc import Sequence

import torch

from ..modeling.image_features import AnyVlmImageFeatures
from ..modeling.language_models import labelled_positions
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .cached_pictures import CachedPictures
from .prompts import PictureTexts
from .teacher_answers import TeacherAnswer


class Student:
    """A model whose projector learns, reading answers in the format of its own tokenizer and chat template.

    Args:
        model, processor: The model with the new language model.
        pictures: What the tower saw.
    """

    def __init__(self, model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor, pictures: CachedPictures):
        self.model, self.processor, self.pictures = model, processor, pictures
        self.texts = PictureTexts(processor)

    def loss(self, lessons: Sequence[TeacherAnswer], answers: Sequence[str]) -> torch.Tensor:
        """Cross-entropy of these answers, the mean over their tokens, with a graph to the projector."""
        rows, encoded = self.rows(lessons, answers), self.encoded(lessons)
        return self.model(**rows, mm_encoder_outputs={"image": encoded}, use_cache=False).loss

    @torch.no_grad()
    def measure(self, lessons: Sequence[TeacherAnswer], batch_size: int) -> dict[str, float]:
        """`agreement`: how often the old model's answer would be generated greedily, word for word and with its end.
        `held_out_loss`: cross-entropy of its tokens, their mean."""
        agrees, losses, count = 0, 0.0, 0
        for start in range(0, len(lessons), batch_size):
            batch = lessons[start : start + batch_size]
            rows, encoded = self.rows(batch, [lesson.answer for lesson in batch]), self.encoded(batch)
            logits = self.model(**rows, mm_encoder_outputs={"image": encoded}, use_cache=False).logits
            labels = rows["labels"]
            wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            interface = self.model.language_model_interface
            if interface.takes_logits_to_keep:
                positions, _ = labelled_positions(labels, interface.keeps_logits_per_sample)
                wanted = wanted.gather(1, positions) if positions.ndim == 2 else wanted[:, positions]
            # Greedy decoding gives an answer if and only if each of its tokens is the likeliest behind those before it.
            agrees += int(((logits.argmax(-1) == wanted) | (wanted == -100)).all(1).sum())
            losses += float(
                torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
                )
            )
            count += int((wanted != -100).sum())
        return {"agreement": agrees / len(lessons), "held_out_loss": losses / count}

    def answer_ids(self, lesson: TeacherAnswer, answer: str) -> torch.Tensor:
        """The new tokens of an answer to a lesson's question, without the end."""
        row = self.texts.rows([lesson.question], [answer], [self.pictures.sizes[lesson.picture]])
        ids = row["input_ids"][0][row["labels"][0] != -100]
        special = torch.tensor(self.processor.tokenizer.all_special_ids)
        return ids[~torch.isin(ids, special)].to(self.model.device)

    def encoded(self, lessons: Sequence[TeacherAnswer]) -> AnyVlmImageFeatures:
        """Image tokens of the lessons' pictures, with a graph to the projector."""
        return self.pictures.encoded([lesson.picture for lesson in lessons], self.model)

    def rows(self, lessons: Sequence[TeacherAnswer], answers: Sequence[str]) -> dict[str, torch.Tensor]:
        """The lessons' questions with these answers: `input_ids`, `attention_mask`, `labels`."""
        sizes = [self.pictures.sizes[lesson.picture] for lesson in lessons]
        rows = self.texts.rows([lesson.question for lesson in lessons], answers, sizes)
        return {name: value.to(self.model.device) for name, value in rows.items()}
