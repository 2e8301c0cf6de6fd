"""Gemma 3, with a window that is shorter than a picture."""

from transformers import Gemma3Config, Gemma3ImageProcessorPil, Gemma3Processor, Gemma3TextConfig, SiglipVisionConfig

from ..tiny_tokenizer import tiny_tokenizer
from . import NativeCase, chat_template
from .llava import TEXT, VISION


def _tokenizer():
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    return tiny_tokenizer(extra_special_tokens=names)


def _config(tied: bool) -> Gemma3Config:
    tokenizer = _tokenizer()
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**{**VISION, "patch_size": 4}),
        text_config=Gemma3TextConfig(
            **TEXT,
            vocab_size=len(tokenizer),
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=5.0,  # which this class does not read
        ),
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )


def _processor(config: Gemma3Config) -> Gemma3Processor:
    edge = config.vision_config.image_size
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": edge, "width": edge}),
        tokenizer=_tokenizer(),
        chat_template=chat_template("<start_of_image>"),
        image_seq_length=config.mm_tokens_per_image,
    )


CASES = (NativeCase("gemma3", _config, _processor),)
