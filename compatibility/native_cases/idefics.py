"""Idefics with and without a perceiver, its gates open: at zero, where they start, pictures would not count."""

import torch
from transformers import BatchFeature, IdeficsConfig, IdeficsImageProcessorPil, IdeficsProcessor

from . import NativeCase, case_tokenizer
from .llava import VISION


_TOKENS = ("<fake_token_around_image>", "<image>")


def _config(tied: bool, additional: int = 2, **settings) -> IdeficsConfig:
    tokenizer = case_tokenizer(*_TOKENS)
    vision = {("embed_dim" if name == "hidden_size" else name): value for name, value in VISION.items()}
    return IdeficsConfig(
        vocab_size=len(tokenizer) - additional,
        additional_vocab_size=additional,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        alpha_initializer="ones",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        vision_config=vision,
        tie_word_embeddings=tied,
        **settings,
    )


def _processor(config: IdeficsConfig) -> IdeficsProcessor:
    return IdeficsProcessor(
        image_processor=IdeficsImageProcessorPil(image_size=config.vision_config.image_size),
        tokenizer=case_tokenizer(*_TOKENS),
    )


def _flat(inputs: BatchFeature) -> torch.Tensor:
    """Pictures of each sample stand in one tensor, padded to the most of any."""
    counts = inputs["image_attention_mask"].amax(1).sum(-1).tolist()
    return torch.cat([pictures[:count] for pictures, count in zip(inputs["pixel_values"], counts)])


CASES = (
    # First, as the costs are measured with the first: the native loss fails with a second vocabulary.
    NativeCase(
        "idefics, one vocabulary",
        lambda tied: _config(tied, additional=0, cross_layer_interval=4),
        _processor,
        pixel_values=_flat,
    ),
    NativeCase("idefics", lambda tied: _config(tied), _processor, pixel_values=_flat),
    NativeCase(
        "idefics, perceiver",
        lambda tied: _config(
            tied,
            use_resampler=True,
            qk_layer_norms=True,
            alpha_type="vector",
            cross_layer_interval=2,
            perceiver_config={
                "use_resampler": True,
                "resampler_n_latents": 5,
                "resampler_depth": 2,
                "resampler_n_heads": 2,
                "resampler_head_dim": 12,
                "qk_layer_norms_perceiver": True,
            },
        ),
        _processor,
        pixel_values=_flat,
    ),
)
