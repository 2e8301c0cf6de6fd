"""Samples of any length in one row, without padding.

Padding is computed like any token and then thrown away. In a packed row each sample begins at position 0 and sees itself
alone, so that its losses are those of the sample by itself; the idea is that of padding-free training in TRL, and of the
variable-length kernels of flash attention (Dao 2023). Not every language model keeps samples apart: a recurrent state, say,
runs on from one to the next. So each is tried, on the samples at hand, before it is trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..composition.language_model_probe import relative_error, rounding
from ..composition.running import device_of, in_mode
from .packed_attention import PACKED_SDPA


#: How rows are told apart, first what costs least. See `modeling/packed_samples.py`.
WAYS = ("positions", "masks")

#: Steps of rounding between a sample alone and the same one in a longer row.
_OTHER_SHAPES = 16


def pack(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch in one row.

    Args:
        batch: `input_ids`, `attention_mask`, `labels` and further tensors of their shape `(batch, sequence)`, padded on
            either side; and tensors of pictures, which stay.

    Returns:
        The same without padding, `(1, all tokens)`, and without `attention_mask`; `position_ids` `(1, all tokens)`, which
        begin again with each sample; and where samples begin, as flash attention takes it: `cu_seq_lens_q`,
        `cu_seq_lens_k` `(samples + 1,)`, int32, `max_length_q`, `max_length_k`. The first token of a sample is never a
        label: nothing before it predicts it.
    """
    mask = batch["attention_mask"].bool()
    packed = {
        name: value[mask].unsqueeze(0) if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
    lengths = mask.sum(1)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()]).unsqueeze(0)
    if "labels" in packed:
        packed["labels"][0, bounds[:-1].long()] = -100
    longest = int(lengths.max())
    return {
        **packed,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def enable_packing(model: PreTrainedModel, collator, samples: Sequence[Mapping[str, Any]]) -> str:
    """Try whether samples in one row give what each gives alone, and make the model ready for them.

    The samples are run alone and together. What is found is kept in `language_model_spec`, and packed rows are refused
    from then on if they would leak. A language model that runs `sdpa` is given `packed_sdpa`, which computes each sample
    by itself.

    Args:
        model: A composed model, or one with adapters around it.
        collator: An `AnyVlmDataCollator`.
        samples: At least two, of different lengths; a few of those to be trained on.

    Returns:
        `"positions"` or `"masks"`.

    Raises:
        ValueError: samples in one row change one another in this model; fewer than two samples.
    """
    composed = model.get_base_model() if hasattr(model, "get_base_model") else model
    if len(samples) < 2:
        raise ValueError("Pass at least two samples: whether they stay apart in one row shows between two of them.")
    alone = [_logits(composed, collator.unpacked([sample])) for sample in samples]
    together = pack(collator.unpacked(samples))
    language_model = composed.language_model
    given = language_model.config._attn_implementation
    reasons = []
    for implementation in ([PACKED_SDPA] if given == "sdpa" else []) + [given]:
        language_model.set_attn_implementation(implementation)
        for way in WAYS:
            composed.learn_about_language_model({"packing": way})
            try:
                error = relative_error(_logits(composed, together), torch.cat(alone, dim=1))
            except Exception as failure:  # noqa: BLE001 - whatever a row of several samples meets is a reason not to
                reasons.append(f"with {way}: {type(failure).__name__}: {failure}")
                continue
            if error <= rounding(language_model.dtype, _OTHER_SHAPES):
                return way
            reasons.append(f"with {way}: logits differ by {100 * error:.3g} %")
    language_model.set_attn_implementation(given)
    composed.learn_about_language_model({"packing": False})
    raise ValueError(
        f"{type(language_model).__name__} gives other answers for samples packed in one row than for each alone "
        f"({'; '.join(dict.fromkeys(reasons))}), so one sample would leak into the next. Train it without packing; "
        "batches of samples of like length (train_sampling_strategy='group_by_length') pad little."
    )


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """`(1, tokens, vocabulary)` in fp32, without dropout."""
    device = device_of(model)
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    with in_mode(model):
        return model(**inputs).logits.float()
