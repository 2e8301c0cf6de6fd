"""Understand a part by running it once, so that nothing is decided by its name.

What is learned about a tower is written into `AnyVlmConfig.vision_tower_spec` (keys in `modeling/vision_towers.py`).
Shapes are taken on the meta device, without weights or arithmetic; what shapes cannot tell, and towers that cannot run
on the meta device, take one small real run.
"""

import contextlib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration.image_tokens import image_grids
from ..modeling.picture_inputs import PICTURE_INPUTS, picture_kinds, tower_arguments
from ..modeling.vision_towers import build_vision_tower, call_vision_tower, read_features, select_output, to_sequence
from .errors import CompositionError


logger = logging.getLogger(__name__)


def probe_vision_tower(
    vision_tower: nn.Module,
    image_size: tuple[int, int],
    layer: int | Sequence[int] | None = None,
    select_strategy: str = "default",
) -> dict:
    """Measure how a tower is called and read; returns the `vision_tower_spec`.

    Args:
        vision_tower: The bare transformers model.
        image_size: Pixels `(height, width)` of the pictures that the image processor makes; an example of them where
            their size is free.
        layer: As `AnyVlmConfig.vision_feature_layer`.
        select_strategy: As `AnyVlmConfig.vision_feature_select_strategy`.

    Raises:
        CompositionError: the tower takes something else than pictures of this size, or its output cannot be read.
    """
    name = type(vision_tower).__name__
    spec, raw_features = _run(vision_tower, image_size, layer, name)
    spec["image_size"] = list(image_size)
    if spec["patch"] is not None:
        return _patch_spec(vision_tower, spec, raw_features, layer, name)
    if raw_features[0].shape[0] == 1:
        # pixtral: the features of all pictures one after another.
        num_features = raw_features[0].shape[1] // 2
        return {
            **spec,
            "layout": "packed",
            "num_prefix_tokens": 0,
            "num_suffix_tokens": 0,
            "merge_size": 1,
            "hidden_size": sum(features.shape[-1] for features in raw_features),
            "grid": list(_factor(num_features, image_size)),
        }
    layouts = {_layout(features, spec, vision_tower, image_size, name) for features in raw_features}
    shapes = {tuple(to_sequence(features, layout).shape[1:2]) for features in raw_features for layout in layouts}
    if len(layouts) > 1 or len(shapes) > 1:
        raise CompositionError(
            f"The layers {layer} of {name} have features of different shapes "
            f"{[tuple(features.shape[1:]) for features in raw_features]}. Choose layers of one stage."
        )
    layout = layouts.pop()
    sequence = [to_sequence(features, layout) for features in raw_features]
    num_features = sequence[0].shape[1]
    prefix = suffix = 0
    if layout in ("sequence", "tiles"):
        if select_strategy == "full":
            grid = (1, num_features)
        else:
            prefix, suffix = _tokens_beside_patches(vision_tower, spec, num_features)
            grid = _factor(num_features - prefix - suffix, image_size)
    else:
        shape = raw_features[0].shape
        grid = tuple(shape[2:4]) if layout == "channels_first" else tuple(shape[1:3])
    return {
        **spec,
        "layout": layout,
        "num_prefix_tokens": prefix,
        "num_suffix_tokens": suffix,
        "merge_size": 1,
        "hidden_size": sum(features.shape[-1] for features in sequence),
        "grid": list(grid),
    }


def _patch_spec(vision_tower, spec: dict, raw_features: list[torch.Tensor], layer, name: str) -> dict:
    """The rest of the spec of a tower that takes patches: how many patches of the input make one feature.

    Raises:
        CompositionError: the number of features does not follow from the number of patches.
    """
    size = spec["patch"]["size"]
    height, width = spec["image_size"]
    num_patches = (height // size) * (width // size)
    one_row = raw_features[0].ndim == 2 or raw_features[0].shape[0] == 1
    layout = "packed" if one_row else "sequence"
    num_features = to_sequence(raw_features[0], layout).shape[1]
    if one_row:
        num_features //= 2  # two pictures were run
    merge = math.isqrt(num_patches // num_features) if num_features else 0
    spec = {
        **spec,
        "layout": layout,
        "num_prefix_tokens": 0,
        "num_suffix_tokens": 0,
        "merge_size": merge,
        "hidden_size": sum(features.shape[-1] for features in raw_features),
        "grid": [height // size // max(merge, 1), width // size // max(merge, 1)],
    }
    if not spec["any_size"]:
        return spec
    # A picture of other proportions must agree with what was concluded from the first.
    edge = size * max(merge, 1) * spec["patch"]["block"]
    other = (2 * edge, 4 * edge)
    pictures = synthetic_pictures(1, num_channels(vision_tower.config), other).to(_device(vision_tower))
    with torch.no_grad(), _evaluating(vision_tower):
        found = call_vision_tower(vision_tower, spec, pictures.to(vision_tower.dtype), layer)
    expected = (other[0] // size) * (other[1] // size) // max(merge, 1) ** 2
    if merge * merge * num_features != num_patches or to_sequence(found[0], layout).shape[1] != expected:
        raise CompositionError(
            f"{name} makes {num_features} features of {num_patches} patches, and "
            f"{to_sequence(found[0], layout).shape[1]} of {(other[0] // size) * (other[1] // size)}; this is no merging "
            "of square neighbourhoods, so the features' places are unknown. The nearest that works: "
            "siglip2_vision_model or qwen2_5_vl_vision."
        )
    return spec


def probe_features(
    vision_tower: nn.Module, spec: dict, layer: int | Sequence[int] | None = None, is_trained: bool = True
) -> torch.Tensor:
    """Features of four synthetic pictures `(4, num_features, hidden_size)`, fp32.

    Args:
        is_trained: False for random weights, with which a deep tower may well give nearly constant features.

    Raises:
        CompositionError: they are not finite, equal for different pictures, or different for the same picture.
    """
    name = type(vision_tower).__name__
    pictures = synthetic_pictures(4, num_channels(vision_tower.config), tuple(spec["image_size"]))
    pictures = pictures.to(_device(vision_tower), vision_tower.dtype)
    grids = image_grids(spec, pictures, {})

    def run(pictures: torch.Tensor) -> torch.Tensor:
        with _evaluating(vision_tower):
            raw_features = call_vision_tower(vision_tower, spec, pictures, layer)
        return torch.stack(read_features(raw_features, spec, grids[: len(pictures)])).float()

    with torch.no_grad():
        features = run(pictures)
    if not bool(torch.isfinite(features).all()):
        raise CompositionError(
            f"{name} gives features that are not finite. Are its weights loaded, and does {vision_tower.dtype} hold "
            "their values?"
        )
    if float((features[1:] - features[:1]).abs().max()) == 0:
        if is_trained:
            raise CompositionError(f"{name} gives the same features for different pictures. Are its weights loaded?")
        logger.warning("%s gives the same features for different pictures with these random weights.", name)
    alone = _run_alone(run, pictures[:1], name)
    tolerance = 1e-2 * float(features.abs().max())
    if float((alone - features[:1]).abs().max()) > tolerance:
        with torch.no_grad():
            random = float((run(pictures) - features).abs().max()) > tolerance
        raise CompositionError(
            f"{name} gives other features each time for the same picture, as a model that drops patches at random does. "
            "Pass an encoder without that, such as vit or dinov2."
            if random
            else f"{name} gives other features for a picture alone than in a batch, as a model of clips does that takes "
            "the batch for one clip. Pass a tower of pictures such as clip or dinov2."
        )
    return features


def _run_alone(run, picture: torch.Tensor, name: str) -> torch.Tensor:
    """Features of one picture, with a graph, since a tower must be trainable.

    Raises:
        CompositionError: it does not run on one picture, or no gradient reaches it.
    """
    try:
        with torch.enable_grad():
            alone = run(picture)
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported
        raise CompositionError(
            f"{name} runs on two pictures but not on one ({type(error).__name__}: {error}), as a model of clips does "
            "that takes the batch for one clip. Pass a tower of pictures such as clip or dinov2."
        ) from error
    if not alone.requires_grad:
        raise CompositionError(
            f"{name} gives features that carry no gradient, such as the codes of a codec. Pass a tower such as clip or "
            "dinov2."
        )
    return alone.detach()


def synthetic_pictures(num_pictures: int, channels: int, image_size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Random pictures `(num_pictures, channels, height, width)`, normalised, with the 1/f spectrum of natural images.

    White noise would put a tower far from where it works; natural pictures have amplitude falling as 1/frequency
    (Field 1987, "Relations between the statistics of natural images and the response properties of cortical cells").
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = image_size
    noise = torch.randn(num_pictures, channels, height, width, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width)[None] * width)
    pictures = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp(min=1), s=image_size)
    return pictures / pictures.std()


def num_channels(config: PreTrainedConfig) -> int:
    return getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3


def picture_inputs(vision_tower: nn.Module) -> str:
    """The likeliest row of `PICTURE_INPUTS` for a tower, from its signature alone.

    Raises:
        CompositionError: the tower takes no pixels, or needs something that no picture has.
    """
    return _candidates(vision_tower, (224, 224), type(vision_tower).__name__)[0]["inputs"]


def _candidates(vision_tower: nn.Module, image_size: tuple[int, int], name: str) -> list[dict]:
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


def _run(vision_tower, image_size, layer, name) -> tuple[dict, list[torch.Tensor]]:
    """First on the meta device, then for real; in each way that the tower may take pictures, plainly and with
    interpolated position embeddings. Returns the spec so far and the raw features of two pictures."""
    candidates = _candidates(vision_tower, image_size, name)
    if PICTURE_INPUTS[candidates[0]["inputs"]].is_patches:
        edge = patch_edge(vision_tower.config)
        if any(size % edge for size in image_size):
            nearest = tuple(max(1, round(size / edge)) * edge for size in image_size)
            raise CompositionError(
                f"{name} takes patches, so each edge of a picture must be a multiple of {edge} pixels, which "
                f"{image_size[0]}x{image_size[1]} is not. Pass image_size={nearest}."
            )
    parameters = inspect.signature(vision_tower.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    plain = {"return_dict": True} if takes_any or "return_dict" in parameters else {}
    attempts = [plain]
    if "interpolate_pos_encoding" in parameters:
        attempts.append({**plain, "interpolate_pos_encoding": True})
    towers = [vision_tower]
    if not PICTURE_INPUTS[candidates[0]["inputs"]].is_patches:  # grids are read as numbers, which meta does not have
        with contextlib.suppress(Exception), torch.device("meta"):  # whatever fails there only means to run for real
            towers.insert(0, build_vision_tower(vision_tower.config).eval())
    for tower in towers:
        errors = []
        pictures = torch.zeros(2, num_channels(tower.config), *image_size, device=_device(tower), dtype=tower.dtype)
        for candidate in candidates:
            for call_kwargs in attempts:
                spec = {**candidate, "call_kwargs": call_kwargs, "output": "last_hidden_state"}
                try:
                    with torch.no_grad(), _evaluating(tower):
                        if layer is None:
                            outputs = tower(**tower_arguments(spec, pictures, {}), **call_kwargs)
                            spec["output"] = _output_name(outputs, name)
                            raw_features = [select_output(outputs, spec["output"])]
                        else:
                            raw_features = call_vision_tower(tower, spec, pictures, layer)
                except CompositionError:
                    raise
                except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported below
                    errors.append(f"{type(error).__name__}: {error}")
                    continue
                one_row = raw_features[0].ndim == 3 and raw_features[0].shape[0] == 1  # pixtral
                if PICTURE_INPUTS[spec["inputs"]].is_patches or raw_features[0].shape[0] == 2 or one_row:
                    return spec, raw_features
                errors.append(f"2 pictures gave features of shape {tuple(raw_features[0].shape)}")
    height, width = image_size
    raise CompositionError(
        f"{name} cannot be run on one picture of {height}x{width} pixels at a time: {errors[0].rstrip('.')}. If it was "
        "made for another size, pass image_size=…; the nearest that works with any: dinov2 or siglip_vision_model."
    )


def _output_name(outputs, name: str) -> str:
    """Which output of a tower holds the features of all places, see `vision_tower_spec["output"]`.

    `pooler_output` where it is the merged patches (qwen2_vl and relatives give both; merged is what they were trained
    to give), a backbone's maps, or else the last hidden state.
    """
    if isinstance(outputs, torch.Tensor) and outputs.ndim >= 3:
        return "tensor"
    if isinstance(outputs, Mapping):
        last, pooled = outputs.get("last_hidden_state"), outputs.get("pooler_output")
        if isinstance(last, torch.Tensor):
            merged = isinstance(pooled, torch.Tensor) and pooled.ndim == last.ndim == 2
            return "pooler_output" if merged and 2 < len(pooled) <= len(last) else "last_hidden_state"
        if outputs.get("feature_maps") is not None:
            return "feature_maps"
    what = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    raise CompositionError(
        f"{name} gives no features of places but {what}: it is a head for a task or a codec, not a vision tower. Pass "
        "the tower inside it, or one such as dinov2, siglip or clip."
    )


def _device(tower: nn.Module) -> torch.device:
    return next(tower.parameters()).device


class _evaluating:
    """`eval()` for the time of a run; then each module's mode as it was."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()

    def __exit__(self, *exc_info):
        for module, training in self.modes:
            module.training = training


def _layout(
    features: torch.Tensor, spec: dict, vision_tower: nn.Module, image_size: tuple[int, int], name: str
) -> str:
    """Where the channels of a map are: the axis that is not one of two spatial axes of the picture's proportions."""
    if spec["inputs"] == "tiles":
        return "tiles"
    if spec["output"] == "feature_maps" and features.ndim == 4:
        return "channels_first"  # what a backbone promises
    if features.ndim == 3:
        return "sequence"
    if features.ndim != 4:
        raise CompositionError(
            f"{name} gives features of shape {tuple(features.shape)}, which are neither a sequence nor a map. Pass a "
            "vision tower such as dinov2, siglip or clip."
        )
    _, first, middle, last = features.shape
    height, width = image_size

    def is_map(rows: int, columns: int) -> bool:
        # One stride for both axes, up to a row or column of rounding.
        return abs(rows * width - columns * height) <= max(height, width) and rows <= height and columns <= width

    candidates = []
    if is_map(middle, last):
        candidates.append("channels_first")
    if is_map(first, middle):
        candidates.append("channels_last")
    if len(candidates) != 1:
        # Both fit when there are about as many channels as rows, and none with other strides for rows than for columns
        # (text recognition). Then a width that the config states decides.
        widths = set(_config_widths(vision_tower.config))
        if last in widths and first not in widths:
            candidates = ["channels_last"]
        elif first in widths and last not in widths:
            candidates = ["channels_first"]
    if len(candidates) != 1:
        candidates = _layout_by_other_width(vision_tower, spec, tuple(features.shape), image_size)
    if len(candidates) != 1:
        raise CompositionError(
            f"{name} gives features of shape {tuple(features.shape)}, whose channels cannot be told from its rows and "
            "columns. Compose it with another image_size."
        )
    return candidates[0]


def _layout_by_other_width(vision_tower: nn.Module, spec: dict, shape: tuple[int, ...], image_size) -> list[str]:
    """The layout of a map by which axis grows with a wider picture; empty if the tower takes no wider one."""
    height, width = image_size
    pictures = synthetic_pictures(2, num_channels(vision_tower.config), (height, 2 * width)).to(_device(vision_tower))
    try:
        with torch.no_grad(), _evaluating(vision_tower):
            found = call_vision_tower(vision_tower, spec, pictures.to(vision_tower.dtype))[0].shape
    except Exception:  # noqa: BLE001 - a tower of one size may fail in any way
        return []
    grown = [axis for axis in range(4) if found[axis] != shape[axis]]
    return {(3,): ["channels_first"], (2,): ["channels_last"]}.get(tuple(grown), [])


def _config_widths(config: PreTrainedConfig) -> list[int]:
    values = []
    for key in ("hidden_size", "hidden_sizes", "output_channels", "embed_dim", "fpn_hidden_size"):
        value = getattr(config, key, None)
        values.extend(value if isinstance(value, (list, tuple)) else [value])
    return [value for value in values if isinstance(value, int)]


def _tokens_beside_patches(vision_tower: nn.Module, spec: dict, num_features: int) -> tuple[int, int]:
    """How many tokens at the start and at the end of a sequence are not patches.

    Tokens that are not patches (CLS, registers, distillation, detection tokens) enter the tower equal for every
    picture. So: run two different pictures and see which tokens of `hidden_states[0]`, before any attention, agree.
    Hierarchical towers change their number of tokens on the way; there the largest grid of the picture's proportions
    that fits is the map, and what is left over stands in front of it (pvt).
    """
    image_size = tuple(spec["image_size"])
    pictures = synthetic_pictures(2, num_channels(vision_tower.config), image_size)
    pictures = pictures.to(_device(vision_tower), vision_tower.dtype)
    with torch.no_grad(), _evaluating(vision_tower):
        arguments = {**tower_arguments(spec, pictures, {}), **spec["call_kwargs"]}
        outputs = vision_tower(**arguments, **_hidden_states_argument(vision_tower))
    if isinstance(outputs, torch.Tensor):
        return num_features - math.prod(_largest_grid(num_features, image_size)), 0
    hidden_states = outputs.get("hidden_states")
    if hidden_states and hidden_states[0].ndim == 3 and hidden_states[0].shape[1] == num_features:
        is_patch = (hidden_states[0][0] != hidden_states[0][1]).any(-1)
        if bool(is_patch.any()):
            positions = is_patch.nonzero().squeeze(1)
            return int(positions[0]), num_features - 1 - int(positions[-1])
    return num_features - math.prod(_largest_grid(num_features, image_size)), 0


def _hidden_states_argument(vision_tower: nn.Module) -> dict:
    """`output_hidden_states` for a tower that takes it; some (cvt, align) raise or take nothing of the kind."""
    parameters = inspect.signature(vision_tower.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"output_hidden_states": True} if takes_any or "output_hidden_states" in parameters else {}


def _largest_grid(num_features: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """The largest `(rows, columns)` of the picture's proportions with at most `num_features` cells."""
    height, width = image_size
    rows = int(math.sqrt(num_features * height / width) + 1e-6)
    while rows > 0:
        columns = round(rows * width / height)
        if columns and rows * columns <= num_features:
            return rows, columns
        rows -= 1
    return 1, num_features


def _factor(num_patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Grid of `num_patches` patches, or one row if they do not fill a grid of the picture's proportions."""
    grid = _largest_grid(num_patches, image_size)
    return grid if math.prod(grid) == num_patches else (1, num_patches)
