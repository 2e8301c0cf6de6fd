"""What comes nearest to a part that is refused, and works: tried where it can be, else from the computed table."""

import time

from transformers import PreTrainedConfig, PreTrainedModel

from .compatibility_table import nearest_types
from .image_processors import config_size
from .probe import probe_vision_tower


#: Types that are tried in every run of the tests, for where the table knows nothing nearer.
_WELL_KNOWN = {"vision": ["dinov2", "siglip_vision_model", "clip_vision_model"], "text": ["llama", "qwen3", "gpt2"]}

#: Picture sizes that towers are made for, tried after the one in the config.
_USUAL_SIZES = (224, 256, 384, 448, 512)


#: Seconds after which no further picture size is tried.
_MAX_SECONDS = 2.0


def nearest_size(tower: PreTrainedModel, config: PreTrainedConfig) -> list[str]:
    """A picture size that a tower takes which refused another; empty if none of the usual ones is."""
    started = time.monotonic()
    stated = config_size(config)
    for size in dict.fromkeys([*([stated] if stated else []), *((edge, edge) for edge in _USUAL_SIZES)]):
        if time.monotonic() - started > _MAX_SECONDS:
            break
        try:
            probe_vision_tower(tower, size)
        except Exception:  # noqa: BLE001 - a tower that does not take this size may fail in any way
            continue
        return [f"image_size={size[0] if size[0] == size[1] else size} (tried here)"]
    return []


def nearest_types_to(kind: str, model_type: str) -> list[str]:
    """Types that work and are named alike, else some that are tried in every run of the tests."""
    return [f"{kind}: {', '.join(nearest_types(kind, model_type) or _WELL_KNOWN[kind])}"]
