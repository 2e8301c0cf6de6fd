"""Tiny random parts of every family that is tested: a few lines each, milliseconds to build."""

from transformers import CONFIG_MAPPING, PreTrainedConfig

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.compatibility.tiny_tokenizer import VOCABULARY, make_sensitive, tiny_tokenizer


__all__ = [
    "LANGUAGE_MODELS",
    "TOWERS",
    "VOCABULARY",
    "compose",
    "make_sensitive",
    "text_config",
    "tiny_tokenizer",
    "vision_config",
]


#: model type -> picture size, tokens that are not patches before and after, grid. Their configs are those of the table of
#: compatibility; the numbers are what each family's documentation says about its tokens.
TOWERS: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {
    "clip_vision_model": (32, (1, 0), (4, 4)),
    "siglip_vision_model": (32, (0, 0), (4, 4)),
    "dinov2": (32, (1, 0), (4, 4)),
    "dinov2_with_registers": (32, (3, 0), (4, 4)),
    "dinov3_vit": (32, (3, 0), (4, 4)),
    "vit": (32, (1, 0), (4, 4)),
    "deit": (32, (2, 0), (4, 4)),
    "beit": (32, (1, 0), (4, 4)),
    "yolos": (32, (1, 10), (4, 4)),
    "ijepa": (32, (0, 0), (4, 4)),
    "aimv2_vision_model": (32, (0, 0), (4, 4)),
    "mlcd": (32, (1, 0), (4, 4)),
    "resnet": (64, (0, 0), (2, 2)),
    "convnext": (64, (0, 0), (2, 2)),
    "swin": (64, (0, 0), (4, 4)),
    "hiera": (64, (0, 0), (2, 2)),
    "mobilevit": (64, (0, 0), (2, 2)),
    "segformer": (64, (0, 0), (2, 2)),
    "sam_vision_model": (32, (0, 0), (4, 4)),
    "sam2_vision_model": (64, (0, 0), (2, 2)),
    "pvt": (64, (1, 0), (2, 2)),
}

#: Settings that most text configs have; each type takes those it knows. Scales and caps are set so that they matter.
_TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 5.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "logit_scale": 0.5,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

#: model type -> settings of its own.
LANGUAGE_MODELS: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "phi": {},
    "phi3": {},
    "granite": {},
    "cohere2": {},
    "olmo2": {},
    "smollm3": {},
    "minicpm3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "mixtral": {},
    "qwen3_moe": {},
    "mamba": {"state_size": 16, "time_step_rank": 4},
    "gemma3n_text": {
        "vocab_size_per_layer_input": len(VOCABULARY),
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": len(VOCABULARY),
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Scales the embeddings of ids outside the embedding module, and computes buffers of its layers when loading.
    "falcon_h1": {
        "embedding_multiplier": 3.0,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "chunk_size": 16,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
    },
    # A state that is no cache; padding on the left enters it.
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    # No cache at all, and no gradient checkpointing.
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    # A cache with a window that the forward pass does not have; an embedding more than its vocabulary.
    "moshi": {"ffn_dim": 64, "sliding_window": 8},
    # Encoders that become decoders; roberta counts positions from its pad token on.
    "bert": {},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0},
    # Decoders of encoder-decoder models: learned positions, a loss that is not shifted, sizes of an encoder beside them.
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
    },
    # States its vocabulary twice.
    "marian": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_vocab_size": len(VOCABULARY),
    },
}


def vision_config(model_type: str) -> PreTrainedConfig:
    return tiny_configs.vision_config(model_type)


def text_config(model_type: str) -> PreTrainedConfig:
    own = LANGUAGE_MODELS[model_type]
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class.__dataclass_fields__)
    mapped = config_class.attribute_map
    settings = {key: value for key, value in _TEXT.items() if key in known and mapped.get(key) not in own}
    return config_class(**{**settings, **own})


def compose(vision="clip_vision_model", text="llama", **kwargs):
    """`anyvlm.compose` of parts, or of the tiny configs of two model types, with the tiny tokenizer."""
    kwargs.setdefault("tokenizer", tiny_tokenizer())
    vision = vision_config(vision) if isinstance(vision, str) else vision
    text = text_config(text) if isinstance(text, str) else text
    return anyvlm.compose(vision=vision, text=text, **kwargs)
