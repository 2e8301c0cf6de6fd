"""Small copies of a config, so that a part of any size can be run for real in a moment.

What only arithmetic shows (whether a language model is causal, which tokens of a tower are patches) does not depend on
depth, and of a language model not on width either. A copy keeps everything in the config that is no size.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig


#: Parameters of the largest part that is built for real: 1.6 GB in fp32, two or three seconds.
MAX_REAL_PARAMETERS = 400_000_000

#: Parameters of a part that is run as it is, without a copy.
_TINY = 5_000_000

#: Names under which configs state their depth, beyond what `attribute_map` brings together.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "decoder_layers", "encoder_layers")

_WIDTH, _HEADS, _HEAD_WIDTH, _VOCABULARY = 64, 4, 16, 128

#: Small values of the sizes that language models' configs state; each config takes those it has.
_SIZES = {
    "vocab_size": _VOCABULARY,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size": _WIDTH,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "embedding_dim": _WIDTH,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "ffn_dim": 128,
    "ffn_hidden_size": 128,
    "n_inner": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_attention_heads": _HEADS,
    "head_dim": _HEAD_WIDTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "query_pre_attn_scalar": _HEAD_WIDTH,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 16,
    "time_step_rank": 4,
    "laurel_rank": 8,
    "lru_width": _WIDTH,
    "attention_hidden_size": _WIDTH,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 2 * _WIDTH,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "rotary_dim": 8,
    "num_kv_shared_layers": 0,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "decoder_attention_heads": _HEADS,
    "encoder_attention_heads": _HEADS,
}

#: Those of them that do not show in the shape of what comes out.
_INNER_SIZES = (
    "vocab_size",
    "intermediate_size",
    "ffn_dim",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)


def shallow_copy(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config with two layers, or as many as show every kind of layer it has. Widths, and so the shape of what comes
    out, stay.

    `None` if it states no depth, or if its layers are stages that change the shape.
    """
    return None if _has_stages(config) else _fewer_layers(config)


def thin_copy(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """As `shallow_copy`, and with small sizes where they do not show from outside: inside MLPs, vocabulary, experts."""
    small = shallow_copy(config)
    if small is not None:
        _set_sizes(small, {name: _SIZES[name] for name in _INNER_SIZES})
    return small


def _fewer_layers(config: PreTrainedConfig) -> PreTrainedConfig | None:
    small = copy.deepcopy(config)
    depths = [name for name in _DEPTHS if _is_size(_stated(small, name))]
    for name in depths:
        num_layers = _stated(small, name)
        per_layer = _lists_of_length(small, num_layers)
        kinds = [_first_layers_of_every_kind(value) for value in per_layer.values()]
        kept = min(num_layers, max([2, *kinds, *_periods(small)]))
        setattr(small, name, kept)
        for key, value in per_layer.items():
            setattr(small, key, value[:kept])
    return small if depths else None


def tiny_copy(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A language model's config with few layers, small widths and a small vocabulary; `None` if it states no depth."""
    small = _fewer_layers(config)
    if small is None:
        return None
    sizes = dict(_SIZES)
    kv_heads = _stated(config, "num_key_value_heads")
    if _is_size(kv_heads):
        # Attention with as many keys as queries, as multi-head latent attention has, stays so.
        sizes["num_key_value_heads"] = (
            _HEADS if kv_heads == _stated(config, "num_attention_heads") else min(kv_heads, 2)
        )
    if _stated(config, "qk_rope_head_dim"):
        sizes["head_dim"] = sizes["qk_rope_head_dim"]  # the width that is rotated, where only a part of a head is
    _set_sizes(small, sizes)
    for name, value in list(vars(small).items()):
        if name.endswith("_token_id") and _is_size(value) and value >= _VOCABULARY:
            setattr(small, name, 0)
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        # Scaled and sectioned rotary embeddings state one number per pair of channels.
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        small.rope_parameters = {"rope_type": "default", **kept}
    return small


def build_on_meta(model_class: type, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """The model without weights: shapes only, no memory."""
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config), **({} if dtype is None else {"dtype": dtype})).eval()


def real_copies(
    model_class: type, config: PreTrainedConfig, copies: list[PreTrainedConfig | None]
) -> Iterator[nn.Module]:
    """Models with random weights of those of the `copies`, and then of `config` itself, that can be built and are small
    enough; a config that is tiny itself needs no copy."""
    # Some configs cannot be built as they are, only a changed copy (reformer without is_decoder).
    with contextlib.suppress(Exception):
        if _num_parameters(model_class, config) <= _TINY:
            copies = []
    for candidate in (*copies, config):
        if candidate is None:
            continue
        model = None
        # A copy whose sizes do not fit together cannot be built; the next one, or the whole config, can.
        with contextlib.suppress(Exception):
            if _num_parameters(model_class, candidate) <= MAX_REAL_PARAMETERS:
                model = model_class._from_config(copy.deepcopy(candidate), dtype=torch.float32).eval()
        if model is not None:
            yield model


def _periods(config: PreTrainedConfig) -> list[int]:
    """After how many layers the kinds of layers come again, where a config states that instead of each layer's kind."""
    return [
        value for name, value in vars(config).items() if name.endswith(("_period", "_interval")) and _is_size(value)
    ]


def _set_sizes(config: PreTrainedConfig, sizes: dict[str, int]) -> None:
    """Make what the config states no larger than `sizes`, lists of one size per layer too."""
    for name, size in sizes.items():
        value = _stated(config, name)
        if _is_size(value):
            setattr(config, name, min(size, value))
        elif isinstance(value, (list, tuple)) and value and all(_is_size(item) for item in value):
            setattr(config, name, [min(size, item) for item in value])


def _lists_of_length(config: PreTrainedConfig, length: int) -> dict[str, list | tuple]:
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == length
    }


def _has_stages(config: PreTrainedConfig) -> bool:
    """Whether the layers that a config counts have sizes of their own, as the stages of a swin have."""
    depths = [_stated(config, name) for name in _DEPTHS]
    lists = [value for depth in depths if _is_size(depth) for value in _lists_of_length(config, depth).values()]
    return any(all(_is_size(item) for item in value) for value in lists)


def _stated(config: PreTrainedConfig, name: str):
    """What the config itself states under a name or the name it stands for; properties are not asked."""
    return vars(config).get(config.attribute_map.get(name, name))


def _num_parameters(model_class: type, config: PreTrainedConfig) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(model_class, config).parameters())


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _first_layers_of_every_kind(kinds: list | tuple) -> int:
    """How many of the first entries hold every kind of entry; 0 if the entries are not names of kinds."""
    if not all(isinstance(kind, str) for kind in kinds):
        return 0
    return max(list(kinds).index(kind) for kind in set(kinds)) + 1
