"""LLaVA-NeXT and LLaVA-OneVision: towers with and without a CLS token, and tiles of several arrangements."""

import torch
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT, VISION


EDGE = VISION["image_size"]
SIZE = {"height": EDGE, "width": EDGE}
NEXT = [[rows * EDGE, columns * EDGE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
ONEVISION = [[rows * EDGE, columns * EDGE] for rows in range(1, 4) for columns in range(1, 4)]


class ImagesOnlyLlavaOnevisionProcessor(LlavaOnevisionProcessor):
    """Without a video processor, which transformers has only where torchvision is."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def _config(config_class, vision_config, text_class, tied: bool, **settings):
    tokenizer = case_tokenizer("<image>", "<video>")
    return config_class(
        vision_config=vision_config,
        text_config=text_class(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        **settings,
    )


def _next_processor(config: LlavaNextConfig) -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": EDGE}, crop_size=SIZE, image_grid_pinpoints=config.image_grid_pinpoints
        ),
        tokenizer=case_tokenizer("<image>"),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),
        chat_template=chat_template(),
    )


def _onevision_processor(config: LlavaOnevisionConfig) -> LlavaOnevisionProcessor:
    return ImagesOnlyLlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer=case_tokenizer("<image>", "<video>"),
        num_image_tokens=(EDGE // config.vision_config.patch_size) ** 2
        + int(config.vision_feature_select_strategy == "default"),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=chat_template(),
    )


def _views(pinpoints: list):
    """The views of each picture, which are padded to the same number there."""

    def flat(inputs: BatchFeature) -> torch.Tensor:
        samples = inputs.get("batch_num_images", torch.ones(len(inputs["pixel_values"]), dtype=int)).tolist()
        alone = [number == 1 for number in samples for _ in range(number)]
        numbers = [
            image_size_to_num_patches(size, pinpoints, EDGE) if is_alone else 1
            for size, is_alone in zip(inputs["image_sizes"], alone, strict=True)
        ]
        return torch.cat([views[:number] for views, number in zip(inputs["pixel_values"], numbers)])

    return flat


SIZES = ((48, 96), (150, 40), (70, 60))

CASES = (
    NativeCase(
        "llava_next, clip tower",
        lambda tied: _config(
            LlavaNextConfig, CLIPVisionConfig(**VISION), LlamaConfig, tied, image_grid_pinpoints=NEXT
        ),
        _next_processor,
        sizes=SIZES,
        pixel_values=_views(NEXT),
    ),
    NativeCase(
        "llava_next, siglip tower, several layers",
        lambda tied: _config(
            LlavaNextConfig,
            SiglipVisionConfig(**VISION),
            LlamaConfig,
            tied,
            image_grid_pinpoints=NEXT,
            vision_feature_layer=[-3, -2],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
        ),
        _next_processor,
        sizes=SIZES,
        pixel_values=_views(NEXT),
    ),
    NativeCase(
        "llava_onevision",
        lambda tied: _config(
            LlavaOnevisionConfig,
            SiglipVisionConfig(**VISION),
            Qwen2Config,
            tied,
            image_grid_pinpoints=ONEVISION,
            vision_aspect_ratio="anyres_max_2",
        ),
        _onevision_processor,
        sizes=SIZES,
        pixel_values=_views(ONEVISION),
    ),
    NativeCase(
        "llava_onevision, clip tower",
        lambda tied: _config(
            LlavaOnevisionConfig,
            CLIPVisionConfig(**VISION),
            Qwen2Config,
            tied,
            image_grid_pinpoints=ONEVISION,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        ),
        _onevision_processor,
        sizes=SIZES,
        pixel_values=_views(ONEVISION),
    ),
)
