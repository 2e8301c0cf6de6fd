"""Perception LM. Its tower is one of timm, which is not installed everywhere; the class takes any that states its width."""

import ast
import math
from functools import cache, reduce
from pathlib import Path

import numpy as np
import transformers
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    LlamaConfig,
    PerceptionLMConfig,
    PerceptionLMProcessor,
    SiglipVisionConfig,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, SizeDict

from ..tiny_tokenizer import tiny_tokenizer
from . import NativeCase, chat_template
from .llava import TEXT, VISION


EDGE = VISION["image_size"]


@cache
def _arrangement_methods() -> dict:
    """How Perception LM's image processor chooses tiles, out of a file that imports torchvision."""
    path = Path(transformers.__file__).parent / "models/perception_lm/image_processing_perception_lm.py"
    names = ("_factors", "_find_supported_aspect_ratios", "_get_image_height_width")
    names += ("_fit_image_to_canvas", "_find_closest_aspect_ratio")
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    namespace = {"math": math, "reduce": reduce}
    exec(compile(ast.Module(found, []), path, "exec"), namespace)
    return {name: namespace[name] for name in names}


class PerceptionLMImageProcessorPil(PilBackend):
    """Perception LM's image processor, which needs torchvision, in Pillow: its own methods choose the tiles."""

    resample = 3
    image_mean, image_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    size = {"height": EDGE, "width": EDGE}
    vision_input_type, tile_size, max_num_tiles = "thumb+tile", EDGE, 4

    def __getattr__(self, name):
        if name not in _arrangement_methods():
            raise AttributeError(name)
        return _arrangement_methods()[name].__get__(self)

    def _preprocess(self, images, resample, rescale_factor, return_tensors, **kwargs) -> BatchFeature:
        edge, all_views = self.tile_size, []
        for image in images:
            views = [self.resize(image, SizeDict(height=edge, width=edge), resample=resample)]
            if self.vision_input_type == "thumb+tile":
                height, width = image.shape[-2:]
                columns, rows = self._fit_image_to_canvas(width, height, edge) or self._find_closest_aspect_ratio(
                    width, height, edge
                )
                large = self.resize(image, SizeDict(height=rows * edge, width=columns * edge), resample=resample)
                views += [
                    large[:, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
                    for row in range(rows)
                    for column in range(columns)
                ]
            views = [self.rescale(view, rescale_factor) for view in views]
            all_views.append(np.stack([self.normalize(view, self.image_mean, self.image_std) for view in views]))
        return BatchFeature({"pixel_values": all_views}, tensor_type=return_tensors)


# The static method takes no self.
PerceptionLMImageProcessorPil._factors = staticmethod(lambda number: _arrangement_methods()["_factors"](number))


class ImagesOnlyPerceptionLMProcessor(PerceptionLMProcessor):
    """Without a video processor, which transformers has only where torchvision is."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def _tokenizer():
    return tiny_tokenizer(extra_special_tokens={"image_token": "<image>", "video_token": "<video>"})


def _config(tied: bool, vision_class, **settings) -> PerceptionLMConfig:
    tokenizer = _tokenizer()
    return PerceptionLMConfig(
        vision_config=vision_class(**VISION, model_args={"embed_dim": VISION["hidden_size"]}),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(config: PerceptionLMConfig, **settings) -> PerceptionLMProcessor:
    return ImagesOnlyPerceptionLMProcessor(
        image_processor=PerceptionLMImageProcessorPil(**settings),
        tokenizer=_tokenizer(),
        patch_size=config.vision_config.patch_size,
        pooling_ratio=config.projector_pooling_ratio,
        chat_template=chat_template(),
    )


#: Of four tiles each, as its processor can only batch pictures with equally many; in squares and in a row.
SIZES = ((48, 60), (100, 400), (33, 31))

CASES = (
    NativeCase(
        "perception_lm, a token dropped, pooled",
        lambda tied: _config(tied, CLIPVisionConfig, projector_pooling_ratio=2),
        _processor,
        sizes=SIZES,
        pixel_values=lambda inputs: inputs["pixel_values"].flatten(0, 1),
    ),
    NativeCase(
        "perception_lm, one view",
        lambda tied: _config(tied, SiglipVisionConfig, vision_use_cls_token=False),
        lambda config: _processor(config, vision_input_type="vanilla"),
        pixel_values=lambda inputs: inputs["pixel_values"].flatten(0, 1),
    ),
)
