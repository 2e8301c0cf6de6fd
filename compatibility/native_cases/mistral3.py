"""Mistral 3: pixtral's tower, pictures of their own sizes, several of which are merged into one token."""

import importlib
import sys

import transformers
from transformers import Mistral3Config, MistralConfig, PixtralImageProcessorPil, PixtralVisionConfig, ProcessorMixin
from transformers.utils import is_torchvision_available

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT, VISION


#: Edges that are no multiples of a patch, and one picture that has to be made smaller.
SIZES = ((48, 96), (80, 40), (33, 131))
TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def pixtral_processor_class() -> type[ProcessorMixin]:
    """transformers' `PixtralProcessor`, also without torchvision.

    It needs one function of sizes from the module of the image processor that runs on torchvision. The one for Pillow has
    the same function, and stands in its place while the processor's module is imported.
    """
    if not is_torchvision_available():
        package = "transformers.models.pixtral"
        missing = f"{package}.image_processing_pixtral"
        sys.modules[missing] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
        try:
            return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
        finally:
            del sys.modules[missing]
    return transformers.PixtralProcessor


def vision_config(**settings) -> PixtralVisionConfig:
    return PixtralVisionConfig(**{**VISION, "image_size": 96, **settings})


def pixtral_processor(config) -> ProcessorMixin:
    return pixtral_processor_class()(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": config.vision_config.image_size}),
        tokenizer=case_tokenizer(*TOKENS),
        patch_size=config.vision_config.patch_size,
        spatial_merge_size=getattr(config, "spatial_merge_size", 1),
        chat_template=chat_template("[IMG]"),
    )


def _config(tied: bool, **settings) -> Mistral3Config:
    tokenizer = case_tokenizer(*TOKENS)
    return Mistral3Config(
        vision_config=vision_config(),
        text_config=MistralConfig(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=tied,
        **settings,
    )


CASES = (
    NativeCase("mistral3", _config, pixtral_processor, sizes=SIZES),
    NativeCase(
        "mistral3, other settings",
        lambda tied: _config(
            tied,
            spatial_merge_size=3,
            vision_feature_layer=-2,
            multimodal_projector_bias=True,
            projector_hidden_act="relu",
        ),
        pixtral_processor,
        sizes=SIZES,
    ),
)
