"""Load a part from what the caller passed: Hub id, local path, config or model instance."""

import copy
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..configuration.part_code import part_config_class
from ..modeling.language_models import base_language_model, build_language_model, causal_lm_class
from ..modeling.parts import own_model_class, restore_computed_tensors
from ..modeling.vision_towers import vision_tower_class
from .errors import CompositionError
from .language_model_probe import sees_later_tokens
from .remote_code import RemoteCode, bundle_remote_code, find_remote_code, is_remote


logger = logging.getLogger(__name__)

PartSource = str | os.PathLike | PreTrainedConfig | PreTrainedModel


def load_vision_tower(source: PartSource, dtype: torch.dtype | None = None, trust_remote_code: bool = False):
    """The bare vision tower. The `vision_config` part of a composite (a whole CLIP) is taken out of it.

    Raises:
        CompositionError: there is no tower in it, or its weights are not all there.
    """
    _check_source(source)
    if isinstance(source, PreTrainedModel):
        return _adopt(_vision_part(source), AutoModel, "vision_config", trust_remote_code)
    code = find_remote_code(source, "AutoModel", trust_remote_code)
    if code is not None:
        return _load_remote(source, code, AutoModel, "vision_config", dtype)
    whole_config = _config_of(source, trust_remote_code)
    config = vision_config_of(whole_config)
    tower_class = vision_tower_class(config)
    if tower_class is None:
        raise CompositionError(
            f"transformers has no model class for {config.model_type!r} alone, so it cannot be the vision tower. Pass a "
            "vision tower such as dinov2, siglip or clip."
        )
    try:
        return _load_vision_tower(source, whole_config, config, tower_class, dtype, trust_remote_code)
    except ImportError as error:
        raise CompositionError(
            f"The vision tower {config.model_type!r} needs a library that is not installed: "
            f"{' '.join(str(error).split())}"
        ) from error


def _load_vision_tower(source, whole_config, config, tower_class, dtype, trust_remote_code) -> nn.Module:
    if isinstance(source, PreTrainedConfig):
        return tower_class._from_config(config, **({} if dtype is None else {"dtype": dtype}))
    if type(whole_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        # Such a model names the weights of its tower in its own way, so it is loaded whole.
        return _vision_part(_load(AutoModelForImageTextToText, source, whole_config, dtype, trust_remote_code))
    # The base class's loader: that of timm_backbone takes names of timm's weights instead, and downloads them.
    loader = functools.partial(PreTrainedModel.from_pretrained.__func__, tower_class)
    try:
        return _load(tower_class, source, config, dtype, trust_remote_code, loader)
    except CompositionError:
        if config is whole_config or type(whole_config) not in MODEL_MAPPING:
            raise
        return _vision_part(_load(AutoModel, source, whole_config, dtype, trust_remote_code))


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the vision part of a composite; the config itself if it is of a tower alone."""
    return _sub_config(config, "vision_config")


def load_language_model(
    source: PartSource, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The whole causal language model.

    The text part of a composite (a Gemma 3, a LLaVA) is taken out of it, and the decoder of an encoder-decoder model.
    Of a family that has an encoder and a causal form under one config (bert), the causal form is made.

    Raises:
        CompositionError: there is no causal language model in it, or its weights are not all there.
    """
    _check_source(source)
    language_model = _load_language_model(source, dtype, trust_remote_code)
    _describe_decoder(language_model.config)
    return language_model


def _load_language_model(source: PartSource, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        if isinstance(getattr(source.config, "text_config", None), PreTrainedConfig):
            return _adopt(_text_part(source), AutoModelForCausalLM, "text_config", trust_remote_code)
        if source.config.is_encoder_decoder:
            return _decoder_part(source)
        if not source.can_generate():
            if is_remote(type(source)) and source.get_output_embeddings() is not None:
                raise CompositionError(
                    f"This {type(source).__name__} cannot generate: transformers adds that to code of its age "
                    "only the first time an Auto class loads it in a process. Pass its path or Hub id."
                )
            raise CompositionError(
                f"{type(source).__name__} has no language model head. Pass the causal LM, loaded with "
                "AutoModelForCausalLM."
            )
        return _adopt(source, AutoModelForCausalLM, "text_config", trust_remote_code)
    code = find_remote_code(source, "AutoModelForCausalLM", trust_remote_code)
    if code is not None:
        return _load_remote(source, code, AutoModelForCausalLM, "text_config", dtype)
    config = _config_of(source, trust_remote_code)
    text_config = _sub_config(config, "text_config")
    if causal_lm_class(text_config) is None:
        _check_mapping(
            text_config, MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model", "a decoder such as llama, qwen3 or gpt2"
        )
    elif "text" not in causal_lm_class(text_config).output_modalities:
        raise CompositionError(
            f"{causal_lm_class(text_config).__name__} generates {', '.join(causal_lm_class(text_config).output_modalities)}"
            ", not text. Pass a decoder such as llama, qwen3 or gpt2."
        )
    if isinstance(source, PreTrainedConfig):
        return _causal_form(lambda config: _build(config, dtype, trust_remote_code), text_config)
    if text_config is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return _text_part(_load(AutoModelForImageTextToText, source, config, dtype, trust_remote_code))
    if text_config.is_encoder_decoder:
        for mapping, auto_class in _ENCODER_DECODERS:
            if type(text_config) in mapping:
                return _decoder_part(_load(auto_class, source, text_config, dtype, trust_remote_code))
    load = lambda config: _load(AutoModelForCausalLM, source, config, dtype, trust_remote_code)  # noqa: E731
    return _causal_form(load, text_config, pretrained=True)


#: Config fields that turn an encoder into a causal decoder where they are false: bert and its kin, xlm.
CAUSAL_SWITCHES = ("is_decoder", "causal")

_ENCODER_DECODERS = (
    (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    (MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, AutoModelForSpeechSeq2Seq),
)


def _causal_form(
    load: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, pretrained: bool = False
) -> PreTrainedModel:
    """What `load` makes of the config; if that is an encoder whose config has a causal form, then that form."""
    switches = [name for name in CAUSAL_SWITCHES if getattr(config, name, None) is False]
    causal_config = copy.deepcopy(config)
    for name in switches:
        setattr(causal_config, name, True)
    try:
        language_model = load(config)
        if not switches or not sees_later_tokens(language_model):
            return language_model
    except (AssertionError, CompositionError):  # reformer cannot be built without its switch
        if not switches:
            raise
    language_model = load(causal_config)
    if pretrained:
        logger.warning(
            "%s was trained as an encoder, which sees the whole text. Here it is a causal decoder (%s=True) and must "
            "learn to write: train the language model, not the projector alone.",
            type(language_model).__name__,
            switches[0],
        )
    return language_model


def _build(config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    kwargs = {} if dtype is None else {"dtype": dtype}
    try:
        return build_language_model(copy.deepcopy(config), trust_remote_code=trust_remote_code, **kwargs)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CompositionError(
            f"No causal language model can be built from this config of type {config.model_type!r} ({error}). "
            "Pass a decoder such as llama, qwen3 or gpt2."
        ) from error


def _describe_decoder(config: PreTrainedConfig) -> None:
    """Let the config of a decoder that comes without its encoder give the decoder's sizes under the general names.

    `num_hidden_layers` of a bart is `encoder_layers`, and a cache of so many layers would be made for the decoder
    (blenderbot has 2 and 12).
    """
    if getattr(config, "encoder_layers", None) is None or getattr(config, "decoder_layers", None) is None:
        return
    for name, value in list(vars(config).items()):
        prefix, _, size = name.partition("_")
        if prefix == "decoder" and hasattr(config, f"encoder_{size}"):
            setattr(config, f"encoder_{size}", value)
    config.num_hidden_layers = config.decoder_layers


def _decoder_part(whole: PreTrainedModel) -> PreTrainedModel:
    """The decoder of an encoder-decoder model with its head, in the class that transformers has for it alone."""
    if causal_lm_class(whole.config) is None:
        raise CompositionError(
            f"{type(whole).__name__} is an encoder-decoder model, and transformers has no class for its decoder alone. "
            "Pass a decoder such as llama, qwen3 or gpt2."
        )
    language_model = _build(whole.config, whole.dtype, trust_remote_code=False)
    weights = whole.state_dict()
    missing = sorted(key for key in language_model.state_dict() if key not in weights)
    if missing:
        raise CompositionError(
            f"{type(whole).__name__} lacks {', '.join(missing[:5])} of {type(language_model).__name__}. Load its decoder "
            "with AutoModelForCausalLM and pass that."
        )
    language_model.load_state_dict({key: weights[key] for key in language_model.state_dict()})
    language_model.name_or_path = whole.name_or_path
    logger.warning(
        "%s was trained to read the output of an encoder, which it does without here: train the language model, not "
        "the projector alone.",
        type(language_model).__name__,
    )
    return language_model.to(whole.device).eval()


def _text_part(composite: PreTrainedModel) -> PreTrainedModel:
    """The causal LM inside a vision-language model: its decoder and its head, put into the causal LM's class."""
    text_config = composite.config.text_config
    model_class = causal_lm_class(text_config)
    for module in composite.modules():
        if model_class is not None and isinstance(module, model_class):
            return module
    decoder = language_model = None
    if model_class is not None:
        with torch.device("meta"):
            language_model = build_language_model(text_config)
        empty = base_language_model(language_model)
        decoder = next((module for module in composite.modules() if type(module) is type(empty)), None)
    if decoder is None:
        raise CompositionError(
            f"{type(composite).__name__} does not hold a language model of a type that transformers knows "
            f"({text_config.model_type}). Pass the language model itself."
        )
    setattr(language_model, next(name for name, module in language_model.named_children() if module is empty), decoder)
    language_model.set_output_embeddings(composite.get_output_embeddings())
    left_out = [name for name, parameter in language_model.named_parameters() if parameter.is_meta]
    if left_out:
        raise CompositionError(
            f"{type(composite).__name__} lacks {', '.join(left_out[:5])} of {type(language_model).__name__}. Pass the "
            "language model itself."
        )
    # The config of the whole says it for both, and that of the text part may not know the word (qwen2_vl).
    head, embeddings = language_model.get_output_embeddings(), language_model.get_input_embeddings()
    language_model.config.tie_word_embeddings = head.weight is embeddings.weight
    language_model.generation_config = composite.generation_config
    return language_model.eval()


def source_name(source: PartSource) -> str | None:
    """Hub id of a part if it has one; `None` for configs and for local folders, whose paths mean nothing elsewhere."""
    name = source.name_or_path if isinstance(source, (PreTrainedModel, PreTrainedConfig)) else os.fspath(source)
    return None if not name or os.path.exists(name) else name


def pretrained_name(source: Any) -> str | None:
    """Where files of a part (tokenizer, image processor, card) may be found: a path or Hub id, or `None`."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return getattr(source, "name_or_path", None) or None


def _check_source(source: Any) -> None:
    if not isinstance(source, (str, os.PathLike, PreTrainedConfig, PreTrainedModel)):
        raise TypeError(
            f"A part must be a Hub id, a local path, a PreTrainedConfig or a PreTrainedModel, not {type(source).__name__}."
        )


def _config_of(source: PartSource, trust_remote_code: bool) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source)
    return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def _sub_config(config: PreTrainedConfig, key: str) -> PreTrainedConfig:
    sub_config = getattr(config, key, None)
    return sub_config if isinstance(sub_config, PreTrainedConfig) else config


def _check_mapping(config: PreTrainedConfig, mapping, wanted: str, example: str) -> None:
    if type(config) not in mapping:
        other = "a language model" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else "no causal language model"
        what = other if mapping is MODEL_MAPPING else "no causal language model (an encoder, or not a text model)"
        raise CompositionError(
            f"{config.model_type!r} is {what} in transformers, so it cannot be the {wanted}. Pass {example}."
        )


def _vision_part(model: PreTrainedModel) -> PreTrainedModel:
    """The tower inside a composite instance; the instance itself if it is not a composite."""
    vision_config = getattr(model.config, "vision_config", None)
    if not isinstance(vision_config, PreTrainedConfig):
        return model
    tower_class = vision_tower_class(vision_config)
    for module in model.modules():
        if tower_class is not None and isinstance(module, tower_class):
            return module
    raise CompositionError(
        f"{type(model).__name__} does not hold its vision part as a model of its own. Pass the tower itself."
    )


def _load_remote(
    source: PartSource, code: RemoteCode, auto_class: type, key: str, dtype: torch.dtype | None
) -> PreTrainedModel:
    """A part with code of its own, built from the copy of that code which will travel with the model."""
    part_code = bundle_remote_code(code, key)
    config_class = part_config_class(part_code)
    if isinstance(source, PreTrainedConfig):
        config = config_class.from_dict(source.to_dict())
    else:
        config = config_class.from_pretrained(source)
    for name in ("vision_config", "text_config"):
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            raise CompositionError(
                f"{config_class.__name__} is a model of several parts with code of its own, from which one part cannot be "
                "taken. Load it, and pass the part as an instance."
            )
    if key == "text_config" and config.is_encoder_decoder:
        raise CompositionError(f"{config_class.__name__} is an encoder-decoder model. Pass a decoder.")
    config.part_code = part_code
    if isinstance(source, PreTrainedConfig):
        config.dtype = dtype or config.dtype or torch.get_default_dtype()
        return own_model_class(auto_class, config)._from_config(config)
    model = _load(own_model_class(auto_class, config), source, config, dtype)
    restore_computed_tensors(model)
    return model


def _adopt(model: PreTrainedModel, auto_class: type, key: str, trust_remote_code: bool) -> PreTrainedModel:
    """An instance as it is; if its class is code of a checkpoint, its config learns where the copy of that is."""
    code = find_remote_code(model, auto_class.__name__, trust_remote_code)
    if code is not None and getattr(model.config, "part_code", None) is None:
        model.config.part_code = bundle_remote_code(code, key)
        changed = restore_computed_tensors(model)
        if changed:
            logger.warning(
                "%s held other values than its code computes in %s, as transformers 5 leaves tensors that are in no "
                "checkpoint. They were computed again.",
                type(model).__name__,
                ", ".join(changed[:5]) + (" …" if len(changed) > 5 else ""),
            )
    return model


def _load(
    auto_class,
    source: PartSource,
    config: PreTrainedConfig,
    dtype,
    trust_remote_code: bool | None = None,
    loader: Callable | None = None,
) -> nn.Module:
    if isinstance(source, PreTrainedConfig):
        kwargs = {} if dtype is None else {"dtype": dtype}
        return auto_class.from_config(config, trust_remote_code=trust_remote_code, **kwargs)
    model, info = (loader or auto_class.from_pretrained)(
        source,
        config=config,
        dtype=dtype or "auto",
        output_loading_info=True,
        **({} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}),
    )
    # What a tower's pooling head lacks is no loss here: patches are read before it.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(("pooler.", "head.")))
    if missing:
        named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise CompositionError(
            f"{os.fspath(source)} has no weights for {len(missing)} parameters of {type(model).__name__}: {named}. It "
            "may hold this part under other names, or be another kind of checkpoint; load the part with its own class "
            "and pass the instance."
        )
    return model
