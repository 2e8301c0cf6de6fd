"""What a native family declares. Everything else is the engine's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .keys import Rule


class Misfit(CompositionError):
    """Why a model of ours cannot be an instance of a native class. Raised while families are tried."""


@dataclass(frozen=True)
class NativeFamily:
    """One of transformers' own vision-language models: what it is called, and how it translates.

    Args:
        model_type: That of the native config, by which a model or a checkpoint is recognised.
        model_class: Name of its class in transformers, the one with a language modeling head.
        processor_class: Name of its processor's class.
        read_config: Native config -> arguments of `AnyVlmConfig`: `vision_config`, `text_config`, `projector_config`
            (widths may be left out), `image_token_id` (unless only the processor knows it) and whatever else is not the
            default. Not the two specs, which are measured. Beside them `image_size` `(height, width)`, where the
            processor's pictures do not tell.
        write_config: Our config -> native config. Raises `Misfit` with the reason where the native class cannot be it.
        rules: Native config -> the rules for keys, see `keys.py`, those of the language model apart.
        read_processor: `(native processor, our config) -> arguments of AnyVlmProcessor` beyond image processor,
            tokenizer and chat template, which are handed over unless they are among them, and `image_views`.
        write_processor: `(our processor, native config, our config) -> arguments of the native processor`, likewise.
        read_views: `(native config, native processor) -> image_views`, where the processor decides how pictures are cut.
        adjust_spec: `(native config, measured vision_tower_spec) -> vision_tower_spec`, where the native class reads
            the tower otherwise than the probe would (a quirk: say why).
        call_processor: `(native processor, texts, pictures, **settings) -> inputs`, where it is not called with `text` and
            `images`: a list of pictures for each text, or one picture for each. The texts are as our processor takes them.
        is_family_of: `native config -> bool`, where models of one `model_type` have several processors; asked of the
            families in their order.
        base_prefix, head_prefix: Where the native model has the language model's base and its head.
        causal_prefix: Where it has the whole causal language model, if it does; then those two are not read.
        processor_needs: Packages without which transformers cannot make its processor.
        plain_logits: Whether its logits are the head's output as it is, without the scales or caps that the causal
            language model of the same config may have.
    """

    model_type: str
    model_class: str
    processor_class: str
    read_config: Callable[[PreTrainedConfig], dict[str, Any]]
    write_config: Callable[[AnyVlmConfig], PreTrainedConfig]
    rules: Callable[[PreTrainedConfig], Sequence[Rule]]
    read_processor: Callable[[ProcessorMixin, AnyVlmConfig], dict[str, Any]]
    write_processor: Callable[[AnyVlmProcessor, PreTrainedConfig, AnyVlmConfig], dict[str, Any]]
    read_views: Callable[[PreTrainedConfig, ProcessorMixin], dict | None] | None = None
    adjust_spec: Callable[[PreTrainedConfig, dict[str, Any]], dict[str, Any]] = lambda native_config, spec: spec
    call_processor: Callable[..., BatchFeature] = lambda processor, texts, pictures, **settings: processor(
        text=texts, images=pictures, **settings
    )
    is_family_of: Callable[[PreTrainedConfig], bool] = lambda native_config: True
    base_prefix: str = "model.language_model."
    head_prefix: str = "lm_head."
    causal_prefix: str | None = None
    processor_needs: tuple[str, ...] = ()
    plain_logits: bool = True

    def missing_packages(self) -> list[str]:
        """Those that its processor needs and that are not installed."""
        return [name for name in self.processor_needs if find_spec(name) is None]


def require(*conditions: tuple[bool, str]) -> None:
    """Raise `Misfit` with the words of every condition that does not hold."""
    broken = [words for holds, words in conditions if not holds]
    if broken:
        raise Misfit("; ".join(broken))
