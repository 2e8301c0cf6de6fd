"""LightOnOCR, with pictures whose edges are multiples of a square of patches, and with others."""

from transformers import LightOnOcrConfig, LightOnOcrProcessor, PixtralImageProcessorPil, Qwen3Config

from ..tiny_tokenizer import tiny_tokenizer
from . import NativeCase, chat_template
from .llava import TEXT
from .mistral3 import SIZES, vision_config


_TOKENS = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}


def _tokenizer():
    return tiny_tokenizer(extra_special_tokens=_TOKENS)


def _config(tied: bool) -> LightOnOcrConfig:
    tokenizer = _tokenizer()
    return LightOnOcrConfig(
        vision_config=vision_config(),
        text_config=Qwen3Config(**TEXT, head_dim=16, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )


def _processor(config: LightOnOcrConfig, merged: bool) -> LightOnOcrProcessor:
    patch, merge = config.vision_config.patch_size, config.spatial_merge_size
    return LightOnOcrProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": config.vision_config.image_size}, patch_size=patch * merge if merged else patch
        ),
        tokenizer=_tokenizer(),
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=chat_template(_TOKENS["image_token"]),
    )


CASES = (
    NativeCase("lighton_ocr", _config, lambda config: _processor(config, merged=True), sizes=SIZES),
    NativeCase("lighton_ocr, patches left out", _config, lambda config: _processor(config, merged=False), sizes=SIZES),
)
