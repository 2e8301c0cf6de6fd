"""The tower's features of each picture of a batch, for losses on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...configuration.image_tokens import Grid, image_grids
from ...configuration.image_views import has_several_views
from ...configuration.instructions import INSTRUCTION_KEYS
from ...modeling.picture_inputs import PROCESSOR_KEYS
from ...modeling.video_tokens import check_frames
from ...modeling.view_joining import check_views
from ..collator import place_media
from .base import ObjectiveBatch


def composed_model(model: nn.Module) -> PreTrainedModel:
    """The composed model in what wraps it: adapters, several processes, a compiler.

    Raises:
        ValueError: there is none in it.
    """
    for module in model.modules():
        # A checkpoint brings classes of its own, so the class does not tell.
        if isinstance(module, PreTrainedModel) and module.config.model_type == AnyVlmConfig.model_type:
            return module
    raise ValueError(f"There is no model made by anyvlm.compose in this {type(model).__name__}.")


def media_of(sample: Mapping[str, Any]) -> dict[str, list]:
    """A sample's pictures and videos, in order, by kind (`image`, `video`); none in one of text alone."""
    return {} if sample.get("messages") is None else place_media(sample)[1]


def tower_inputs(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What of a model's inputs its tower reads beside `pixel_values`."""
    names = [name for name in PROCESSOR_KEYS if name not in INSTRUCTION_KEYS]
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def trained_features(batch: ObjectiveBatch, otherwise: str) -> torch.Tensor | None:
    """The tower's features with their graph; `None` if the batch has no pictures.

    Args:
        otherwise: What a frozen tower does, for the error.

    Raises:
        ValueError: the tower is frozen.
    """
    if batch.outputs.image_features is None:
        return None
    features = batch.outputs.image_features.last_hidden_state
    if not features.requires_grad:
        raise ValueError(
            f"The vision tower is frozen, so {otherwise}. Train at least its last layers "
            '(train_parts(model, {"vision_tower": {"train": "last 4 layers"}, …})), give this loss weight 0 while it is '
            "frozen, or leave the loss out."
        )
    return features


def view_features(
    config: AnyVlmConfig, inputs: Mapping[str, Any], features: torch.Tensor
) -> tuple[list[torch.Tensor], list[Grid]]:
    """Features `(places, hidden_size)` of each view, in order, and their grids.

    Args:
        inputs: The model's inputs.
        features: `last_hidden_state` of what `get_image_features` returned for them: `(views, places, hidden_size)`, or
            `(all places, hidden_size)` where the pictures have several sizes.
    """
    beside = {**tower_inputs(inputs), "tower_grids": inputs.get("tower_grids")}
    grids = image_grids(config.vision_tower_spec, inputs.get("pixel_values"), beside)
    if features.ndim == 3:
        return list(features), grids
    return list(features.split([rows * columns for rows, columns in grids])), grids


def views_of_pictures(config: AnyVlmConfig, inputs: Mapping[str, Any], num_views: int) -> list[int]:
    """The number of views of each picture, and of frames of each video, in the order of the text."""
    frames, sizes = inputs.get("num_video_frames"), inputs.get("original_sizes")
    plans = []
    if has_several_views(config.image_views) and sizes is not None and len(sizes):
        of_videos = 0 if frames is None else int(frames.sum())
        plans = check_views(config.image_views, sizes, num_views - of_videos)
    return check_frames(frames, [len(plan.views) for plan in plans], num_views)


def pooled_features(views: Sequence[torch.Tensor], num_views: Sequence[int]) -> torch.Tensor:
    """`(num_pictures, hidden_size)`: the mean of a picture's features over all of its places, in fp32.

    Args:
        views: `(places, hidden_size)` of each view.
        num_views: Of each picture.
    """
    pooled, start = [], 0
    for count in num_views:
        pooled.append(torch.cat(list(views[start : start + count])).float().mean(0))
        start += count
    return torch.stack(pooled)
