"""Config of a made-up language model in the style of MiniCPM-2B's code."""

import os

from transformers.configuration_utils import PretrainedConfig


if "REMOTE_PART_MARK" in os.environ:  # tests look here for code that ran
    with open(os.environ["REMOTE_PART_MARK"], "a") as mark:
        mark.write(__name__ + "\n")


class ScaledConfig(PretrainedConfig):
    model_type = "made_up_scaled"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        scale_emb=12,
        dim_model_base=8,
        scale_depth=1.4,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.scale_emb = scale_emb
        self.dim_model_base = dim_model_base
        self.scale_depth = scale_depth
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
