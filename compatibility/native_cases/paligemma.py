"""PaliGemma with Gemma, and PaliGemma 2 with Gemma 2, whose window is shorter than a picture."""

import inspect

from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.paligemma import modeling_paligemma

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT, VISION


#: The words, the image token, and 1,152 tokens for places and segments that the processor adds.
_VOCABULARY = 1280

#: Before transformers 5.23 the class did not cap its logits, as Gemma 2 does; such a model is refused there.
_CAP = 5.0 if "final_logit_softcapping" in inspect.getsource(modeling_paligemma) else None


def _config(tied: bool, text_class, **text_settings) -> PaliGemmaConfig:
    text_config = text_class(**TEXT, vocab_size=_VOCABULARY, head_dim=12, tie_word_embeddings=tied, **text_settings)
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text_config,
        image_token_index=case_tokenizer("<image>").convert_tokens_to_ids("<image>"),
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        vocab_size=_VOCABULARY,
        tie_word_embeddings=tied,
    )


def _processor(config: PaliGemmaConfig) -> PaliGemmaProcessor:
    vision = config.vision_config
    image_processor = SiglipImageProcessorPil(size={"height": vision.image_size, "width": vision.image_size})
    image_processor.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    return PaliGemmaProcessor(
        image_processor=image_processor, tokenizer=case_tokenizer("<image>"), chat_template=chat_template()
    )


CASES = (
    NativeCase("paligemma", lambda tied: _config(tied, GemmaConfig), _processor),
    NativeCase(
        "paligemma 2",
        lambda tied: _config(
            tied,
            Gemma2Config,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=12,
            final_logit_softcapping=_CAP,
        ),
        _processor,
    ),
)
