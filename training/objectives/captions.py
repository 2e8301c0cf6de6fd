"""Captions of samples, for losses of pictures and texts."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from ..collator import place_media


def caption_of(sample: Mapping[str, Any]) -> str:
    """What a sample says about its pictures: its column `caption`, or else all the assistant's words; may be empty."""
    caption = sample.get("caption")
    if caption is None:
        contents = [message.get("content") for message in sample["messages"] if message["role"] == "assistant"]
        caption = "\n".join(_words(content) for content in contents)
    return caption.strip()


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in content or [] if block.get("type") == "text")


def encode_captions(
    captions: Sequence[str], processor: ProcessorMixin, add_special_tokens: bool = True
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(captions, length)`, padded on the right, each with the end-of-text token at its
    end: the place where a causal language model has read all of it."""
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token or ""
    encoded = tokenizer(
        [caption + end for caption in captions],
        padding=True,
        padding_side="right",
        add_special_tokens=add_special_tokens,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def described_pictures(samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of pictures of each sample, for splitting those of the batch; samples that a loss of pictures and captions
    has nothing to do with, because they have no caption, count as negative.

    Raises:
        ValueError: a sample has a video, whose frames stand among the pictures.
    """
    counts = []
    for sample in samples:
        _, media = place_media(sample)
        if media["video"]:
            raise ValueError(
                "Losses of pictures and captions do not take videos. Leave samples with videos out of this stage's data, or "
                "these losses out of the stage."
            )
        count = len(media["image"])
        counts.append(count if caption_of(sample) else -count)
    return counts


def caption_keys(captions: Sequence[str]) -> torch.Tensor:
    """`(captions,)`, int64: equal for captions that are equal but for case and spaces, also in another process."""
    keys = [hashlib.sha256(" ".join(caption.lower().split()).encode()).digest()[:8] for caption in captions]
    return torch.tensor([int.from_bytes(key, "big", signed=True) for key in keys], dtype=torch.int64)
