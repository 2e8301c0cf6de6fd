"""Samples one after another in one row, without padding: each begins at position 0 and sees itself alone.

Whether a language model keeps to that is measured on it (`training/packing.py`) and kept in `language_model_spec`:

| `packing` | meaning |
|---|---|
| `"positions"` | positions that begin again are enough: transformers makes masks of them, or flash attention reads them |
| `"masks"` | it takes them, made here |
| `false` | a sample changes what the next one gives: state that runs on, or masks of its own |
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices


def packed_samples(
    position_ids: torch.Tensor | None, attention_mask: Any, past_key_values: Cache | None
) -> torch.Tensor | None:
    """The number of the sample that each token belongs to, `(rows, sequence)`, int64, from 0; `None` if no row has two.

    The rule is transformers': samples are packed if their positions begin again, without a mask and without a cache.
    """
    if position_ids is None or position_ids.ndim != 2 or attention_mask is not None or past_key_values is not None:
        return None
    return find_packed_sequence_indices(position_ids)


def packed_attention_masks(language_model: PreTrainedModel, position_ids: torch.Tensor) -> Any:
    """The mask, or one for each type of layers, by which no sample sees another.

    Args:
        position_ids: `(rows, sequence)`, beginning again with each sample.
    """
    return create_masks_for_generate(
        config=language_model.config,
        inputs_embeds=torch.empty(*position_ids.shape, 0, dtype=language_model.dtype, device=position_ids.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )


def counted_within(counts: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
    """A running sum along each row that begins again with each sample.

    Args:
        counts: `(rows, sequence)`, int64.
        samples: As `packed_samples` gives them.
    """
    total = counts.cumsum(1)
    if samples is None:
        return total
    begins = torch.nn.functional.pad(samples[:, 1:] != samples[:, :-1], (1, 0), value=True)
    index = torch.arange(counts.shape[1], device=counts.device)
    start = torch.where(begins, index, 0).cummax(1).values
    return total - (total - counts).gather(1, start)
