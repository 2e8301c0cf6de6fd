"""A processor that writes image tokens, and what stands around them, in the places of pictures and videos."""

from collections.abc import Mapping
from itertools import islice

from transformers import ProcessorMixin

from ..configuration.image_views import has_several_views, plan_views
from .image_text import picture_prefix, share_boundaries
from .media_views import picture_tokens_text
from .prepared_views import grids_of_outputs


class VideoText(str):
    """What stands for a video, among the texts that stand for pictures."""


class PictureTextProcessor(ProcessorMixin):
    """Each placeholder of a text becomes what `picture_tokens_text` (`processing/media_views.py`) says for its picture."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What the text has in the place of picture `image_idx`: its tokens, and what is written around them."""
        return self.picture_texts(image_inputs)[image_idx]

    def picture_texts(self, image_inputs: Mapping) -> list[str]:
        """What stands for each picture of a batch without videos."""
        grids = grids_of_outputs(self.vision_tower_spec, image_inputs)
        several = has_several_views(self.image_views)
        sizes = image_inputs["original_sizes"].tolist() if several else [(1, 1)] * len(grids)
        texts, remaining = [], iter(grids)
        for size in sizes:
            plan = plan_views(self.image_views, *size)
            own = [next(remaining) for _ in plan.views]
            texts.append(picture_tokens_text(self, self.image_text, self.repeated_token, plan, size[:2], own))
        return texts

    @property
    def repeated_token(self) -> str:
        """What is repeated for the tokens of a picture: `image_token`, or `image_text["token"]`."""
        return (self.image_text or {}).get("token", self.image_token)

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """As the base class; pictures are numbered in each text where `image_text` says so, and videos have come with the
        pictures."""
        numbers = [number for sample in text for number in range(sample.count(self.image_token))]
        videos = [replacement for replacement in images_replacements if isinstance(replacement, VideoText)]
        pictures = [replacement for replacement in images_replacements if not isinstance(replacement, VideoText)]
        pictures = [
            picture_prefix(self.image_text, number) + replacement for number, replacement in zip(numbers, pictures)
        ]
        rest = iter(pictures)
        pictures = [
            picture
            for sample in text
            for picture in share_boundaries(
                self.image_text, sample, self.image_token, list(islice(rest, sample.count(self.image_token)))
            )
        ]
        return super().get_text_with_replacements(text, pictures, videos, *args[1:], **kwargs)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        """As the base class, which looks for the token of the user's text; what is repeated may be another.

        Raises:
            ValueError: a text was cut off inside a picture.
        """
        token = self.repeated_token
        if token == self.image_token:
            return super()._check_special_mm_tokens(text, text_inputs, modalities)
        written = [sample.count(token) for sample in text]
        found = [list(ids).count(self.image_token_id) for ids in text_inputs["input_ids"]]
        if found != written:
            raise ValueError(
                f"The texts have {written} image tokens, of which {found} are left after the tokenizer. Switch truncation "
                "off or raise max_length: a picture cannot be cut off."
            )
        return super()._check_special_mm_tokens(text, text_inputs, [name for name in modalities if name != "image"])
