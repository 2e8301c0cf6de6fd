"""A processor that puts the tokens of pictures before everything else, bos and padding included (BLIP-2, InstructBLIP).

There the text has no placeholder: it is tokenized alone, and the image tokens are set in front of what comes out.
"""

from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin


class PicturesFirstProcessor(ProcessorMixin):
    """With `pictures_first`, what the classes below it make of a text has its image tokens in front."""

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """As the base class. With `pictures_first`, placeholders may be left out of the text; wherever they stand, the
        tokens of the pictures come before the text.

        Raises:
            ValueError: with `pictures_first`, texts with another number of image tokens than one another.
        """
        if self.pictures_first and videos is not None:
            raise ValueError(
                "This model's image tokens come before the text, where videos have no place. Pass pictures."
            )
        if not self.pictures_first or images is None or text is None:
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        texts = self._with_placeholders([text] if isinstance(text, str) else list(text), images)
        inputs = super().__call__(images=images, text=texts, videos=videos, audio=audio, **kwargs)
        if "pixel_values" not in inputs and "tower_features" not in inputs:
            return inputs
        replacements = iter(self.picture_texts(inputs))
        in_front = ["".join(next(replacements) for _ in range(sample.count(self.image_token))) for sample in texts]
        ids = self.tokenizer(in_front, add_special_tokens=False, return_token_type_ids=False)["input_ids"]
        if len({len(row) for row in ids}) > 1:
            raise ValueError(
                "This model's image tokens come before padding, so every text of a batch needs as many of them: "
                f"got {[len(row) for row in ids]}. Give every text the same number of pictures."
            )
        values = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        values["offset_mapping"] = [[(0, 0)] * len(row) for row in ids]  # of no characters
        for key in values.keys() & inputs.keys():
            inputs[key] = _joined(values[key], inputs[key])
        return inputs

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """As the base class; the text is tokenized without image tokens where these come first."""
        if self.pictures_first:
            images_replacements = [""] * len(images_replacements)
        return super().get_text_with_replacements(text, images_replacements, *args, **kwargs)

    def _with_placeholders(self, texts: list[str], images: Any) -> list[str]:
        """Placeholders in front of texts that have none: for the pictures in a text's own list, else one for each text,
        or all of them for a single text."""
        if any(self.image_token in sample for sample in texts):
            return texts
        pictures = images if isinstance(images, (list, tuple)) else [images]
        if any(item is None or isinstance(item, (list, tuple)) for item in pictures):
            counts = [0 if item is None else len(item) for item in pictures]
        else:
            counts = [len(pictures)] if len(texts) == 1 else [1] * len(texts)
        if len(counts) != len(texts):
            return texts  # the base class says what is wrong
        return [self.image_token * count + sample for count, sample in zip(counts, texts)]


def _joined(in_front: list[list], rest: Any) -> Any:
    if isinstance(rest, torch.Tensor):
        return torch.cat([torch.tensor(in_front, dtype=rest.dtype, device=rest.device), rest], dim=1)
    return [[*before, *row] for before, row in zip(in_front, rest)]
