"""Idefics3 and SmolVLM."""

import torch
from transformers import (
    BatchFeature,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT, VISION


_EDGE, _LONGEST_EDGE = VISION["image_size"], 3 * VISION["image_size"]
TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "\n",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)


class ImagesOnlySmolVLMProcessor(SmolVLMProcessor):
    """Without what its processor needs for videos: num2words, and a video processor, which transformers has only where
    torchvision is."""

    def __init__(self, image_processor, tokenizer, image_seq_len, chat_template):
        self.image_seq_len = image_seq_len
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.fake_image_token, self.global_image_token = "<fake_token_around_image>", "<global-img>"
        ProcessorMixin.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def apply_chat_template(self, *args, **kwargs):
        # Its own asks the video processor for numbers of frames.
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)


def _config(config_class, tied: bool, patch_size: int = 8, **settings):
    tokenizer = case_tokenizer(*TOKENS)
    return config_class(
        vision_config={**VISION, "patch_size": patch_size},
        text_config=LlamaConfig(**{**TEXT, "max_position_embeddings": 2048}, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=TEXT["pad_token_id"],
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(processor_class, image_processor_class, config, **settings):
    return processor_class(
        image_processor=image_processor_class(
            size={"longest_edge": _LONGEST_EDGE}, max_image_size={"longest_edge": _EDGE}, **settings
        ),
        tokenizer=case_tokenizer(*TOKENS),
        image_seq_len=(_EDGE // config.vision_config.patch_size // config.scale_factor) ** 2,
        chat_template=chat_template(),
    )


def views_of_lists(inputs: BatchFeature) -> torch.Tensor:
    """Out of lists of equal length, one for each text, without those that fill them up."""
    real = inputs["pixel_attention_mask"].flatten(0, 1).any(-1).any(-1)
    return inputs["pixel_values"].flatten(0, 1)[real]


CASES = (
    NativeCase(
        "idefics3",
        lambda tied: _config(Idefics3Config, tied),
        lambda config: _processor(Idefics3Processor, Idefics3ImageProcessorPil, config),
        pixel_values=views_of_lists,
    ),
    NativeCase(
        "idefics3, pictures whole",
        lambda tied: _config(Idefics3Config, tied, scale_factor=4),
        lambda config: _processor(Idefics3Processor, Idefics3ImageProcessorPil, config, do_image_splitting=False),
        pixel_values=views_of_lists,
    ),
    NativeCase(
        "smolvlm",
        # Older versions of the class need a multiple of patch_size tokens for each view.
        lambda tied: _config(SmolVLMConfig, tied, patch_size=4),
        lambda config: _processor(ImagesOnlySmolVLMProcessor, SmolVLMImageProcessorPil, config),
        pixel_values=views_of_lists,
    ),
)
