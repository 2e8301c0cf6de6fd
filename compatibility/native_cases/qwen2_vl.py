"""Qwen2-VL and Qwen2.5-VL: pictures of their own size and proportions."""

from transformers import (
    CONFIG_MAPPING,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT


_PATCH = 8
_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Without a video processor, which transformers has only where torchvision is."""

    class ImagesOnly(processor_class):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImagesOnly


def _config(model_type: str, tied: bool, **vision) -> PreTrainedConfig:
    tokenizer = case_tokenizer(*_TOKENS)
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), tokenizer.convert_tokens_to_ids(list(_TOKENS))))
    return CONFIG_MAPPING[model_type](
        vision_config={"depth": 3, "num_heads": 4, "patch_size": _PATCH, **vision},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]},
        },
        **{f"{name}_token_id": token_id for name, token_id in ids.items()},
        tie_word_embeddings=tied,
    )


def _processor(processor_class: type[ProcessorMixin]):
    def build(config: PreTrainedConfig) -> ProcessorMixin:
        edge = _PATCH * config.vision_config.spatial_merge_size
        return _images_only(processor_class)(
            image_processor=Qwen2VLImageProcessorPil(
                patch_size=_PATCH, min_pixels=2 * edge**2, max_pixels=30 * edge**2
            ),
            tokenizer=case_tokenizer(*_TOKENS),
            chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
        )

    return build


CASES = (
    NativeCase(
        "qwen2_vl",
        lambda tied: _config("qwen2_vl", tied, embed_dim=32, mlp_ratio=2, hidden_size=TEXT["hidden_size"]),
        _processor(Qwen2VLProcessor),
    ),
    NativeCase(
        "qwen2_5_vl",
        lambda tied: _config(
            "qwen2_5_vl",
            tied,
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=TEXT["hidden_size"],
            window_size=4 * _PATCH,
            fullatt_block_indexes=[1],
        ),
        _processor(Qwen2_5_VLProcessor),
    ),
)
