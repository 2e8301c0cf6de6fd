"""Parameters, memory and abilities of parts, read from models on the meta device: exact, and without memory."""

import contextlib
import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .compatibility_report import CacheReport, PartReport
from .small_copies import build_on_meta


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: What is trained in the three usual stages, by sub-module.
TRAINING_SETUPS = {
    "projector": ("multi_modal_projector",),
    "projector and language model": ("multi_modal_projector", "language_model"),
    "everything": ("vision_tower", "multi_modal_projector", "language_model"),
}

#: Seconds that running the language model on 3,000 tokens on the meta device may take: recurrent ones loop over tokens.
_MAX_SECONDS = 4.0


def describe_part(name: str, part: nn.Module, known_from: str) -> PartReport:
    """What `PartReport` says of a part, from a model on the meta device."""
    transformers_part = part if isinstance(part, PreTrainedModel) else None
    return PartReport(
        name=name,
        model_class=type(part).__name__,
        model_type=transformers_part.config.model_type if transformers_part else None,
        parameters=num_parameters(part),
        bytes_per_dtype={dtype_name(dtype): num_bytes(part, dtype) for dtype in DTYPES},
        gradient_checkpointing=transformers_part.supports_gradient_checkpointing if transformers_part else None,
        sdpa=transformers_part._supports_sdpa if transformers_part else None,
        flash_attention=transformers_part._supports_flash_attn if transformers_part else None,
        known_from=known_from,
    )


def describe_parameter(name: str, numel: int) -> PartReport:
    """The same of a parameter that belongs to no part."""
    return PartReport(
        name=name,
        model_class="Parameter",
        model_type=None,
        parameters=numel,
        bytes_per_dtype={dtype_name(dtype): numel * dtype.itemsize for dtype in DTYPES},
        known_from="its config",
    )


def num_parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def num_bytes(part: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a part's weights in `dtype`, where the part keeps some of them in fp32 as transformers loads it."""
    kept = set(getattr(part, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(part, "_keep_in_fp32_modules", None) or ())
    total = 0
    for name, parameter in part.named_parameters():
        width = torch.float32.itemsize if kept.intersection(name.split(".")) else dtype.itemsize
        total += parameter.numel() * (width if parameter.is_floating_point() else parameter.element_size())
    return total


def training_bytes(parts: list[PartReport], dtype: torch.dtype) -> dict[str, int]:
    """What is trained -> bytes of all weights, and of gradients and AdamW's two moments of what is trained, in `dtype`.

    An estimate: without activations, buffers of the framework, or a master copy of the weights.
    """
    key = dtype_name(dtype)
    weights = {part.name: part.bytes_per_dtype[key] for part in parts}
    new = weights.keys() - set(TRAINING_SETUPS["everything"])  # what is new beside the projector is trained with it
    return {
        setup: sum(weights.values()) + 3 * sum(weights[name] for name in {*trained, *new})
        for setup, trained in TRAINING_SETUPS.items()
    }


def head_parameters(language_model: PreTrainedModel) -> int | None:
    """Parameters of the head, 0 if its weight is the embeddings', `None` if it has none that it names."""
    head = language_model.get_output_embeddings()
    if head is None:
        return None
    embeddings = {id(parameter) for parameter in language_model.get_input_embeddings().parameters()}
    return sum(parameter.numel() for parameter in head.parameters() if id(parameter) not in embeddings)


def embedding_width(language_model: PreTrainedModel) -> int:
    """Width of what the embedding module gives, on whatever device it is."""
    embeddings = language_model.get_input_embeddings()
    return embeddings(torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)).shape[-1]


def measure_cache(language_model: PreTrainedModel, dtype: torch.dtype) -> CacheReport | None:
    """Run the language model on the meta device and weigh its cache; `None` if it cannot be run there."""
    try:
        # Grouped matrix products of experts take bf16 alone on the meta device; sizes are scaled to `dtype` below.
        model = build_on_meta(type(language_model), language_model.config, torch.bfloat16)
        model.config.pad_token_id = None  # some look for padding in the ids, which have no values here
        model.set_attn_implementation("eager")  # nor have masks, which others look into
        first, started = _cache_bytes(model, 32, dtype), time.monotonic()
        second = _cache_bytes(model, 64, dtype)
    except Exception:  # noqa: BLE001 - a model that cannot run on the meta device can fail in any way
        return None
    if (time.monotonic() - started) / 64 * 3000 <= _MAX_SECONDS:
        # More tokens than a model has positions for may fail.
        with contextlib.suppress(Exception):
            first_1000, first_2000 = _cache_bytes(model, 1000, dtype), _cache_bytes(model, 2000, dtype)
            return CacheReport(first_1000, first_2000 - first_1000)
    per_token = (second - first) / 32
    fixed = first - 32 * per_token
    return CacheReport(round(fixed + 1000 * per_token), round(1000 * per_token), extrapolated=first != second)


def num_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that a language model was made for; `None` if its config states none, or none in earnest (xlnet: -1)."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cache_bytes(model: PreTrainedModel, num_tokens: int, dtype: torch.dtype) -> int:
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    outputs = model(input_ids=ids, use_cache=True, return_dict=True)
    cache = next(outputs[key] for key in ("past_key_values", "cache_params", "state") if outputs.get(key) is not None)
    total = sum(_tensor_bytes(value, dtype) for layer in cache.layers for value in vars(layer).values())
    if not total:
        raise ValueError(f"{type(cache).__name__} holds no tensors that are known.")
    return total


def _tensor_bytes(value: Any, dtype: torch.dtype) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * (dtype.itemsize if value.dtype == torch.bfloat16 else value.element_size())
    if isinstance(value, dict):
        return sum(_tensor_bytes(item, dtype) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item, dtype) for item in value)
    return 0
