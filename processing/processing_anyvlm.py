"""Processor of a composed model: the tower's image processor and the language model's tokenizer, unchanged."""

import os
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import PROCESSOR_NAME

from ..configuration.checkpoint_code import AUTO_MAP, write_checkpoint_code
from ..configuration.image_tokens import image_grids, num_tokens_of_grid
from ..modeling.picture_inputs import PICTURE_INPUTS
from .pictures import to_rgb_picture


class AnyVlmProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of `AnyVlmProcessor.__call__`: padding on the left is what batched generation needs."""

    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left", "return_token_type_ids": False}}


class AnyVlmProcessor(ProcessorMixin):
    """Text with pictures to model inputs.

    Args:
        image_processor: Image processor of the vision tower.
        tokenizer: Tokenizer of the language model, in which `image_token` is one token.
        chat_template: Jinja template that writes `image_token` where a picture stands in a message.
        image_token: Stands for a picture in a text; the processor repeats it as often as the picture takes tokens.
        vision_tower_spec: As in the model's config: says how many features a picture gives.
        projector_config: As in the model's config: says how many tokens they become.
    """

    valid_processor_kwargs = AnyVlmProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        vision_tower_spec=None,
        projector_config=None,
        **kwargs,
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or tokenizer.convert_ids_to_tokens(self.image_token_id) != image_token:
            raise ValueError(
                f"{image_token!r} is not a token of the tokenizer. Load the processor from a composed checkpoint, or "
                "make it with anyvlm.compose, which adds the token."
            )
        # A tokenizer remembers in its file on which side it padded last (the right, after training), and what it was loaded
        # with overrides a processor's defaults.
        tokenizer.padding_side = AnyVlmProcessorKwargs._defaults["text_kwargs"]["padding_side"]
        self.vision_tower_spec = vision_tower_spec
        self.projector_config = projector_config
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As the base class; every picture becomes 8-bit RGB first (`processing/pictures.py`)."""
        if images is not None:
            images = _picture_lists(images)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As the base class; with pictures in a list per text, each text's placeholders are counted against its own.

        Raises:
            ValueError: more or fewer pictures than placeholders.
        """
        flat = _flatten(images or [])
        if text is None and flat:
            raise ValueError(f"Pictures need a text with {self.image_token!r} where each of them belongs.")
        if text is not None and all(isinstance(sample, str) for sample in text):
            in_text = [sample.count(self.image_token) for sample in text]
            if flat is images or not images:
                if sum(in_text) != len(flat):
                    raise ValueError(self._count_message("the text", sum(in_text), len(flat)))
            elif len(images) != len(text):
                raise ValueError(
                    f"Got {len(text)} texts but {len(images)} lists of pictures. Pass one list per text, empty for a "
                    "text without pictures."
                )
            else:
                for index, (placeholders, pictures) in enumerate(zip(in_text, images)):
                    if placeholders != len(pictures):
                        raise ValueError(
                            self._count_message(f"text {index} of the batch", placeholders, len(pictures))
                        )
        super().validate_inputs(images=flat or None, text=text, videos=videos, audio=audio, **kwargs)

    def _count_message(self, where: str, placeholders: int, pictures: int) -> str:
        return (
            f"In {where}, {self.image_token!r} stands {placeholders} times, but {pictures} pictures were passed. Put "
            "it exactly once for each picture, where the picture belongs, or let processor.apply_chat_template place "
            "it from messages."
        )

    def _process_images(self, images, **kwargs) -> tuple[dict[str, Any], list[str]]:
        flat = _flatten(images)
        if not flat:
            return {}, []
        processed, replacements = super()._process_images(flat, **kwargs)
        # Image processors also return what only their own model reads (masks of padding, original sizes).
        return {key: processed[key] for key in ("pixel_values", *self._patch_keys) if key in processed}, replacements

    @property
    def _patch_keys(self) -> list[str]:
        return _patch_keys(self.vision_tower_spec)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholder of picture `image_idx`, as often as that picture takes tokens."""
        grid = _grids(self.vision_tower_spec, image_inputs)[image_idx]
        return self.image_token * num_tokens_of_grid(self.projector_config, grid)

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Token counts for pictures of the given `(height, width)` before processing; servers ask for them."""
        if image_sizes is None:
            return MultiModalData()
        grids = grids_of_sizes(self.image_processor, self.vision_tower_spec, image_sizes, **kwargs)
        tokens = [num_tokens_of_grid(self.projector_config, grid) for grid in grids]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(image_sizes))

    @property
    def model_input_names(self) -> list[str]:
        names = [name for name in self.tokenizer.model_input_names if name != "token_type_ids"]
        return [*names, "pixel_values", *self._patch_keys]

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the processor's config and, beside it, the code: `save_pretrained` and `push_to_hub` come by here."""
        if os.path.basename(json_file_path) == PROCESSOR_NAME:
            # Without an auto_map of its own, AutoProcessor would silently return a tokenizer.
            self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
            write_checkpoint_code(os.path.dirname(os.path.abspath(json_file_path)))
        super().to_json_file(json_file_path)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor") -> None:
        """Nothing to do: AutoProcessor calls this at every remote load, and `to_json_file` writes `auto_map`."""


def grids_of_sizes(
    image_processor, vision_tower_spec: dict, image_sizes: list[tuple[int, int]], **kwargs
) -> list[tuple[int, int]]:
    """Rows and columns of features of pictures of the given `(height, width)` before processing."""
    # Only the image processor knows to which size it brings a picture.
    pictures = [Image.new("RGB", (width, height)) for height, width in image_sizes]
    return _grids(vision_tower_spec, image_processor(pictures, return_tensors="pt", **kwargs))


def makes_one_size(image_processor, vision_tower_spec: dict) -> bool:
    """Whether pictures of any size take the same tokens; else each keeps its own size or proportions."""
    height, width = vision_tower_spec["image_size"]
    wide, tall = grids_of_sizes(image_processor, vision_tower_spec, [(height, 4 * width), (4 * height, width)])
    return wide == tall


def _patch_keys(vision_tower_spec: dict) -> list[str]:
    """What the tower takes beside patches, under the names of image processors; empty for whole pictures."""
    return list(PICTURE_INPUTS[vision_tower_spec["inputs"]].from_processor.values())


def _grids(vision_tower_spec: dict, image_inputs: Mapping) -> list[tuple[int, int]]:
    outputs = {key: image_inputs[key] for key in _patch_keys(vision_tower_spec) if key in image_inputs}
    return image_grids(vision_tower_spec, image_inputs["pixel_values"], outputs)


def _picture_lists(images: Any) -> list:
    """RGB pictures in a flat list, or in one list per text if any entry is a list or `None` (no picture)."""
    if not isinstance(images, (list, tuple)):
        return [to_rgb_picture(images)]
    if any(item is None or isinstance(item, (list, tuple)) for item in images):
        return [[] if item is None else _picture_lists(item) for item in images]
    return [to_rgb_picture(image) for image in images]


def _flatten(images: list) -> list:
    """The same list if it is flat, else its entries' entries."""
    return [picture for item in images for picture in item] if images and isinstance(images[0], list) else images


__all__ = ["AnyVlmProcessor"]
