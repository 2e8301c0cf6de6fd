"""How many tokens a sample has, without opening its pictures: for batches of equal lengths, and for packing."""

import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import ProcessorMixin

from ..collator import place_media, plain_text, render_with_assistant_spans
from .readable import UnreadablePicture, picture_name


if TYPE_CHECKING:
    from datasets import Dataset

_ORIENTATION = 0x0112
#: Orientations of a camera that lay on its side.
_SIDEWAYS = (5, 6, 7, 8)


def add_lengths(dataset: "Dataset", processor: ProcessorMixin, num_proc: int | None = None) -> "Dataset":
    """The data set with a column `length`, as `train_sampling_strategy="group_by_length"` of `TrainingArguments` reads it.

    Args:
        dataset: Of `load_training_data`, not streamed.
        num_proc: Processes to do it in.
    """
    return dataset.map(
        _with_length, fn_kwargs={"processor": processor}, num_proc=num_proc, desc="Lengths of the samples"
    )


def sample_length(sample: Mapping[str, Any], processor: ProcessorMixin) -> int:
    """Tokens of a sample, image tokens included. Of a picture only the head of its file is read.

    It is what the collator makes of it, but for the words that `image_text` writes around pictures, and for pictures whose
    views depend on how many a text has. A picture that cannot be read counts as a square one.
    """
    tokenizer = processor.tokenizer
    if sample.get("messages") is None:
        return len(tokenizer(plain_text(sample, processor)).input_ids)
    messages, media = place_media(sample)
    text, _ = render_with_assistant_spans(processor, messages)
    bos = tokenizer.bos_token
    tokens = len(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)
    if not media["image"]:
        return tokens
    sizes = [picture_size(picture) for picture in media["image"]]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    return tokens + sum(count - 1 for count in counts)


def picture_size(picture: Any) -> tuple[int, int]:
    """`(height, width)` as a viewer shows it, from the head of the file."""
    try:
        if isinstance(picture, Mapping):
            picture = picture["bytes"] if picture.get("bytes") is not None else picture["path"]
        if isinstance(picture, Image.Image):
            return picture.height, picture.width
        source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
            raise UnreadablePicture(picture_name(picture), "there is no such file")
        with Image.open(source) as opened:
            sideways = opened.getexif().get(_ORIENTATION) in _SIDEWAYS
            return (opened.width, opened.height) if sideways else (opened.height, opened.width)
    except (OSError, SyntaxError, UnreadablePicture, Image.DecompressionBombError):
        return 224, 224


def _with_length(row: Mapping[str, Any], processor: ProcessorMixin) -> dict[str, int]:
    return {"length": sample_length(row, processor)}
