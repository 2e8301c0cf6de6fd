"""Processor of a composed model: the tower's image processor and the language model's tokenizer, unchanged."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import PROCESSOR_NAME

from ..configuration.checkpoint_code import AUTO_MAP, write_checkpoint_code
from ..configuration.image_tokens import image_grids, token_grid
from ..configuration.image_views import (
    check_image_views,
    feature_grids,
    has_newline,
    has_several_views,
    num_image_tokens,
    num_joined_tokens,
    plan_views,
)
from ..configuration.instructions import INSTRUCTION_KEYS
from ..modeling.picture_inputs import PICTURE_INPUTS
from .image_text import check_image_text, has_text_between_views, joined_text, picture_prefix, picture_text
from .instruction_processor import InstructionProcessor
from .pictures import to_rgb_picture
from .pictures_first import PicturesFirstProcessor
from .view_cutting import cut_views


class AnyVlmProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of `AnyVlmProcessor.__call__`: padding on the left is what batched generation needs."""

    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left", "return_token_type_ids": False}}


class AnyVlmProcessor(PicturesFirstProcessor, InstructionProcessor):
    """Text with pictures to model inputs.

    Args:
        image_processor: Image processor of the vision tower.
        tokenizer: Tokenizer of the language model, in which `image_token` is one token.
        qformer_tokenizer: Tokenizer of the projector, if it reads the instruction beside the picture
            (`processing/instruction_processor.py`).
        chat_template: Jinja template that writes `image_token` where a picture stands in a message.
        image_token: Stands for a picture in a text; the processor repeats it as often as the picture takes tokens (or
            `image_text["token"]`, if there is one).
        vision_tower_spec: As in the model's config: says how many features a picture gives.
        projector_config: As in the model's config: says how many tokens they become.
        image_views: As in the model's config: says into which views a picture is cut.
        image_text: What is written around the tokens of a picture and between those of its views
            (`processing/image_text.py`).
        pictures_first: Image tokens come before everything else, bos and padding included
            (`processing/pictures_first.py`).
    """

    valid_processor_kwargs = AnyVlmProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        qformer_tokenizer=None,
        chat_template=None,
        image_token="<image>",
        vision_tower_spec=None,
        projector_config=None,
        image_views=None,
        image_text=None,
        pictures_first=False,
        **kwargs,
    ):
        check_image_views(image_views)
        check_image_text(image_text)
        if has_newline(image_views) and has_text_between_views(image_text):
            raise ValueError(
                "image_text writes something between the views of a picture, whose tokens image_views joins into one map "
                '("join": "spatial"). Leave out either.'
            )
        self.image_token = image_token
        self.pictures_first = pictures_first
        self.image_views, self.image_text = image_views, image_text
        repeated = self._repeated_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(repeated)
        if self.image_token_id is None or tokenizer.convert_ids_to_tokens(self.image_token_id) != repeated:
            raise ValueError(
                f"{repeated!r} is not a token of the tokenizer. Load the processor from a composed checkpoint, or "
                "make it with anyvlm.compose, which adds the token."
            )
        # A tokenizer remembers in its file on which side it padded last (the right, after training), and what it was loaded
        # with overrides a processor's defaults.
        tokenizer.padding_side = AnyVlmProcessorKwargs._defaults["text_kwargs"]["padding_side"]
        self.vision_tower_spec = vision_tower_spec
        self.projector_config = projector_config
        self.set_instruction_tokenizer(qformer_tokenizer, projector_config)
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
        views = flat
        if has_several_views(self.image_views):
            resample = getattr(self.image_processor, "resample", None)
            plans = [plan_views(self.image_views, picture.height, picture.width) for picture in flat]
            views = [view for picture, plan in zip(flat, plans) for view in cut_views(picture, plan, resample)]
            if self.image_views.get("view_size") is None:
                kwargs["do_resize"] = False  # the views have the sizes that the tower is to see
        processed = self.image_processor(views, **{**kwargs, "return_tensors": kwargs.get("return_tensors") or "pt"})
        # Image processors also return what only their own model reads (masks of padding, original sizes).
        outputs = {key: processed[key] for key in ("pixel_values", *self._patch_keys) if key in processed}
        if has_several_views(self.image_views):
            outputs["original_sizes"] = torch.tensor([(picture.height, picture.width) for picture in flat])
        return outputs, self.picture_texts(outputs)

    @property
    def _patch_keys(self) -> list[str]:
        return _patch_keys(self.vision_tower_spec)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What the text has in the place of picture `image_idx`: its tokens, and what is written around them."""
        return self.picture_texts(image_inputs)[image_idx]

    def picture_texts(self, image_inputs: Mapping) -> list[str]:
        """What stands for each picture.

        Raises:
            ValueError: the image processor makes another size of a view than was planned.
        """
        grids = grids_of_outputs(self.vision_tower_spec, image_inputs)
        if has_several_views(self.image_views):
            sizes = [tuple(size) for size in image_inputs["original_sizes"].tolist()]
        else:
            sizes = [(1, 1)] * len(grids)  # one view each, whatever their size
        texts, start = [], 0
        for size in sizes:
            plan = plan_views(self.image_views, *size)
            end = start + len(plan.views)
            found = grids[start:end]
            if has_several_views(self.image_views) and found != feature_grids(self, plan):
                raise ValueError(
                    f"A picture of {size[0]}x{size[1]} pixels (height x width) was to give the grids of features "
                    f"{feature_grids(self, plan)}, but the image processor makes {found} of its views. Leave the "
                    "processor's sizes as they were saved."
                )
            tokens = [token_grid(self.projector_config, grid) for grid in found]
            if has_text_between_views(self.image_text):
                texts.append(picture_text(self.image_text, self._repeated_token, plan, tokens))
            else:
                number = num_joined_tokens(self.image_views, plan, tokens, *size)
                texts.append(joined_text(self.image_text, self._repeated_token, number))
            start = end
        return texts

    @property
    def _repeated_token(self) -> str:
        return (self.image_text or {}).get("token", self.image_token)

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """As the base class; pictures are numbered in each text where `image_text` says so."""
        numbers = [number for sample in text for number in range(sample.count(self.image_token))]
        replacements = [
            picture_prefix(self.image_text, number) + replacement
            for number, replacement in zip(numbers, images_replacements)
        ]
        return super().get_text_with_replacements(text, replacements, *args, **kwargs)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Mapping, modalities: list[str]) -> None:
        """As the base class, which looks for the token of the user's text; what is repeated may be another.

        Raises:
            ValueError: a text was cut off inside a picture.
        """
        token = self._repeated_token
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

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Token counts for pictures of the given `(height, width)` before processing; servers ask for them.

        No picture is made, unless only the image processor knows to which size it brings one.
        """
        if image_sizes is None:
            return MultiModalData()
        if has_several_views(self.image_views) or not (kwargs or self.vision_tower_spec["any_size"]):
            tokens = [num_image_tokens(self, height, width) for height, width in image_sizes]
        else:
            grids = grids_of_sizes(self.image_processor, self.vision_tower_spec, image_sizes, **kwargs)
            tokens = [math.prod(token_grid(self.projector_config, grid)) for grid in grids]
        views = [len(plan_views(self.image_views, height, width).views) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=views)

    @property
    def model_input_names(self) -> list[str]:
        names = [name for name in self.tokenizer.model_input_names if name != "token_type_ids"]
        sizes = ["original_sizes"] if has_several_views(self.image_views) else []
        instructions = INSTRUCTION_KEYS if self.qformer_tokenizer is not None else ()
        return [*names, "pixel_values", *self._patch_keys, *sizes, *instructions]

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
    return grids_of_outputs(vision_tower_spec, image_processor(pictures, return_tensors="pt", **kwargs))


def makes_one_size(image_processor, vision_tower_spec: dict) -> bool:
    """Whether pictures of any size take the same tokens; else each keeps its own size or proportions."""
    height, width = vision_tower_spec["image_size"]
    wide, tall = grids_of_sizes(image_processor, vision_tower_spec, [(height, 4 * width), (4 * height, width)])
    return wide == tall


def _patch_keys(vision_tower_spec: dict) -> list[str]:
    """What the tower takes beside patches, under the names of image processors; empty for whole pictures."""
    return list(PICTURE_INPUTS[vision_tower_spec["inputs"]].from_processor.values())


def grids_of_outputs(vision_tower_spec: dict, image_inputs: Mapping) -> list[tuple[int, int]]:
    """Rows and columns of features of each picture that an image processor has made ready."""
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
