"""A swap while loading: `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, vision_tower=…)`."""

import logging
import os
from collections.abc import Callable
from typing import Any

from transformers import AutoProcessor

from ..configuration.part_exchange import EXCHANGEABLE, register_exchange
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .swap import swap


logger = logging.getLogger(__name__)

#: Which swaps were done last, by where the model is and what was put in -> the processor. A processor is small.
_PROCESSORS: dict[tuple, AnyVlmProcessor] = {}
_KEPT_PROCESSORS = 4
#: What says where files are, and whether their code may run, for model and processor alike.
_SHARED = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def load_swapped_model(
    from_pretrained: Callable[..., Any], source: str | os.PathLike, parts: dict[str, Any], kwargs: dict[str, Any]
) -> AnyVlmForConditionalGeneration:
    """The model of a checkpoint with other parts: `swap` without pictures.

    Raises:
        CompositionError: a part cannot be used in this model.
    """
    shared = {key: kwargs[key] for key in _SHARED if key in kwargs}
    processor = AutoProcessor.from_pretrained(source, **shared)
    model, processor, report = swap(
        from_pretrained(source, **kwargs),
        processor,
        **parts,
        trust_remote_code=bool(kwargs.get("trust_remote_code")),
    )
    _remember(source, parts, processor)
    names = ", ".join(f"{key}=…" for key, name in EXCHANGEABLE.items() if name in parts)
    logger.warning(
        "The model has another part now, and its processor is another too: AutoProcessor.from_pretrained(%r, "
        "trust_remote_code=True, %s). %s",
        os.fspath(source),
        names,
        " ".join(report.warnings),
    )
    return model


def load_swapped_processor(
    from_pretrained: Callable[..., Any], source: str | os.PathLike, parts: dict[str, Any], kwargs: dict[str, Any]
) -> AnyVlmProcessor:
    """The processor that goes with `load_swapped_model` of the same arguments, which is called if it was not just now."""
    key = _key(source, parts)
    if key is None or key not in _PROCESSORS:
        shared = {name: kwargs[name] for name in _SHARED if name in kwargs}
        model = AnyVlmForConditionalGeneration.from_pretrained(source, **shared)
        _, processor, _ = swap(
            model,
            from_pretrained(source, **kwargs),
            **parts,
            trust_remote_code=bool(kwargs.get("trust_remote_code")),
        )
        return processor
    return _PROCESSORS[key]


def _key(source: str | os.PathLike, parts: dict[str, Any]) -> tuple | None:
    """`None` for parts that are no names: another object may have the same address later."""
    if not all(isinstance(part, (str, os.PathLike)) for part in parts.values()):
        return None
    return os.fspath(source), *sorted((name, os.fspath(part)) for name, part in parts.items())


def _remember(source: str | os.PathLike, parts: dict[str, Any], processor: AnyVlmProcessor) -> None:
    key = _key(source, parts)
    if key is not None:
        _PROCESSORS[key] = processor
        while len(_PROCESSORS) > _KEPT_PROCESSORS:
            del _PROCESSORS[next(iter(_PROCESSORS))]


register_exchange(model=load_swapped_model, processor=load_swapped_processor)
