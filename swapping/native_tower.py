"""A tower of one size of pictures, so that it takes each picture in its own size and proportions."""

import logging
import math

import torch
from torch import nn
from transformers import PreTrainedConfig, Siglip2VisionConfig, Siglip2VisionModel

from ..composition.image_processors import config_size
from ..composition.native_views import features_along_a_token, spec_for_native_views
from ..composition.probe import probe_vision_tower
from ..composition.running import device_of, in_mode, num_channels, synthetic_pictures
from ..composition.views import Measured, fewest_and_most_tokens, views_settings
from ..configuration.image_tokens import image_grids
from ..configuration.token_grids import token_grid
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.vision_towers import call_vision_tower, read_features


logger = logging.getLogger(__name__)

#: Largest difference of a feature, in parts of the largest, that is rounding.
_TOLERANCE = 1e-5
#: Of NaFlex's config alone.
_OWN_FIELDS = {"num_patches"}


def native_tower(vision_tower: nn.Module) -> nn.Module:
    """A tower with the same weights that takes pictures of any size, for `views="native"`.

    SigLIP becomes NaFlex, which differs from it only in how pictures come in and in that positions are interpolated for
    each of them (Tschannen et al. 2025, "SigLIP 2", section 2.4.2); pictures of SigLIP's own size give equal features.
    Towers that interpolate their positions (CLIP, DINOv2, ViT, …) and convolutional ones are returned as they are:
    pictures of one size are run together (`composition/any_size.py`).

    Raises:
        CompositionError: the tower takes pictures of one size alone. `resized_tower` gives it another one.
    """
    naflex = naflex_tower(vision_tower)
    if naflex is not None:
        return naflex
    size = config_size(vision_tower.config) or (224, 224)
    spec_for_native_views(probe_vision_tower(vision_tower, size), vision_tower, None)
    return vision_tower


def native_views(views: str | dict, model: AnyVlmForConditionalGeneration) -> dict:
    """Views of type `"native"`, within as many tokens as the largest picture took before, which the language model knows.

    Args:
        views: As for `compose`; a budget that it states stays.
    """
    settings = views_settings(views)
    config = model.config
    if "max_tokens" in settings or config.vision_tower_spec["any_size"]:
        return settings
    _, most = fewest_and_most_tokens(Measured(config.vision_tower_spec, config.projector_config, config.image_views))
    # The budget of a projector of queries is one of features.
    own = math.prod(token_grid(config.projector_config, tuple(config.vision_tower_spec["grid"])))
    if features_along_a_token(config.projector_config) is None:
        most = most * math.prod(config.vision_tower_spec["grid"]) // own
    return {**settings, "max_tokens": max(most, settings.get("min_tokens", 1))}


def naflex_tower(vision_tower: nn.Module) -> Siglip2VisionModel | None:
    """SigLIP's weights in a NaFlex tower; `None` for a tower that has other tensors, or computes something else."""
    config = vision_tower.config
    size, patch = config_size(config), getattr(config, "patch_size", None)
    if size is None or size[0] != size[1] or not isinstance(patch, int):
        return None
    fields = (
        Siglip2VisionConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys() - _OWN_FIELDS
    )
    stated = {key: getattr(config, key) for key in fields if key in type(config).__dataclass_fields__}
    if stated.keys() != fields:
        return None
    new_config = Siglip2VisionConfig(**stated, num_patches=(size[0] // patch) ** 2)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Siglip2VisionModel(new_config).state_dict().items()}
    tensors = {
        # NaFlex's patches are flat, the channels of each pixel side by side.
        key: tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor
        for key, tensor in vision_tower.state_dict().items()
    }
    if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        return None
    new_config._attn_implementation = config._attn_implementation
    with torch.random.fork_rng():  # weights are drawn, and then overwritten
        tower = Siglip2VisionModel._from_config(new_config, dtype=vision_tower.dtype)
    tower.load_state_dict(tensors)
    tower.to(device_of(vision_tower)).train(vision_tower.training)
    frozen = {key for key, parameter in vision_tower.named_parameters() if not parameter.requires_grad}
    for key, parameter in tower.named_parameters():
        parameter.requires_grad_(key not in frozen)
    cut = size[0] // patch * patch  # a convolution leaves out what is no whole patch
    found, expected = (_features(each, (edge, edge), cut) for each, edge in ((tower, cut), (vision_tower, size[0])))
    if found.shape != expected.shape or float((found - expected).abs().max()) > _tolerance(vision_tower, expected):
        logger.info("%s has SigLIP's tensors, but gives other features with them.", type(vision_tower).__name__)
        return None
    return tower


def _tolerance(vision_tower: nn.Module, features: torch.Tensor) -> float:
    eps = max(_TOLERANCE, 8 * torch.finfo(vision_tower.dtype).eps)
    return eps * max(1.0, float(features.abs().max()))


def _features(vision_tower: nn.Module, size: tuple[int, int], cut: int) -> torch.Tensor:
    """Of a picture whose first `cut` pixels along each edge are the same for every size, fp32."""
    spec = probe_vision_tower(vision_tower, size)
    pictures = torch.zeros(1, num_channels(vision_tower.config), *size)
    pictures[..., :cut, :cut] = synthetic_pictures(1, pictures.shape[1], (cut, cut))
    pictures = pictures.to(device_of(vision_tower), vision_tower.dtype)
    with torch.no_grad(), in_mode(vision_tower):
        raw_features = call_vision_tower(vision_tower, spec, pictures)
    return read_features(raw_features, spec, image_grids(spec, pictures, {}))[0].float()
