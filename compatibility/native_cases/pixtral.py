"""LLaVA's class with pixtral's tower: pictures of their own sizes, a token for each patch."""

from transformers import LlamaConfig, LlavaConfig, MistralConfig

from . import NativeCase, case_tokenizer
from .llava import TEXT
from .mistral3 import SIZES, TOKENS, pixtral_processor, vision_config


def _config(text_class, tied: bool, **settings) -> LlavaConfig:
    tokenizer = case_tokenizer(*TOKENS)
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text_class(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
        **settings,
    )


CASES = (
    NativeCase(
        "llava, pixtral tower",
        lambda tied: _config(MistralConfig, tied, vision_feature_layer=-1),
        pixtral_processor,
        sizes=SIZES,
    ),
    NativeCase(
        "llava, pixtral tower, several layers",
        lambda tied: _config(LlamaConfig, tied, vision_feature_layer=[-1, -2], multimodal_projector_bias=False),
        pixtral_processor,
        sizes=SIZES,
    ),
)
