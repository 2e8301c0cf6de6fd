"""InternVL: tiles of arrangements, with the first token dropped, and towers with and without a norm after the last layer."""

from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLProcessor, InternVLVisionConfig, Qwen2Config

from ..tiny_tokenizer import tiny_tokenizer
from . import NativeCase, chat_template
from .llava import TEXT


class ImagesOnlyInternVLProcessor(InternVLProcessor):
    """Without a video processor, which transformers has only where torchvision is."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def _tokenizer():
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return tiny_tokenizer(extra_special_tokens=names)


def _config(tied: bool, vision: dict | None = None, **settings) -> InternVLConfig:
    tokenizer = _tokenizer()
    vision_config = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        **(vision or {}),
    )
    return InternVLConfig(
        vision_config=vision_config,
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_id=tokenizer.context_image_token_id,
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(config: InternVLConfig, **settings) -> InternVLProcessor:
    edge = config.vision_config.image_size[0]
    side = int(edge / config.vision_config.patch_size[0] * config.downsample_ratio)
    return ImagesOnlyInternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": edge, "width": edge}, **{"max_patches": 6, **settings}
        ),
        tokenizer=_tokenizer(),
        image_seq_length=side**2,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )


CASES = (
    NativeCase("internvl", _config, _processor),
    NativeCase(
        "internvl, normed tower, inner layer, one tile",
        lambda tied: _config(
            tied,
            {"use_mean_pooling": False, "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True},
            vision_feature_layer=-2,
            downsample_ratio=0.25,
            projector_hidden_act="relu",
        ),
        lambda config: _processor(config, max_patches=1),
    ),
)
