"""Several vision towers that look at the same pictures, as one tower.

Each tower gets its own channels of `pixel_values`, cut to its own size, so that its pictures are those that its own image
processor makes (`processing/fused_image_processor.py`). Their features are joined by `vision_fusion`:

* `"channel"`: each place of the first tower's grid gets the features of all towers, one after another, as in Prismatic
  (DINOv2 and SigLIP, Karamcheti et al. 2024) and OpenVLA. A tower of another grid is brought to the first one's by
  bilinear interpolation in fp32, as in Cambrian-1 (Tong et al. 2024).
* `"token"`: the features of all towers, one tower after another, each in channels of its own and zero in the others', so
  that the projector's first layer has weights of its own for each tower, as a mixture of features has (Tong et al. 2024,
  "Eyes Wide Shut?").
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..configuration.fused_vision_towers_config import FusedVisionTowersConfig
from ..configuration.image_tokens import Grid, image_grid
from .vision_towers import build_vision_tower, call_vision_tower, graph_if_trained, read_features


class TowerList(PreTrainedModel):
    """The towers under `0`, `1`, …

    A model, and no plain list: transformers gathers from models that are direct children what it has to know of them
    (what stays in fp32, what is not split over devices, tied weights, plans for several devices).
    """

    config_class = FusedVisionTowersConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FusedVisionTowersConfig):
        super().__init__(config)
        for index, tower in enumerate(config.towers):
            self.add_module(str(index), build_vision_tower(tower))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing here is ours; the towers initialise themselves."""

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]

    def __setitem__(self, index: int, tower: nn.Module) -> None:
        setattr(self, str(range(len(self))[index]), tower)


class FusedVisionTowers(PreTrainedModel):
    """Towers under `towers.0`, `towers.1`, …, with the weights' own names below that."""

    config_class = FusedVisionTowersConfig
    config: FusedVisionTowersConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FusedVisionTowersConfig):
        super().__init__(config)
        self.towers = TowerList(config)
        self.supports_gradient_checkpointing = any(tower.supports_gradient_checkpointing for tower in self.towers)
        self._supports_attention_backend = all(tower._supports_attention_backend for tower in self.towers)
        self._supports_sdpa = all(tower._supports_sdpa for tower in self.towers)
        self._supports_flash_attn = all(tower._supports_flash_attn for tower in self.towers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing here is ours; the towers initialise themselves."""

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Features of all towers.

        A tower none of whose parameters require a gradient is frozen, and runs in `eval()` and without a graph, also
        beside one that is trained.

        Args:
            pixel_values: `(num_images, channels of all towers, height, width)`, the height and width of the largest.

        Returns:
            `last_hidden_state`, `(num_images, places, summed widths)`: the places of the first tower's grid, or for
            `"token"` those of all towers.
        """
        features = []
        channels = pixel_values.split(self.config.tower_channels, dim=1)
        for tower, spec, layer, pictures in zip(
            self.towers, self.config.tower_specs, self.config.vision_feature_layers, channels
        ):
            height, width = spec["image_size"]
            pictures = pictures[:, :, :height, :width].contiguous()
            with graph_if_trained(tower):
                raw_features = call_vision_tower(tower, spec, pictures, layer)
                grids = [image_grid(spec, height, width)] * len(pictures)
                features.append(torch.stack(read_features(raw_features, spec, grids)))
        grids = [tuple(spec["grid"]) for spec in self.config.tower_specs]
        join = join_by_token if self.config.vision_fusion == "token" else join_by_channel
        return BaseModelOutput(last_hidden_state=join(features, grids))


def join_by_channel(features: list[torch.Tensor], grids: list[Grid]) -> torch.Tensor:
    """Features `(B, N_i, C_i)` of grids `(rows, columns)` to `(B, N_0, sum of C_i)`."""
    brought = [
        own if grid == grids[0] else _interpolate(own, grid, grids[0])
        for own, grid in zip(features, grids, strict=True)
    ]
    return torch.cat(brought, dim=-1)


def join_by_token(features: list[torch.Tensor], grids: list[Grid]) -> torch.Tensor:
    """Features `(B, N_i, C_i)` to `(B, sum of N_i, sum of C_i)`, each in its own channels."""
    widths = [own.shape[-1] for own in features]
    placed = [F.pad(own, (sum(widths[:index]), sum(widths[index + 1 :]))) for index, own in enumerate(features)]
    return torch.cat(placed, dim=1)


def _interpolate(features: torch.Tensor, grid: Grid, wanted: Grid) -> torch.Tensor:
    maps = features.float().transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, size=wanted, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(features.dtype)


def build_vision_part(vision_config: PreTrainedConfig) -> nn.Module:
    """The tower that a config describes, or the towers, with random weights."""
    if isinstance(vision_config, FusedVisionTowersConfig):
        return FusedVisionTowers._from_config(vision_config)
    return build_vision_tower(vision_config)


__all__ = ["FusedVisionTowers"]
