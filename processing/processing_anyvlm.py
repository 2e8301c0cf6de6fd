"""Processor of a composed model: the tower's image processor and the language model's tokenizer, unchanged."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import PROCESSOR_NAME

from ..configuration.checkpoint_code import AUTO_MAP, write_checkpoint_code
from ..configuration.image_views import (
    check_image_views,
    depends_on_pictures,
    has_several_views,
    plan_views,
)
from ..configuration.instructions import INSTRUCTION_KEYS
from ..configuration.part_exchange import load_exchanged
from ..configuration.video_frames import num_video_tokens, takes_clips, video_settings
from .image_text import check_image_text
from .instruction_processor import InstructionProcessor
from .media_order import in_text_order, read_videos
from .media_views import check_grids, clips_of, picture_tokens_text, take_apart, video_tokens_text
from .picture_text_processor import PictureTextProcessor, VideoText
from .pictures import to_rgb_picture
from .pictures_first import PicturesFirstProcessor
from .prepared_views import grids_of_outputs, patch_keys, prepare_views, tokens_of_sizes
from .prompt_form import PromptFormProcessor, check_prompt_form
from .seen_pictures import SeenPicture, seen_picture, seen_pictures_outputs
from .video import Video, sample_video


class AnyVlmProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of `AnyVlmProcessor.__call__`: padding on the left is what batched generation needs."""

    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left", "return_token_type_ids": False}}


class AnyVlmProcessor(PromptFormProcessor, PictureTextProcessor, PicturesFirstProcessor, InstructionProcessor):
    """Text with pictures and videos to model inputs.

    Videos go along with pictures, as rows of them: `num_frames`, `fps` and `do_sample_frames`, as for transformers, say
    in a call which frames are looked at, where it is not to be what `video_frames` says.

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
        prompt_form: What a text must have behind its pictures and at its end (`processing/prompt_form.py`).
        video_token: Stands for a video in a text. It need not be a token: image tokens take its place.
        video_frames: As in the model's config: says which frames are looked at, and how many tokens they take.
        fusion: As in the model's config. With another than `"embed"` a picture has one token in the text.
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
        prompt_form=None,
        video_token="<video>",
        video_frames=None,
        fusion="embed",
        **kwargs,
    ):
        check_image_views(image_views)
        check_image_text(image_text, image_views, fusion)
        check_prompt_form(prompt_form)
        if video_token in image_token or image_token in video_token:
            raise ValueError(f"{image_token!r} and {video_token!r} cannot be told apart. Choose another video_token.")
        self.image_token, self.video_token = image_token, video_token
        self.pictures_first = pictures_first
        self.prompt_form = prompt_form
        self.image_views, self.image_text, self.video_frames = image_views, image_text, video_frames
        repeated = self.repeated_token
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
        self.fusion = fusion
        self.set_instruction_tokenizer(qformer_tokenizer, projector_config)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As the base class; every picture becomes 8-bit RGB first (`processing/pictures.py`), and with videos,
        pictures and sampled frames (`processing/video.py`) come back together, in the order of the texts."""
        if images is not None:
            images = _picture_lists(images)
        if videos is None and images and text is not None and depends_on_pictures(self.image_views):
            texts = [text] if isinstance(text, str) else text
            images = in_text_order(texts, (self.image_token, self.video_token), images, None)
        if videos is None:
            _, text, _, audio = super().prepare_inputs_layout(text=text, audio=audio, **kwargs)
            return images, text, None, audio
        if text is None:
            raise ValueError(f"Videos need a text with {self.video_token!r} where each of them belongs.")
        _, text, _, audio = super().prepare_inputs_layout(text=text, audio=audio, **kwargs)
        settings, is_clip = self._sampling(kwargs), takes_clips(self.vision_tower_spec)
        videos = read_videos(videos, lambda video: sample_video(video, settings, is_clip))
        return in_text_order(text, (self.image_token, self.video_token), images, videos), text, None, audio

    def _sampling(self, kwargs: Mapping) -> dict:
        """`video_frames` with what a call asks for."""
        asked = {**kwargs, **kwargs.get("videos_kwargs", {})}
        if asked.get("do_sample_frames") is False:
            if takes_clips(self.vision_tower_spec):
                raise ValueError("This vision tower takes clips of its own length. Leave out do_sample_frames=False.")
            return {**video_settings(self), "num_frames": sys.maxsize, "max_frames": sys.maxsize}
        return video_settings(self, num_frames=asked.get("num_frames"), fps=asked.get("fps"))

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As the base class; with pictures in a list per text, each text's placeholders are counted against its own.

        Raises:
            ValueError: more or fewer pictures than placeholders.
        """
        flat = _flatten(images or [])
        if text is None and flat:
            raise ValueError(f"Pictures need a text with {self.image_token!r} where each of them belongs.")
        if text is not None and all(isinstance(sample, str) for sample in text):
            if not any(isinstance(medium, Video) for medium in flat):  # these were counted when they were put in order
                in_text_order(text, (self.image_token, self.video_token), images, None)
            # What is counted need not be counted again by the base class, which knows pictures with pixels alone.
            text = [sample.replace(self.video_token, "").replace(self.image_token, "") for sample in text]
        super().validate_inputs(text=text, audio=audio, **kwargs)

    def _process_images(self, images, **kwargs) -> tuple[dict[str, Any], list[str]]:
        resample = getattr(self.image_processor, "resample", None)
        in_text = [1] * len(images)
        if images and isinstance(images[0], list):
            in_text = [sum(not isinstance(medium, Video) for medium in media) for media in images for _ in media]
        media = [
            take_apart(medium, self.image_views, resample, pictures)
            for medium, pictures in zip(_flatten(images), in_text, strict=True)
        ]
        if not media:
            return {}, []
        views = [view for medium in media for view in medium.views]
        outputs = {}
        if views:
            outputs = prepare_views(self.image_processor, views, self.vision_tower_spec, self.image_views, **kwargs)
            check_grids(self, views, grids_of_outputs(self.vision_tower_spec, outputs))
        numbers = [len(medium.seen.grids if medium.seen else medium.views) for medium in media]
        if any(medium.video for medium in media):
            if takes_clips(self.vision_tower_spec):
                outputs["pixel_values"] = clips_of(outputs["pixel_values"], media)
                numbers = [1 if medium.video else number for medium, number in zip(media, numbers)]
            frames = [number if medium.video else 0 for medium, number in zip(media, numbers)]
            outputs["num_video_frames"] = torch.tensor(frames)
        if any(medium.seen for medium in media):
            outputs.update(seen_pictures_outputs([medium.seen for medium in media], numbers))
        more = depends_on_pictures(self.image_views)
        sizes = [(*medium.size, medium.pictures)[: 2 + more] for medium in media if medium.video is None]
        if has_several_views(self.image_views) and sizes:
            outputs["original_sizes"] = torch.tensor(sizes)
        grids = iter(grids_of_outputs(self.vision_tower_spec, outputs))
        texts = []
        for medium, number in zip(media, numbers):
            own = [next(grids) for _ in range(number)]
            arguments = (self, self.image_text, self.repeated_token)
            if medium.video is None:
                texts.append(picture_tokens_text(*arguments, medium.plan, medium.size, own))
            else:
                texts.append(VideoText(video_tokens_text(*arguments, medium.video, own)))
        return outputs, texts

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """Token counts for pictures of the given `(height, width)`, and for videos of `(frames, height, width)` of which
        all frames are looked at, before processing; servers ask for them.

        No picture is made, unless only the image processor knows to which size it brings one.
        """
        counts = {}
        if video_sizes is not None:
            counts["num_video_tokens"] = [num_video_tokens(self, *size) for size in video_sizes]
        if image_sizes is None:
            return MultiModalData(**counts)
        tokens = tokens_of_sizes(self, self.image_processor, image_sizes, **kwargs)
        views = [len(plan_views(self.image_views, height, width).views) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=views, **counts)

    @property
    def model_input_names(self) -> list[str]:
        names = [name for name in self.tokenizer.model_input_names if name != "token_type_ids"]
        sizes = ["original_sizes"] if has_several_views(self.image_views) else []
        instructions = INSTRUCTION_KEYS if self.qformer_tokenizer is not None else ()
        return [*names, "pixel_values", *patch_keys(self.vision_tower_spec), *sizes, "num_video_frames", *instructions]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As transformers'.

        Args:
            vision_tower, language_model: The same as for the model's `from_pretrained`: then the processor is the one that
                goes with these parts.
        """
        exchanged = load_exchanged("processor", cls.from_pretrained, pretrained_model_name_or_path, kwargs)
        if exchanged is not None:
            return exchanged
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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


def _picture_lists(images: Any) -> list:
    """RGB pictures in a flat list, or in one list per text if any entry is a list or `None` (no picture)."""
    if not isinstance(images, (list, tuple)):
        return [_picture(images)]
    if any(item is None or isinstance(item, (list, tuple)) for item in images):
        return [[] if item is None else _picture_lists(item) for item in images]
    return [_picture(image) for image in images]


def _picture(image: Any) -> Image.Image | SeenPicture:
    return seen_picture(image) or to_rgb_picture(image)


def _flatten(images: list) -> list:
    """The same list if it is flat, else its entries' entries."""
    return [picture for item in images for picture in item] if images and isinstance(images[0], list) else images


__all__ = ["AnyVlmProcessor"]
