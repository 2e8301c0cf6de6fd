"""From a model of ours to the native class of transformers that is the same, where there is one."""

import copy
from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .equality import compare_on_a_sample
from .families import native_families
from .family import Misfit, NativeFamily
from .keys import NATIVE
from .logits import are_plain
from .weights import build_empty, language_model_rules, put_weights, translate


@torch.no_grad()
def to_native(
    model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor | None
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """Make a model of ours one of transformers' own classes, so that whatever knows that class runs it.

    For imported models and for composed and trained ones alike: each family says which models its class can hold, and the
    first that holds this one is taken (the one it was imported from, if any). Both models hold the same tensors
    afterwards, so go on with one of them. Before it is returned, the native model is run beside ours on a picture with a
    text.

    Args:
        model: As it is.
        processor: Its processor; `None` for the model alone, which then is not run. (A few native processors need packages
            that not everyone has.)

    Returns:
        The native model, in eval mode, and its processor, if one was passed.

    Raises:
        CompositionError: no native class can hold it; the message says of each why.
    """
    reasons = []
    for family in families_for(model.config):
        try:
            return as_native(family, model, processor)
        except CompositionError as error:
            reasons.append(f"{family.model_class}: {error}")
    raise no_family(reasons)


def families_for(config: AnyVlmConfig) -> list[NativeFamily]:
    """All families, the one that a model was imported from first."""
    origin = ((config.composed_from or {}).get("native") or {}).get("model_type")
    return sorted(native_families(), key=lambda family: family.model_type != origin)


def no_family(reasons: list[str]) -> CompositionError:
    """The refusal when no family is left, with each one's reason."""
    return CompositionError(
        "No class of transformers can hold this model. "
        + "; ".join(reason.rstrip(".") for reason in reasons)
        + ". The model runs wherever trust_remote_code=True is allowed."
    )


def native_config_of(family: NativeFamily, model: AnyVlmForConditionalGeneration) -> PreTrainedConfig:
    """The native config by the family's own conditions.

    Raises:
        Misfit: the class cannot be this model, as far as configs tell.
    """
    for part in (model.vision_tower, model.language_model):
        if getattr(part.config, "part_code", None) is not None:
            raise Misfit(f"{type(part).__name__} is code of its checkpoint, which a native class does not carry")
    native_config = family.write_config(model.config)
    origin = (model.config.composed_from or {}).get("native") or {}
    if family.plain_logits and origin.get("model_type") == family.model_type:
        native_config.text_config.update(origin.get("text_scales") or {})
    native_config.dtype = model.dtype
    return native_config


def require_plain_logits(family: NativeFamily, language_model: PreTrainedModel) -> None:
    if family.plain_logits and not are_plain(language_model):
        raise Misfit(f"it does not scale or cap logits as {type(language_model).__name__} does")


def build_native(
    family: NativeFamily, native_config: PreTrainedConfig, build: Callable[[type[PreTrainedModel]], PreTrainedModel]
) -> PreTrainedModel:
    """What `build` makes of the family's class.

    Raises:
        Misfit: it makes nothing.
    """
    try:
        return build(getattr(transformers, family.model_class))
    except Exception as error:  # noqa: BLE001 - whatever a class of transformers says about parts it does not fit
        raise Misfit(f"it cannot be built from these parts ({type(error).__name__}: {error})") from error


def as_native(
    family: NativeFamily, model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor | None
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """`to_native` for one family.

    Raises:
        CompositionError: its class cannot hold the model.
    """
    native_config = native_config_of(family, model)
    require_plain_logits(family, model.language_model)
    native = build_native(
        family,
        native_config,
        lambda native_class: build_empty(lambda: native_class._from_config(native_config, dtype=model.dtype)),
    )
    rules = [*family.rules(native_config), *language_model_rules(family, model.language_model)]
    put_weights(native, translate(model, rules, NATIVE), family.model_class)
    native.generation_config = copy.deepcopy(model.generation_config)
    if processor is None:
        return native.eval(), None
    native_processor = processor_to_native(family, processor, native_config, model.config)
    try:
        compare_on_a_sample(family, native, native_processor, model, processor)
    except CompositionError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise Misfit(f"it fails on a picture with a text ({type(error).__name__}: {error})") from error
    return native, native_processor


def processor_to_native(
    family: NativeFamily, processor: AnyVlmProcessor, native_config: PreTrainedConfig, config: AnyVlmConfig
) -> ProcessorMixin:
    """The native processor around copies of our image processor and tokenizer.

    Raises:
        CompositionError: transformers cannot make one here, for want of packages.
    """
    if missing := family.missing_packages():
        raise CompositionError(
            f"{family.processor_class} needs {' and '.join(missing)}, not installed here. Install what is missing, or call "
            "to_native(model, None) for the model alone."
        )
    arguments = {
        "image_processor": copy.deepcopy(processor.image_processor),
        "tokenizer": copy.deepcopy(processor.tokenizer),
        "chat_template": processor.chat_template,
        **family.write_processor(processor, native_config, config),
    }
    return getattr(transformers, family.processor_class)(**arguments)
