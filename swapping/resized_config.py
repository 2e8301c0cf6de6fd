"""The config of a tower for pictures, or patches, of another size."""

import copy
import math
from typing import Any

from transformers import PreTrainedConfig

from ..composition.errors import CompositionError
from ..composition.image_processors import config_size


Size = tuple[int, int]
#: Under which some configs state the number of patches of a picture beside its size (Molmo 2).
_COUNTS = ("num_patches", "num_position_embeddings")


def resized_config(config: PreTrainedConfig, image_size: Size, patch_size: int | None = None) -> PreTrainedConfig:
    """A copy of a tower's config for another size, each in the form in which it was stated.

    Raises:
        CompositionError: the config states no such size, or takes squares alone.
    """
    new_config = copy.deepcopy(config)
    wanted = {"image_size": image_size} if config_size(config) not in (None, image_size) else {}
    if patch_size is not None:
        wanted["patch_size"] = (patch_size, patch_size)
    for key, size in wanted.items():
        stated = getattr(config, key, None)
        if isinstance(stated, int):
            value: Any = size[0] if size[0] == size[1] else list(size)
        elif isinstance(stated, (list, tuple)) and len(stated) == 2:
            value = type(stated)(size)
        else:
            raise CompositionError(
                f"{type(config).__name__} states no {key} for its pictures ({stated!r}), so it cannot be changed."
            )
        try:
            setattr(new_config, key, value)
        except Exception as error:  # noqa: BLE001 - configs validate what they are given in ways of their own
            raise CompositionError(f"{type(config).__name__} does not take {key}={value}: {error}") from error
    if config_size(config) is not None:
        count, new_count = (
            math.prod(edge // stated_patch_size(each) for edge in config_size(each)) for each in (config, new_config)
        )
        for key in _COUNTS:
            if getattr(config, key, None) == count:
                setattr(new_config, key, new_count)
    return new_config


def stated_patch_size(config: PreTrainedConfig) -> int:
    """Pixels along each edge of a patch, 1 where the config states none."""
    size = getattr(config, "patch_size", None)
    size = size[0] if isinstance(size, (list, tuple)) and size else size
    return size if isinstance(size, int) else 1
