"""Idefics2, its pictures in quarters and whole, or whole alone."""

from transformers import Idefics2Config, Idefics2ImageProcessorPil, Idefics2Processor, MistralConfig

from . import NativeCase, case_tokenizer, chat_template
from .idefics3 import views_of_lists
from .llava import TEXT, VISION


_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")


def _config(tied: bool) -> Idefics2Config:
    tokenizer = case_tokenizer(*_TOKENS)
    return Idefics2Config(
        vision_config=VISION,
        text_config=MistralConfig(**{**TEXT, "sliding_window": None}, vocab_size=len(tokenizer)),
        perceiver_config={
            "hidden_size": TEXT["hidden_size"],
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )


def _processor(config: Idefics2Config, **settings) -> Idefics2Processor:
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 70}, **settings),
        tokenizer=case_tokenizer(*_TOKENS),
        image_seq_len=config.perceiver_config.resampler_n_latents,
        chat_template=chat_template(),
    )


CASES = (
    NativeCase("idefics2, pictures whole", _config, _processor, pixel_values=views_of_lists),
    NativeCase(
        "idefics2",
        _config,
        lambda config: _processor(config, do_image_splitting=True),
        pixel_values=views_of_lists,
    ),
)
