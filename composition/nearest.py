"""What comes nearest to a part that is refused, and works: tried where it can be, else from the computed table."""

import copy

from transformers import PreTrainedConfig, PreTrainedModel

from .compatibility_table import nearest_types
from .errors import CompositionError
from .image_processors import _config_size as config_size
from .language_model_probe import check_language_model
from .probe import probe_vision_tower
from .small_copies import real_copies, tiny_copy


#: Types that are tried in every run of the tests, for where the table knows nothing nearer.
_WELL_KNOWN = {"vision": ["dinov2", "siglip_vision_model", "clip_vision_model"], "text": ["llama", "qwen3", "gpt2"]}

#: Picture sizes that towers are made for, tried after the one in the config.
_USUAL_SIZES = (224, 256, 384, 448, 512)


def nearest_to_language_model(config: PreTrainedConfig, model_class: type | None = None) -> list[str]:
    """The decoder form of an encoder where it has one that works, then types that work."""
    if model_class is not None and getattr(config, "is_decoder", None) is False:
        decoder = copy.deepcopy(config)
        decoder.is_decoder = True
        for model in real_copies(model_class, decoder, [tiny_copy(decoder)]):
            try:
                check_language_model(model)
            except Exception:  # noqa: BLE001 - refused too, or this form has other needs: then it is no help
                break
            return [f"text: the same config with is_decoder=True ({type(config).__name__}, tried here)"]
    return [f"text: {', '.join(_nearest_types('text', config.model_type))}"]


def nearest_to_tower(config: PreTrainedConfig) -> list[str]:
    return [f"vision: {', '.join(_nearest_types('vision', config.model_type))}"]


def nearest_size(tower: PreTrainedModel, config: PreTrainedConfig) -> list[str]:
    """A picture size that a tower takes which refused another; empty if none of the usual ones is."""
    stated = config_size(config)
    for size in dict.fromkeys([*([stated] if stated else []), *((edge, edge) for edge in _USUAL_SIZES)]):
        try:
            probe_vision_tower(tower, size)
        except CompositionError:
            continue
        return [f"image_size={size[0] if size[0] == size[1] else size} (tried here)"]
    return []


def _nearest_types(kind: str, model_type: str) -> list[str]:
    return nearest_types(kind, model_type) or _WELL_KNOWN[kind]
