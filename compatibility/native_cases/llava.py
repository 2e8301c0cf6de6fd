"""LLaVA with towers of both kinds: with a CLS token, which is dropped, and without."""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor, Qwen2Config, SiglipVisionConfig

from . import NativeCase, case_tokenizer, chat_template, square_pictures


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def _config(vision_config, text_class, tied: bool, **settings) -> LlavaConfig:
    tokenizer = case_tokenizer("<image>")
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_class(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(config: LlavaConfig) -> LlavaProcessor:
    dropped = config.vision_feature_select_strategy == "default"
    return LlavaProcessor(
        image_processor=square_pictures(config.vision_config.image_size),
        tokenizer=case_tokenizer("<image>"),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(dropped),
        chat_template=chat_template(),
    )


CASES = (
    NativeCase("llava, clip tower", lambda tied: _config(CLIPVisionConfig(**VISION), LlamaConfig, tied), _processor),
    NativeCase(
        "llava, siglip tower",
        lambda tied: _config(
            SiglipVisionConfig(**VISION),
            Qwen2Config,
            tied,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            projector_hidden_act="relu",
            multimodal_projector_bias=False,
        ),
        _processor,
    ),
    NativeCase(
        "llava, several layers",
        lambda tied: _config(CLIPVisionConfig(**VISION), LlamaConfig, tied, vision_feature_layer=[-3, -2]),
        _processor,
    ),
)
