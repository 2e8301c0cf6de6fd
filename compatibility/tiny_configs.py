"""A tiny random config for every causal language model type and every vision type that transformers knows.

The lists of types are computed from transformers, so that a type which a new version brings is in them at once. Most
types take the common settings below; `tiny_text_settings.py` and `tiny_vision_settings.py` hold what a type needs
beyond them.
"""

import functools
import importlib
import importlib.util
import inspect
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .tiny_text_settings import TEXT, TEXT_OF_TYPE
from .tiny_vision_settings import PICTURE_SIZE, VISION, VISION_OF_TYPE


#: Names by which the first argument of a vision model's `forward` is known.
_PICTURE_ARGUMENTS = ("pixel_values", "pixel_values_videos", "flattened_patches", "image")


def text_types() -> list[str]:
    """Every type of `AutoModelForCausalLM`, sorted."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@functools.cache
def vision_types() -> list[str]:
    """Every type with a model of its own that takes pictures, sorted.

    These are the types of transformers' lists of image models and of backbones; image-text models that hold a tower
    (CLIP and its like); and those whose own class, in the module beside their config, takes pictures and nothing else,
    such as the vision parts of vision-language models, most of which no list names. Takes some seconds: modules of
    models are imported.
    """
    image_models = modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES
    types = {
        *image_models,
        *modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    image_classes = set(image_models.values())
    for model_type in set(CONFIG_MAPPING) - types:
        if modeling_auto.MODEL_MAPPING_NAMES.get(model_type) in image_classes or class_beside_config(model_type):
            types.add(model_type)
    return sorted(types.intersection(CONFIG_MAPPING))


def text_config(model_type: str) -> PreTrainedConfig:
    """A tiny config of a causal language model; a type that is more than a language model gets a tiny text part."""
    return _tiny_config(model_type, "text_config", TEXT, TEXT_OF_TYPE)


def vision_config(model_type: str) -> PreTrainedConfig:
    """A tiny config of a vision tower; a type that holds a tower beside other parts gets a tiny vision part."""
    return _tiny_config(model_type, "vision_config", VISION, VISION_OF_TYPE)


def picture_size(model_type: str) -> int:
    """Edge in pixels of the pictures that the tiny tower of a type is given."""
    config_class = CONFIG_MAPPING[model_type]
    if model_type not in PICTURE_SIZE and "vision_config" in config_class.sub_configs:
        model_type = _part_class(config_class, "vision_config").model_type
    return PICTURE_SIZE.get(model_type, VISION["image_size"])


def _tiny_config(model_type: str, part: str, common: dict, of_type: dict[str, dict]) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    own = of_type.get(model_type, {})
    if part not in config_class.sub_configs:
        return _sized(config_class, common, own)
    part_class = _part_class(config_class, part)
    # What a composite says of its part goes before what the part's type says; the rest is the composite's own.
    of_part = {**of_type.get(part_class.model_type, {}), **own.get(part, {})}
    return config_class(**{**own, part: _sized(part_class, common, of_part)})


def _part_class(config_class: type[PreTrainedConfig], part: str) -> type[PreTrainedConfig]:
    declared = config_class.sub_configs[part]
    if declared is not AutoConfig:
        return declared
    return CONFIG_MAPPING[config_class.sub_configs_defaults[part].model_type]


def _sized(config_class: type[PreTrainedConfig], common: dict, own: dict) -> PreTrainedConfig:
    """A config with the common settings that it knows, and its own; `None` as an own setting keeps the default."""
    fields = config_class.__dataclass_fields__
    settings = {}
    for name, value in common.items():
        if name not in fields or config_class.attribute_map.get(name) in fields:
            continue
        default = fields[name].default
        if isinstance(default, (list, tuple)) and not isinstance(value, list):
            # One value per stage: only a type's own settings can say it. A size may also be a height and a width.
            if name not in ("image_size", "patch_size"):
                continue
            value = [value] * len(default)
        settings[name] = value
    settings.update(own)
    return config_class(**{name: value for name, value in settings.items() if value is not None})


def class_beside_config(model_type: str) -> type[PreTrainedModel] | None:
    """The model class beside a config, without a task's head, that takes pictures and no text; `None` if there is none."""
    config_class = CONFIG_MAPPING[model_type]
    module_name = config_class.__module__.replace(".configuration_", ".modeling_")
    spec = importlib.util.find_spec(module_name)
    # Most modules need not be imported to know.
    if spec is None or not _mentions(spec.origin, config_class.__name__):
        return None
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # it needs a library that is not here; of transformers' own, this concerns sound alone
        return None
    for name, model_class in vars(module).items():
        if (
            inspect.isclass(model_class)
            and issubclass(model_class, PreTrainedModel)
            and model_class.__module__ == module_name
            and model_class.config_class is config_class
            and "For" not in name
            and _takes_only_pictures(model_class)
        ):
            return model_class
    return None


@functools.cache
def _source(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _mentions(path: str, config_name: str) -> bool:
    source = _source(path)
    return config_name in source and any(name in source for name in (*_PICTURE_ARGUMENTS, "grid_thw"))


def _takes_only_pictures(model_class: type[PreTrainedModel]) -> bool:
    names = list(inspect.signature(model_class.forward).parameters)[1:]
    if not names or {"input_ids", "decoder_input_ids"}.intersection(names):
        return False
    # Towers that take packed patches often call them hidden states; the grid tells them from a decoder.
    return names[0] in _PICTURE_ARGUMENTS or (names[0] == "hidden_states" and "grid_thw" in names)
