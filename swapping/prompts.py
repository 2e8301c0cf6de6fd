"""Questions and answers about pictures as the rows of tokens that a model reads."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ..processing.processing_anyvlm import AnyVlmProcessor
from ..training.collator import AnyVlmDataCollator


class PictureTexts:
    """Rows of tokens for a question, and for a question with its answer, in the format of one processor.

    How many tokens stand for a picture depends on its size alone, so a blank picture of that size is processed, once for
    each text and size.

    Args:
        processor: Its chat template and tokenizer write the texts.
    """

    def __init__(self, processor: AnyVlmProcessor):
        self.processor = processor
        self._collator = AnyVlmDataCollator(processor)
        self._prompts: dict[tuple, torch.Tensor] = {}
        self._rows: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def prompts(self, questions: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` `(batch, length)`, padded on the left, up to where the answer begins."""
        rows = [self._prompt(question, size) for question, size in zip(questions, sizes, strict=True)]
        return {
            "input_ids": pad_sequence(rows, True, self.processor.tokenizer.pad_token_id, padding_side="left"),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side="left"),
        }

    def rows(
        self, questions: Sequence[str], answers: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` `(batch, length)`, padded on the right, as the collator makes them."""
        rows = [self._row(*entry) for entry in zip(questions, answers, sizes, strict=True)]
        ids, labels = zip(*rows)
        return {
            "input_ids": pad_sequence(ids, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
            "labels": pad_sequence(labels, True, -100),
        }

    def _prompt(self, question: str, size: tuple[int, int]) -> torch.Tensor:
        if (question, size) not in self._prompts:
            text = self.processor.apply_chat_template(_asked(question), add_generation_prompt=True, tokenize=False)
            bos = self.processor.tokenizer.bos_token
            row = self.processor(
                text=[text],
                images=[[_blank(size)]],
                add_special_tokens=not (bos and text.startswith(bos)),
                return_tensors="pt",
            )
            self._prompts[question, size] = row["input_ids"][0]
        return self._prompts[question, size]

    def _row(self, question: str, answer: str, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        key = (question, answer, size)
        if key not in self._rows:
            messages = [*_asked(question), {"role": "assistant", "content": answer}]
            batch = self._collator([{"messages": messages, "images": [_blank(size)]}])
            self._rows[key] = batch["input_ids"][0], batch["labels"][0]
        return self._rows[key]


def _asked(question: str) -> list[dict]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", (size[1], size[0]))
