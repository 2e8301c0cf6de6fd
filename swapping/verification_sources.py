"""What a model is verified against, and its parts, loaded as the model has them."""

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..composition.assembly import cast_as_loaded
from ..composition.parts import load_language_model, load_vision_tower, pretrained_name
from ..modeling.fused_vision_towers import FusedVisionTowers


@dataclass(frozen=True)
class Source:
    """One source.

    Args:
        value: Path or Hub id, an instance, or `(model, processor)` of a composed model.
        name: For people.
        types: Role (`verification_source_types.py`) -> model type of what it has for it; empty text where there is none.
        is_forced: Whether the caller said what it is.
    """

    value: Any
    name: str
    types: dict[str, str]
    is_forced: bool = False


@dataclass
class Sources:
    """Sources by what they are compared with. `vision` has one for each tower (`None`: there is none for it)."""

    vision: list[Source | None] = field(default_factory=lambda: [None])
    text: Source | None = None
    tokenizer: Source | None = None
    image_processor: Source | None = None
    composed: Source | None = None
    notes: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    generation_config: GenerationConfig | None = None  # of the language model, once it was loaded
    _composed: tuple[PreTrainedModel, Any] | None = None
    _parts: dict[int | str, PreTrainedModel] = field(default_factory=dict)

    def described(self) -> list[dict[str, str]]:
        """`{"source": …, "as": …}` for each use of a source."""
        towers = [
            f"vision tower {index}" if len(self.vision) > 1 else "vision tower" for index in range(len(self.vision))
        ]
        uses = [*zip(self.vision, towers), (self.text, "language model"), (self.tokenizer, "tokenizer")]
        uses += [(self.image_processor, "image processor"), (self.composed, "composed model")]
        return [{"source": source.name, "as": use} for source, use in uses if source is not None]

    def language_model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The source of the language model, in eval mode. Kept until `release`."""
        if "text" not in self._parts:
            if "composed" in self.text.types:
                part = self.composed_model()[0].language_model
            else:
                part = load_language_model(self.text.value, dtype, self.trust_remote_code)
            self._parts["text"] = _prepared(part, dtype, device)
            self.generation_config = part.generation_config
        return self._parts["text"]

    def vision_tower(self, index: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The source of one tower, in eval mode. Kept until `release`."""
        if index not in self._parts:
            source = self.vision[index]
            if "composed" in source.types:
                part = self.composed_model()[0].vision_tower
                part = part.towers[index] if isinstance(part, FusedVisionTowers) else part
            else:
                part = load_vision_tower(source.value, dtype, self.trust_remote_code)
            self._parts[index] = _prepared(part, dtype, device)
        return self._parts[index]

    def whole_of_language_model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | None:
        """The model of several parts that the language model's source is a part of, if it is; it may do more to the
        logits, or less, than its language model by itself."""
        value = self.text.value
        if "vision" not in self.text.types:
            return None
        if not isinstance(value, PreTrainedModel):
            config = AutoConfig.from_pretrained(value, trust_remote_code=self.trust_remote_code)
            if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                return None
            value = AutoModelForImageTextToText.from_pretrained(value, dtype=dtype)
        return _prepared(value, dtype, device)

    def release(self) -> None:
        """Forget the parts that were loaded, but not composed models: two language models may be all that fits."""
        self._parts.clear()

    def composed_model(self) -> tuple[PreTrainedModel, Any]:
        """Model and processor of the composed source; loaded once. An instance may come without a processor."""
        source = self.composed
        if isinstance(source.value, tuple):
            return source.value
        if isinstance(source.value, PreTrainedModel):
            return source.value, None
        if self._composed is None:
            arguments = {"trust_remote_code": self.trust_remote_code}
            model = AutoModelForCausalLM.from_pretrained(source.value, **arguments).eval()
            try:
                processor = AutoProcessor.from_pretrained(source.value, **arguments)
            except (OSError, ValueError):
                processor = None
            self._composed = model, processor
        return self._composed

    def source_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer to compare with, if a source has one."""
        for source in (self.tokenizer, self.text):
            if source is not None:
                return self._tokenizer_of(source)
        return None

    def source_image_processor(self, index: int) -> BaseImageProcessor | None:
        """The image processor to compare one tower's with, if a source has one."""
        for source in (self.image_processor, self.vision[index]):
            if source is not None:
                return self._image_processor_of(source, index)
        return None

    def _tokenizer_of(self, source: Source) -> PreTrainedTokenizerBase | None:
        if "composed" in source.types:
            processor = self.composed_model()[1]
            return None if processor is None else processor.tokenizer
        return load_tokenizer(source.value, self.trust_remote_code)

    def _image_processor_of(self, source: Source, index: int) -> BaseImageProcessor | None:
        if "composed" in source.types:
            processor = self.composed_model()[1]
            own = None if processor is None else processor.image_processor
            return own.image_processors[index] if own is not None and len(self.vision) > 1 else own
        return load_image_processor(source.value, self.trust_remote_code)


def _prepared(part: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """In this dtype and on this device, without changing what the caller passed."""
    if part.dtype != dtype or part.device != device or part.training:
        part = copy.deepcopy(part)
        cast_as_loaded(part, dtype)
        part = part.to(device).eval()
    return part


def load_tokenizer(value: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """A tokenizer, or that of a path or a model; `None` if there is none that can be loaded."""
    source = value if isinstance(value, PreTrainedTokenizerBase) else pretrained_name(value)
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError):
        return None
    # Where the files are missing, transformers makes a tokenizer of the right class that knows no word.
    return None if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens) else tokenizer


def load_image_processor(value: Any, trust_remote_code: bool) -> BaseImageProcessor | None:
    """An image processor, or that of a path or a model; `None` if there is none that can be loaded."""
    source = value if isinstance(value, BaseImageProcessor) else pretrained_name(value)
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError):
        return None
