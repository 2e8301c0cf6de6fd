"""Aya Vision and Cohere2 Vision. Their language model scales logits, which these classes do not."""

import ast
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import transformers
from transformers import (
    AyaVisionConfig,
    AyaVisionProcessor,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionProcessor,
    GotOcr2ImageProcessorPil,
    SiglipVisionConfig,
)

from ..tiny_tokenizer import tiny_tokenizer
from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT, VISION


@cache
def _arrangement_of_cohere2_vision():
    """Cohere2 Vision's own function, out of a file that imports torchvision."""
    path = Path(transformers.__file__).parent / "models/cohere2_vision/image_processing_cohere2_vision.py"
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    namespace = {"np": np, "lru_cache": lru_cache}
    exec(compile(ast.Module(functions, []), path, "exec"), namespace)
    return namespace["get_optimal_tiled_canvas"]


class Cohere2VisionImageProcessorPil(GotOcr2ImageProcessorPil):
    """Cohere2 Vision's image processor, which needs torchvision, in Pillow: tiles in the arrangement that its own function
    chooses."""

    crop_to_patches = True
    patch_size = 16

    def crop_image_to_patches(self, image, min_patches, max_patches, patch_size=None, resample=None, **kwargs):
        height, width = patch_size.height, patch_size.width
        columns, rows = _arrangement_of_cohere2_vision()(image.shape[-2:], (height, width), min_patches, max_patches)
        size = type(patch_size)(height=rows * height, width=columns * width)
        resized = self.resize(image, size, resample=resample)
        tiles = [
            resized[..., row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(rows)
            for column in range(columns)
        ]
        return tiles if len(tiles) == 1 else [*tiles, self.resize(image, patch_size, resample=resample)]


AYA_TOKENS = (
    "<image>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "TILE_GLOBAL",
    *(f"TILE_{index}" for index in range(1, 13)),
)


def _aya_config(tied: bool, vision_class=SiglipVisionConfig, **settings) -> AyaVisionConfig:
    tokenizer = case_tokenizer(*AYA_TOKENS)
    return AyaVisionConfig(
        vision_config=vision_class(**VISION),
        text_config=Cohere2Config(**TEXT, vocab_size=len(tokenizer), logit_scale=0.25, sliding_window=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        tie_word_embeddings=tied,
        **settings,
    )


def _aya_processor(config: AyaVisionConfig) -> AyaVisionProcessor:
    edge = config.vision_config.image_size
    return AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": edge, "width": edge}, max_patches=6),
        tokenizer=case_tokenizer(*AYA_TOKENS),
        img_size=edge,
        patch_size=config.vision_config.patch_size,
        downsample_factor=config.downsample_factor,
        chat_template=chat_template(),
    )


def _cohere2_tokenizer():
    names = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
        "image_token": "<|IMG_PATCH|>",
    }
    return tiny_tokenizer(extra_special_tokens=names)


def _cohere2_config(tied: bool) -> Cohere2VisionConfig:
    tokenizer = _cohere2_tokenizer()
    return Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Cohere2Config(**TEXT, vocab_size=len(tokenizer), logit_scale=0.25, sliding_window=16),
        image_token_id=tokenizer.image_token_id,
        alignment_intermediate_size=40,
        tie_word_embeddings=tied,
    )


def _cohere2_processor(config: Cohere2VisionConfig) -> Cohere2VisionProcessor:
    edge = config.vision_config.image_size
    image_processor = Cohere2VisionImageProcessorPil(size={"height": edge, "width": edge}, max_patches=6)
    image_processor.patch_size = edge // config.vision_config.patch_size // config.downsample_factor
    return Cohere2VisionProcessor(
        image_processor=image_processor, tokenizer=_cohere2_tokenizer(), chat_template=chat_template("<|IMG_PATCH|>")
    )


CASES = (
    NativeCase("aya_vision", lambda tied: _aya_config(tied, alignment_intermediate_size=40), _aya_processor),
    NativeCase(
        "aya_vision, clip tower, inner layer",
        lambda tied: _aya_config(
            tied,
            CLIPVisionConfig,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            adapter_layer_norm_eps=1e-3,
        ),
        _aya_processor,
    ),
    NativeCase("cohere2_vision", _cohere2_config, _cohere2_processor),
)
