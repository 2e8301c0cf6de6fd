"""Understand a vision tower by running it, so that nothing is decided by its name.

What is learned about a tower is written into `AnyVlmConfig.vision_tower_spec` (keys in `modeling/vision_towers.py`).
Shapes are taken on the meta device, without weights or arithmetic; what shapes cannot tell, and towers that cannot run
on the meta device, take one small real run.
"""

import contextlib
import copy
import inspect
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..configuration.image_tokens import image_grids
from ..modeling.picture_inputs import PICTURE_INPUTS, tower_arguments
from ..modeling.vision_towers import build_vision_tower, call_vision_tower, read_features, select_output, to_sequence
from .errors import CompositionError
from .running import device_of, in_mode, num_channels, synthetic_pictures
from .tower_inputs import candidate_inputs, patch_edge
from .tower_layout import factor_grid, feature_layout, tokens_beside_patches


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
    spec, raw_features, has_places = _run(vision_tower, image_size, layer, name)
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
            "grid": list(factor_grid(num_features, image_size)),
        }
    layouts = {feature_layout(features, spec, vision_tower, image_size, name) for features in raw_features}
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
        prefix, suffix = tokens_beside_patches(vision_tower, spec, num_features, sequence[0].shape[-1])
        if select_strategy == "full" and prefix + suffix:
            prefix = suffix = 0
            grid = (1, num_features)
        else:
            num_patches = num_features - prefix - suffix
            grid = factor_grid(num_patches, image_size) if has_places else (1, num_patches)
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
    pictures = synthetic_pictures(1, num_channels(vision_tower.config), other).to(device_of(vision_tower))
    with torch.no_grad(), in_mode(vision_tower):
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
    pictures = pictures.to(device_of(vision_tower), vision_tower.dtype)
    grids = image_grids(spec, pictures, {})

    def run(pictures: torch.Tensor) -> torch.Tensor:
        with in_mode(vision_tower):
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
    alone = _run_alone(run, pictures[:1], name, vision_tower)
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


def _run_alone(run, picture: torch.Tensor, name: str, vision_tower: nn.Module) -> torch.Tensor:
    """Features of one picture, with a graph, since a tower must be trainable.

    Raises:
        CompositionError: it does not run on one picture, or no gradient reaches it.
    """
    # One that is frozen now may be trained later, unless its class freezes it.
    frozen = [p for p in vision_tower.parameters() if not p.requires_grad and p.is_floating_point()]
    if frozen and _freezes_itself(vision_tower):
        frozen = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            alone = run(picture)
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported
        raise CompositionError(
            f"{name} runs on two pictures but not on one ({type(error).__name__}: {error}), as a model of clips does "
            "that takes the batch for one clip. Pass a tower of pictures such as clip or dinov2."
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not alone.requires_grad:
        raise CompositionError(
            f"{name} gives features that carry no gradient, such as the codes of a codec. Pass a tower such as clip or "
            "dinov2."
        )
    return alone.detach()


def _freezes_itself(vision_tower: nn.Module) -> bool:
    with contextlib.suppress(Exception), torch.device("meta"):  # what cannot be built there is no class that does so
        return not any(parameter.requires_grad for parameter in build_vision_tower(vision_tower.config).parameters())
    return False


#: How a message names the rows of `PICTURE_INPUTS`.
_SPOKEN = {kind: kind.replace("_", " ") for kind in PICTURE_INPUTS} | {"pictures": "whole pictures"}


def _run(vision_tower, image_size, layer, name) -> tuple[dict, list[torch.Tensor], bool]:
    """First on the meta device, then for real; in each way that the tower may take pictures, plainly and with
    interpolated position embeddings. Returns the spec so far, the raw features of two pictures, and whether they are of
    places in one picture."""
    candidates = candidate_inputs(vision_tower, image_size, name)
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
            # A copy: building a levit writes into its config.
            towers.insert(0, build_vision_tower(copy.deepcopy(vision_tower.config)).eval())
    for tower in towers:
        errors = []
        pictures = torch.zeros(2, num_channels(tower.config), *image_size, device=device_of(tower), dtype=tower.dtype)
        for candidate in candidates:
            for call_kwargs in attempts:
                spec = {**candidate, "call_kwargs": call_kwargs, "output": "last_hidden_state"}
                try:
                    with torch.no_grad(), in_mode(tower):
                        if layer is None:
                            outputs = tower(**tower_arguments(spec, pictures, {}), **call_kwargs)
                            spec["output"] = _output_name(outputs, name)
                            has_places = not _is_decoded(outputs)
                            raw_features = [select_output(outputs, spec["output"])]
                        else:
                            raw_features = call_vision_tower(tower, spec, pictures, layer)
                            has_places = True
                except CompositionError:
                    raise
                except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported below
                    errors.append(f"{type(error).__name__}: {error}")
                    continue
                one_row = raw_features[0].ndim == 3 and raw_features[0].shape[0] == 1  # pixtral
                if PICTURE_INPUTS[spec["inputs"]].is_patches or raw_features[0].shape[0] == 2 or one_row:
                    return spec, raw_features, has_places and spec["inputs"] != "frames"
                errors.append(f"2 pictures gave features of shape {tuple(raw_features[0].shape)}")
    height, width = image_size
    raise CompositionError(
        f"{name} could not be run on single pictures of {height}x{width} pixels, as "
        f"{' nor as '.join(dict.fromkeys(_SPOKEN[candidate['inputs']] for candidate in candidates))}: "
        f"{errors[0].rstrip('.')}. If it was made for another size, pass image_size=…; if it takes something else (pairs, "
        "codes), it cannot be a vision tower: pass one such as dinov2 or siglip_vision_model."
    )


def _is_decoded(outputs) -> bool:
    """Whether a detector's decoder gave the features: those are of its queries, not of places in the picture."""
    decoders = ("encoder_last_hidden_state", "intermediate_hidden_states")
    return isinstance(outputs, Mapping) and any(outputs.get(key) is not None for key in decoders)


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
