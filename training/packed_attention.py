"""Attention over samples packed in one row, each by itself, on any device that has scaled dot product attention.

transformers' `sdpa` is given a mask over the whole row, and computes the product of every two tokens of it: for a row of
n samples n times what the samples need. Flash attention does not, but takes a GPU. This one takes the mask apart along its
diagonal. `training/packing.py` gives it to a language model that runs `sdpa`, while it is trained.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


#: Name of this attention implementation.
PACKED_SDPA = "packed_sdpa"


def packed_sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`, sample by sample where it is told where they begin.

    Args:
        query, key, value: `(rows, heads, sequence, head_dim)`.
        attention_mask: Boolean or additive, `(rows, 1 or heads, sequence, sequence)`; its blocks on the diagonal are used.
        cu_seq_lens_q: `(samples + 1,)`, int32, where samples begin in the one row and the last ends, as for flash attention.
        position_bias: For the whole row, which is then computed whole.
    """
    length = query.shape[2]
    whole = cu_seq_lens_q is None or attention_mask is None or position_bias is not None
    if whole or len(query) != 1 or key.shape[2] != length or attention_mask.shape[-2:] != (length, length):
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    bounds = cu_seq_lens_q.tolist()
    parts = [
        sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attention_mask[:, :, start:end, start:end],
            **kwargs,
        )[0]
        for start, end in zip(bounds, bounds[1:])
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
