"""In which ways a vision tower may take pictures: from its signature and its config, before it is run."""

import inspect

from torch import nn
from transformers import PreTrainedConfig

from ..modeling.picture_inputs import PICTURE_INPUTS, picture_kinds
from .errors import CompositionError


def picture_inputs(vision_tower: nn.Module) -> str:
    """The likeliest row of `PICTURE_INPUTS` for a tower, from its signature alone.

    Raises:
        CompositionError: the tower takes no pixels, or needs something that no picture has.
    """
    return candidate_inputs(vision_tower, (224, 224), type(vision_tower).__name__)[0]["inputs"]


def candidate_inputs(vision_tower: nn.Module, image_size: tuple[int, int], name: str) -> list[dict]:
    """Ways in which this tower may take pictures, the likeliest first, as the first keys of the spec.

    Raises:
        CompositionError: none: the tower takes no pixels, or needs something that no picture has.
    """
    parameters = inspect.signature(vision_tower.forward).parameters
    config = vision_tower.config
    kinds = picture_kinds(parameters)
    if not kinds or "input_ids" in parameters:
        takes = ", ".join(key for key in list(parameters)[:4])
        text = "input_ids" in parameters
        raise CompositionError(
            f"{name} does not take pictures alone (pixel_values) but {takes}. "
            + (
                "If it is a language model, pass it as text=…; a vision tower such as dinov2, siglip or clip is passed "
                "as vision=…."
                if text
                else "Pass a vision tower such as dinov2, siglip or clip as vision=…."
            )
        )
    found = []
    for kind, arguments in kinds.items():
        for details in _details(kind, config, image_size):
            row = PICTURE_INPUTS[kind]
            found.append({"inputs": kind, "arguments": arguments, "any_size": row.any_size, **details})
    needed = [
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in found[0]["arguments"].values()
    ]
    if needed:
        raise CompositionError(
            f"{name} needs {', '.join(needed)} beside {found[0]['arguments']['pixels']}, which no picture gives. The "
            "nearest that works: siglip_vision_model or dinov2."
        )
    return found


def _details(kind: str, config: PreTrainedConfig, image_size: tuple[int, int]) -> list[dict]:
    """What the config says about patches, frames and tiles; several answers where it does not say."""
    if kind == "masked_pictures":
        config.mask_ratio = 0.0
        rows, columns = (edge // _integer(config, "patch_size", 16) for edge in image_size)
        return [{"patch": None, "num_patches": rows * columns}]
    if kind == "tiles":
        return [{"patch": None, "num_tiles": config.max_num_tiles}]
    if kind == "padded_pictures":
        patch = {"size": _integer(config, "patch_size", 16), "frames": 1, "form": "flat", "block": 1}
        return [{"patch": {**patch, "drops_rest": True}}]
    if not PICTURE_INPUTS[kind].is_patches:
        return [{"patch": None, **({"num_frames": _integer(config, "num_frames", 2)} if kind == "frames" else {})}]
    size = _integer(config, "patch_size", 16)
    block = _integer(config, "spatial_merge_size", 0) or _integer(config, "merge_size", 1)
    if kind != "packed_patches":
        return [{"patch": {"size": size, "frames": 1, "form": "flat", "block": 1}}]
    stated = _integer(config, "temporal_patch_size", 1)
    return [
        *(
            {"patch": {"size": size, "frames": n, "form": "flat", "block": block}}
            for n in dict.fromkeys((stated, 1, 2))
        ),
        {"patch": {"size": size, "frames": 1, "form": "channels_first", "block": 1}},
        {"patch": {"size": size, "frames": 1, "form": "row", "block": 1}},
        # Some count their grid in merged patches.
        {"patch": {"size": size * block, "frames": 1, "form": "channels_last", "block": 1}},
    ]


def patch_edge(config: PreTrainedConfig) -> int:
    """Pixels that each edge of a picture must be a multiple of, for towers that take patches."""
    merge = _integer(config, "spatial_merge_size", 0) or _integer(config, "merge_size", 1)
    return _integer(config, "patch_size", 16) * max(merge, _integer(config, "pooling_kernel_size", 1))


def _integer(config: PreTrainedConfig, key: str, default: int) -> int:
    value = getattr(config, key, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else default
