"""Call any vision tower and get its patches as `(num_images, num_features, width)` with their grid.

The tower is the bare transformers model. How to call it and where its patches are was measured once, when the model
was composed, and is read here from `vision_tower_spec`:

| key | meaning |
|---|---|
| `call_kwargs` | arguments beside `pixel_values`, such as `interpolate_pos_encoding` |
| `layout` | `"sequence"` (B, N, C), `"channels_first"` (B, C, H, W) or `"channels_last"` (B, H, W, C) |
| `num_prefix_tokens`, `num_suffix_tokens` | tokens at either end that are no patches: CLS, registers, detection |
| `hidden_size` | width of the features that are read, summed over the layers read |
| `image_size` | pixels `[height, width]` of one picture |
| `grid` | `[rows, columns]` of features of one picture |
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from .parts import build_part


def build_vision_tower(vision_config: PreTrainedConfig) -> nn.Module:
    """The bare tower, with random weights."""
    return build_part(AutoModel, vision_config)


def call_vision_tower(
    vision_tower: nn.Module, pixel_values: torch.Tensor, layer: int | Sequence[int] | None, call_kwargs: dict
) -> list[torch.Tensor]:
    """Run the tower and return the raw features of the chosen layers, in the tower's own layout.

    `layer` is `None` for `last_hidden_state`, or one index or several into `hidden_states`.
    """
    if layer is None:
        return [vision_tower(pixel_values, return_dict=True, **call_kwargs).last_hidden_state]
    outputs = vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **call_kwargs)
    layers = [layer] if isinstance(layer, int) else list(layer)
    return [outputs.hidden_states[index] for index in layers]


def to_sequence(features: torch.Tensor, layout: str) -> torch.Tensor:
    """Raw features in any layout to `(num_images, num_features, width)`, row by row for maps."""
    if layout == "channels_first":
        return features.flatten(2).transpose(1, 2)
    if layout == "channels_last":
        return features.flatten(1, 2)
    return features


def read_features(raw_features: list[torch.Tensor], spec: dict) -> torch.Tensor:
    """Features `(num_images, num_features, hidden_size)`, without the prefix and suffix tokens that `spec` counts.

    Raises:
        ValueError: the tower gives another width than the one that was measured.
    """
    sequences = [to_sequence(features, spec["layout"]) for features in raw_features]
    features = sequences[0] if len(sequences) == 1 else torch.cat(sequences, dim=-1)
    features = features[:, spec["num_prefix_tokens"] : features.shape[1] - spec["num_suffix_tokens"]]
    if features.shape[-1] != spec["hidden_size"]:
        raise ValueError(
            f"The vision tower gives features of width {features.shape[-1]}, but the config was made for "
            f"{spec['hidden_size']}. Compose the model again with this tower."
        )
    return features
