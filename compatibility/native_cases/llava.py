"""LLaVA with towers of both kinds, with a CLS token, which is dropped, and without; ViP-LLaVA; FastVLM."""

from functools import partial

from transformers import (
    CLIPVisionConfig,
    FastVlmConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen2Config,
    ResNetConfig,
    SiglipVisionConfig,
    VipLlavaConfig,
)

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


def _config(vision_config, text_class, tied: bool, config_class=LlavaConfig, **settings):
    tokenizer = case_tokenizer("<image>")
    return config_class(
        vision_config=vision_config,
        text_config=text_class(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(config, strategy: str | None = None, patch: int | None = None) -> LlavaProcessor:
    strategy = strategy or config.vision_feature_select_strategy
    return LlavaProcessor(
        image_processor=square_pictures(config.vision_config.image_size),
        tokenizer=case_tokenizer("<image>"),
        patch_size=patch or config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=chat_template(),
    )


def _map_tower() -> ResNetConfig:
    """FastVLM's own tower is timm's, which not everyone has; any tower whose last hidden state is a map will do."""
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", hidden_size=16, image_size=64
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
    NativeCase(
        "vipllava",
        lambda tied: _config(
            CLIPVisionConfig(**VISION), LlamaConfig, tied, VipLlavaConfig, vision_feature_layers=[-2, -3, 1]
        ),
        partial(_processor, strategy="default"),
    ),
    NativeCase(
        "vipllava, one layer",
        lambda tied: _config(
            CLIPVisionConfig(**VISION),
            LlamaConfig,
            tied,
            VipLlavaConfig,
            vision_feature_layers=-2,
            projector_layernorm_eps=1e-3,
        ),
        partial(_processor, strategy="default"),
    ),
    NativeCase(
        "fast_vlm, resnet tower",
        lambda tied: _config(_map_tower(), Qwen2Config, tied, FastVlmConfig),
        partial(_processor, patch=8),
        note="its own tower is timm's; here another whose features are a map",
    ),
)
