"""Which later tokens a token may see: `image_attention` of the config, as masks for the language model.

| `image_attention` | what is seen beside the past | idea of |
|---|---|---|
| `"causal"` | nothing: image tokens are like text | LLaVA |
| `"bidirectional"` | image tokens: the rest of their picture | Gemma 3 (Gemma Team 2025) |
| `"prefix"` | the prompt, pictures included: the rest of the prompt; the answer nothing | PaliGemma (Beyer et al. 2024) |

A block of tokens that see one another is a number in `blocks` `(batch, sequence)`, -1 elsewhere; transformers' own mask
functions make of it what the attention implementation takes. A picture's block ends where text stands between its tokens
(as in Gemma 3, whose crops of one picture are such blocks), and two pictures side by side are two blocks.

The prompt is what `token_type_ids` say (0 prompt, 1 answer, as PaliGemma's processor gives them); without them everything
before a sample's first label, and without labels everything. What is decoded after a prompt is causal.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    blockwise_overlay,
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from .fusion import cached_length
from .packed_samples import counted_within


#: Attention implementations that are given a mask for each pair of tokens. Flash attention is not.
_WITH_PAIRS = ("eager", "sdpa", "flex_attention", "packed_sdpa")


def image_attention_masks(
    language_model: PreTrainedModel,
    image_attention: str,
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
    image_mask: torch.Tensor | None,
    picture_lengths: list[int],
    token_type_ids: torch.Tensor | None,
    samples: torch.Tensor | None = None,
) -> Any:
    """What the language model gets as its mask; `attention_mask` itself where nothing but the past is seen.

    Args:
        shape: `(batch, sequence)` of what it is called with; the other arguments are explained below.
        samples: The sample of each token, where several are packed in a row.
    """
    past_length = cached_length(past_key_values) or 0
    device = position_ids.device
    blocks = attention_blocks(image_attention, image_mask, picture_lengths, token_type_ids, shape, past_length, device)
    if blocks is None:
        return attention_mask
    if samples is not None and image_attention == "prefix":  # each sample has a prompt of its own
        blocks = torch.where(blocks == 0, -2 - samples, blocks)
        blocks = torch.where(blocks == -1, -1, blocks - blocks.min())
    inputs = torch.empty(*shape, 0, dtype=language_model.dtype, device=device)
    return block_attention_masks(
        language_model.config,
        image_attention,
        inputs,
        attention_mask,
        None if samples is None else position_ids,
        past_key_values,
        blocks,
    )


def answer_token_types(labels: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
    """`token_type_ids` `(batch, sequence)`, int64: 0 before the first label of each sample, 1 from there on.

    Args:
        samples: The sample of each token, where several are packed in a row.
    """
    return counted_within((labels != -100).long(), samples).clamp(max=1)


def picture_blocks(image_mask: torch.Tensor, picture_lengths: list[int]) -> torch.Tensor:
    """The block of each image token, -1 for text; `(batch, sequence)`, int64.

    Args:
        image_mask: Boolean `(batch, sequence)`, true at image tokens.
        picture_lengths: Number of tokens of each picture of the batch, in order; they sum up to the image tokens.
    """
    lengths = torch.tensor(picture_lengths, device=image_mask.device)
    pictures = torch.full_like(image_mask, -1, dtype=torch.long)
    pictures[image_mask] = torch.repeat_interleave(torch.arange(len(lengths), device=image_mask.device), lengths)
    begins = image_mask & (pictures != pad(pictures, (1, 0), value=-1)[:, :-1])
    return torch.where(image_mask, begins.cumsum(1) - 1, -1)


def attention_blocks(
    image_attention: str,
    image_mask: torch.Tensor | None,
    picture_lengths: list[int],
    token_type_ids: torch.Tensor | None,
    shape: tuple[int, int],
    past_length: int,
    device: torch.device,
) -> torch.Tensor | None:
    """The block of each token, `(batch, past + sequence)`, int64, or `None` if all tokens see only the past.

    Args:
        image_attention: `"bidirectional"` or `"prefix"`.
        image_mask: Boolean `(batch, sequence)`, true at image tokens; `None` without pictures.
        picture_lengths: Number of tokens of each picture.
        token_type_ids: `(batch, sequence)`, 0 in the prompt. `None`: all is prompt, if nothing is cached.
        shape: `(batch, sequence)`.
        past_length: Tokens in the cache. What follows them is no prompt, but its pictures are blocks.
    """
    blocks = None if image_mask is None else picture_blocks(image_mask, picture_lengths)
    if image_attention == "prefix" and past_length == 0:
        blocks = torch.full(shape, -1, device=device) if blocks is None else blocks
        prompt = torch.zeros(shape, device=device) if token_type_ids is None else token_type_ids[:, : shape[1]]
        if prompt.shape != shape:
            raise ValueError(f"token_type_ids must be {tuple(shape)} as input_ids are, got {tuple(prompt.shape)}.")
        blocks = torch.where(prompt == 0, 0, torch.where(blocks < 0, -1, blocks + 1))
    return None if blocks is None else pad(blocks, (past_length, 0), value=-1)


def block_attention_masks(
    config: PreTrainedConfig,
    image_attention: str,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    blocks: torch.Tensor,
) -> Any:
    """Masks in the form that the language model takes: one, or a dict with one for each type of its layers.

    Where a sliding window is narrower than a block, Gemma 3 keeps to the window and PaliGemma 2 to the block; so do
    `"bidirectional"` and `"prefix"`.

    Args:
        config: Of the language model.
        inputs: `(batch, sequence, …)` in the dtype of the activations; only shape, dtype and device are read.
        attention_mask: `(batch, past + sequence)`, 0 at padding, or `None`.
        position_ids: `(batch, sequence)` of samples that are packed in a row, `None` otherwise.
        blocks: `(batch, past + sequence)`, see `attention_blocks`.

    Raises:
        ValueError: an attention implementation without such masks; a mask that was prepared already; packed samples
            and a sliding window.
    """
    if config._attn_implementation not in _WITH_PAIRS:
        raise ValueError(
            f"image_attention={image_attention!r} needs a mask for each pair of tokens, which the attention "
            f"implementation {config._attn_implementation!r} does not take. Load the model with "
            'attn_implementation={"text_config": "sdpa"}, or compose it with image_attention="causal".'
        )
    if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim != 2):
        raise ValueError(
            f"With image_attention={image_attention!r} the model makes the masks itself. Pass attention_mask as "
            "(batch, sequence), 0 at padding, or leave it out."
        )
    arguments = {
        "config": config,
        "inputs_embeds": inputs,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    masks = create_masks_for_generate(**arguments, block_sequence_ids=blocks)
    if image_attention == "prefix":
        return masks
    sliding = (
        [
            name
            for name in masks
            if LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(name) is create_sliding_window_causal_mask
        ]
        if isinstance(masks, dict)
        else [None] * (getattr(config, "sliding_window", None) is not None)
    )
    if sliding and position_ids is not None:
        raise ValueError(
            f"Samples cannot be packed in one row with image_attention={image_attention!r} and a language model that has a "
            "sliding window. Train it without packing."
        )
    for name in sliding:
        mask = _windowed_blocks(arguments, blocks)
        masks = mask if name is None else {**masks, name: mask}
    return masks


def _windowed_blocks(arguments: dict[str, Any], blocks: torch.Tensor) -> Any:
    """The past or the block, and both within the window."""
    config, cache = arguments["config"], arguments["past_key_values"]
    is_sliding = list(cache.is_sliding) if cache is not None else []
    layer = is_sliding.index(True) if True in is_sliding else 0
    if cache is not None:  # a static cache has more places than there are tokens
        length, offset = cache.get_mask_sizes(arguments["inputs_embeds"].shape[1], layer)
        blocks = pad(blocks, (0, max(0, length + offset - blocks.shape[1])), value=-1)
    return create_causal_mask(
        **arguments,
        or_mask_function=blockwise_overlay(blocks),
        and_mask_function=sliding_window_overlay(config.sliding_window),
        layer_idx=layer,
    )
