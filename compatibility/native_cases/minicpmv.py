"""MiniCPM-V 4.6 in its two modes, with slices and without."""

from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ImageProcessorPil,
    MiniCPMV4_6Processor,
    ProcessorMixin,
    Qwen3_5TextConfig,
)

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT, VISION


_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


class ImagesOnlyMiniCPMVProcessor(MiniCPMV4_6Processor):
    """Without a video processor, which transformers has only where torchvision is."""

    def __init__(self, image_processor, tokenizer, chat_template):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.slice_mode, self.default_use_image_id = image_processor.slice_mode, image_processor.use_image_id
        for name in _NAMED:
            setattr(self, name, getattr(tokenizer, name))
        self.image_token_id, self.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id


def _tokenizer():
    tokenizer = case_tokenizer("\n", *_NAMED.values())
    tokenizer._set_model_specific_special_tokens(_NAMED)
    return tokenizer


def _config(tied: bool, **settings) -> MiniCPMV4_6Config:
    tokenizer = _tokenizer()
    text = Qwen3_5TextConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return MiniCPMV4_6Config(
        vision_config={**VISION, "image_size": 64, "insert_layer_id": 1, "window_kernel_size": (2, 2)},
        text_config=text,
        insert_layer_id=1,
        image_token_id=tokenizer.convert_tokens_to_ids(_NAMED["image_token"]),
        video_token_id=tokenizer.convert_tokens_to_ids(_NAMED["video_token"]),
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(config: MiniCPMV4_6Config, **settings) -> ImagesOnlyMiniCPMVProcessor:
    return ImagesOnlyMiniCPMVProcessor(
        image_processor=MiniCPMV4_6ImageProcessorPil(
            scale_resolution=64,
            patch_size=config.vision_config.patch_size,
            downsample_mode=config.downsample_mode,
            max_slice_nums=4,
            **settings,
        ),
        tokenizer=_tokenizer(),
        chat_template=chat_template(_NAMED["image_token"]),
    )


_SIZES = ((90, 150), (200, 60), (33, 31))

CASES = (
    NativeCase("minicpmv4_6", _config, _processor, sizes=_SIZES),
    NativeCase(
        "minicpmv4_6, fewer patches merged", lambda tied: _config(tied, downsample_mode="4x"), _processor, sizes=_SIZES
    ),
    NativeCase(
        "minicpmv4_6, pictures whole",
        _config,
        lambda config: _processor(config, slice_mode=False, use_image_id=False),
        sizes=_SIZES,
    ),
)
