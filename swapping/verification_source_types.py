"""Sources of a verification, sorted by what they are: their configs tell, not the order in which they were given."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ..composition.parts import vision_config_of
from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.fused_vision_towers_config import FusedVisionTowersConfig
from ..modeling.language_models import causal_lm_class
from ..modeling.picture_inputs import picture_kinds
from ..modeling.vision_towers import vision_tower_class
from .verification_sources import Source, Sources, load_image_processor, load_tokenizer


#: What a source may be said to be (`vision=PATH`), and what that means.
ROLES = {
    "vision": "vision tower",
    "text": "language model",
    "tokenizer": "tokenizer",
    "image_processor": "image processor",
    "composed": "composed model",
}


def sort_sources(against: Any, config: AnyVlmConfig, trust_remote_code: bool = False) -> Sources:
    """Sort sources by what they are, which their configs tell.

    Args:
        against: One or several of: a path or Hub id (`"vision=PATH"` and `"text=PATH"` say what it is), a model, a
            tokenizer, an image processor, `(model, processor)` of a composed model; or a dict of `ROLES` to such.
        config: Of the model that is verified. A source with several parts (a whole CLIP, a LLaVA) is used for those of
            the model's types.

    Raises:
        ValueError: it is none of these, or two sources could be meant for the same part.
        OSError: nothing is at a path.
    """
    found = [_examine(value, role, trust_remote_code) for role, value in _named(against)]
    towers = _tower_configs(config)
    sources = Sources(vision=[None] * len(towers), trust_remote_code=trust_remote_code)
    wanted = {"vision": {tower.model_type for tower in towers}, "text": {config.text_config.model_type}}
    for role in ("tokenizer", "image_processor", "composed"):
        setattr(sources, role, _only([source for source in found if set(source.types) == {role}], role))
    usable = {role: [source for source in found if _serves(source, role, wanted)] for role in wanted}
    sources.text = _only(usable["text"], "text")
    _assign_towers(sources, usable["vision"], [tower.model_type for tower in towers])
    if sources.composed is not None:
        _fill_from_composed(sources, config, towers)
    return sources


def _tower_configs(config: AnyVlmConfig) -> list[PreTrainedConfig]:
    vision_config = config.vision_config
    return vision_config.towers if isinstance(vision_config, FusedVisionTowersConfig) else [vision_config]


def _named(against: Any) -> list[tuple[str | None, Any]]:
    """`(role or None, source)` for each."""
    if against is None:
        return []
    if isinstance(against, Mapping):
        pairs = [
            (role, value) for role, values in against.items() for value in (values if _is_list(values) else [values])
        ]
    else:
        pairs = [(None, value) for value in (against if _is_list(against) else [against])]
    named = []
    for role, value in pairs:
        if role is None and isinstance(value, str) and not os.path.exists(value):
            prefix, separator, rest = value.partition("=")
            role, value = (prefix, rest) if separator else (None, value)
        if role not in (None, *ROLES):
            raise ValueError(
                f"{role!r} is nothing a source can be. Choose one of: {', '.join(ROLES)}; or leave it out."
            )
        named.append((role, value))
    return named


def _is_list(value: Any) -> bool:
    """Whether this is several sources; `(model, processor)` is one."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], ProcessorMixin):
        return False
    return isinstance(value, (list, tuple, set))


def _examine(value: Any, role: str | None, trust_remote_code: bool) -> Source:
    """What a source is."""
    name = os.fspath(value) if isinstance(value, (str, os.PathLike)) else _instance_name(value)
    if isinstance(value, PreTrainedTokenizerBase):
        return Source(value, name, {"tokenizer": ""}, role is not None)
    if isinstance(value, BaseImageProcessor):
        return Source(value, name, {"image_processor": ""}, role is not None)
    if role in ("tokenizer", "image_processor"):
        return Source(value, name, {role: ""}, True)
    if isinstance(value, PreTrainedConfig):
        raise ValueError(
            f"{name} is a config, which has no weights to compare with. Pass a path, a Hub id or a model."
        )
    if isinstance(value, tuple) and value and isinstance(value[0], PreTrainedModel):
        config = value[0].config
    elif isinstance(value, PreTrainedModel):
        config = value.config
    elif isinstance(value, (str, os.PathLike)):
        config = _config_of(value, trust_remote_code)
        if config is None:
            return _files_without_model(value, name, trust_remote_code)
    else:
        raise ValueError(f"{name} is no source. Pass a path, a Hub id, a model, a tokenizer or an image processor.")
    types = types_of(config)
    if role is not None:
        types = {role: types.get(role) or config.model_type}
    if not types:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, which is neither a vision tower nor a causal language model "
            "nor holds one as a model of its own. Pass the sources that the model was composed from."
        )
    return Source(value, name, types, role is not None)


def types_of(config: PreTrainedConfig) -> dict[str, str]:
    """Role -> model type, for what a model with this config holds. Of a composed model only that it is one."""
    if isinstance(config, AnyVlmConfig):
        return {"composed": config.model_type}
    auto_map = getattr(config, "auto_map", None) or {}  # code of its own, of which the config tells this much
    types = {}
    text_config = getattr(config, "text_config", None)
    text_config = text_config if isinstance(text_config, PreTrainedConfig) else config
    if causal_lm_class(text_config) is not None or "AutoModelForCausalLM" in auto_map:
        types["text"] = text_config.model_type
    vision_config = vision_config_of(config)
    tower_class = vision_tower_class(vision_config)
    takes_pictures = tower_class is not None and picture_kinds(inspect.signature(tower_class.forward).parameters)
    if takes_pictures or (set(auto_map) >= {"AutoModel"} and "text" not in types):
        types["vision"] = vision_config.model_type
    return types


def _config_of(path: str | os.PathLike, trust_remote_code: bool) -> PreTrainedConfig | None:
    """The config of a checkpoint; `None` for a folder without one.

    Raises:
        OSError: there is nothing at this path.
    """
    if os.path.isdir(path) and not Path(path, "config.json").is_file():
        return None
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _files_without_model(path: str | os.PathLike, name: str, trust_remote_code: bool) -> Source:
    tokenizer = load_tokenizer(path, trust_remote_code)
    if tokenizer is not None:
        return Source(tokenizer, name, {"tokenizer": ""})
    image_processor = load_image_processor(path, trust_remote_code)
    if image_processor is not None:
        return Source(image_processor, name, {"image_processor": ""})
    raise ValueError(
        f"{name} holds no model, tokenizer or image processor that transformers can load. Pass the folders or Hub ids "
        "of what the model was composed from."
    )


def _serves(source: Source, role: str, wanted: Mapping[str, set[str]]) -> bool:
    """Whether a source is meant for a part: one that has the types of some parts of the model is not meant for others."""
    if role not in source.types or "composed" in source.types:
        return False
    fitting = [own for own in wanted if source.types.get(own) in wanted[own]]
    return source.is_forced or not fitting or role in fitting


def _only(candidates: list[Source], role: str) -> Source | None:
    forced = [source for source in candidates if source.is_forced]
    # One that is this alone is meant rather than one that has it among other parts.
    alone = [source for source in candidates if len(source.types) == 1]
    for chosen in (forced, alone, candidates):
        if len(chosen) == 1:
            return chosen[0]
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(source.name for source in chosen)} could each be the {ROLES[role]}'s source. Pass "
                f"one, or say which: {role}=PATH."
            )
    return None


def _assign_towers(sources: Sources, candidates: list[Source], model_types: list[str]) -> None:
    """Give each tower its source: in order, and by type where types are given."""
    if len(model_types) == 1:
        sources.vision = [_only(candidates, "vision")]
        return
    remaining = list(candidates)
    for index, model_type in enumerate(model_types):
        fitting = [source for source in remaining if source.types["vision"] == model_type]
        if fitting:
            sources.vision[index] = fitting[0]
            remaining.remove(fitting[0])
    if remaining:
        raise ValueError(
            f"{remaining[0].name} is a {remaining[0].types['vision']!r} tower, and the model has "
            f"{' and '.join(model_types)}. Pass the towers that it was composed from."
        )


def _fill_from_composed(sources: Sources, config: AnyVlmConfig, towers: list[PreTrainedConfig]) -> None:
    """Use the parts of a composed model where no other source is given and the types are the same."""
    value = sources.composed.value
    model = value[0] if isinstance(value, tuple) else value
    other = (
        model.config
        if isinstance(model, PreTrainedModel)
        else AutoConfig.from_pretrained(value, trust_remote_code=sources.trust_remote_code)
    )
    other_towers = _tower_configs(other)
    for index, tower in enumerate(towers):
        same = len(other_towers) == len(towers) and other_towers[index].model_type == tower.model_type
        if sources.vision[index] is None and same:
            sources.vision[index] = sources.composed
        elif sources.vision[index] is None:
            types = " and ".join(own.model_type for own in other_towers)
            sources.notes.append(
                f"{sources.composed.name} has {types} where this model has {tower.model_type}: the vision tower was "
                "replaced. Pass the new one's source too, and it is compared."
            )
    if sources.text is None and other.text_config.model_type == config.text_config.model_type:
        sources.text = sources.composed
    elif sources.text is None:
        sources.notes.append(
            f"{sources.composed.name} has {other.text_config.model_type} where this model has "
            f"{config.text_config.model_type}: the language model was replaced. Pass the new one's source too, and it "
            "is compared."
        )


def _instance_name(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    name = getattr(value, "name_or_path", None)
    return f"{type(value).__name__} {name}" if name else f"a {type(value).__name__} instance"
