"""Config of a made-up language model in the style of Qwen-7B's code: names of its own, an `__init__` of the old kind."""

import os

from transformers import PretrainedConfig


if "REMOTE_PART_MARK" in os.environ:  # tests look here for code that ran
    with open(os.environ["REMOTE_PART_MARK"], "a") as mark:
        mark.write(__name__ + "\n")


class OldStyleConfig(PretrainedConfig):
    model_type = "made_up_old_style"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=90,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        seq_length=256,
        rotary_emb_base=10000,
        layer_norm_epsilon=1e-6,
        use_logn_attn=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.seq_length = seq_length
        self.rotary_emb_base = rotary_emb_base
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_logn_attn = use_logn_attn
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
