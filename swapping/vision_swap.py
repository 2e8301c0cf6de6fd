"""Another vision tower in a model: what can stay stays, without looking at any picture."""

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..composition.assembly import assemble, cast_as_loaded
from ..composition.errors import CompositionError
from ..composition.part_origins import part_origin
from ..composition.parts import PartSource, load_vision_tower
from ..composition.picture_plan import check_context, plan_pictures
from ..composition.probe import probe_features
from ..composition.projector_grid import check_projector_arguments, complete_projector
from ..composition.starting_scale import embedding_rms, match_embedding_scale
from ..composition.views import views_settings
from ..composition.vision_part import VisionPart, examine_vision_part, vision_sources
from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.image_tokens import Grid
from ..configuration.video_frames import has_rows_and_columns, takes_clips
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .feature_maps import core_config, core_features, core_projector, foldable_layer, mapped_config
from .resized_tower import fitted_tower
from .scaled_views import scaled_views


logger = logging.getLogger(__name__)

IMAGE_TOKENS = ("keep", "own")


def swap_vision_tower(
    model: AnyVlmForConditionalGeneration,
    processor: AnyVlmProcessor,
    vision: PartSource | Sequence[PartSource],
    *,
    projector: dict | None = None,
    image_processor: BaseImageProcessor | str | Sequence | None = None,
    image_size: int | tuple[int, int] | None = None,
    views: str | dict | None = None,
    image_tokens: str = "keep",
    vision_feature_layer: int | Sequence | str | None = None,
    vision_feature_select_strategy: str | Sequence[str] | None = None,
    vision_fusion: str = "channel",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor]:
    """A model with another tower, and its processor. Arguments as for `swap`; `projector` with its `type`.

    The new model holds the old one's language model, fusion and newline themselves. Its projector is a copy of the old one
    as far as shapes allow; what takes the new features is new where their width is another. The old model stays whole.

    Raises:
        CompositionError: the tower cannot be used in this model; the message says why and what would.
    """
    if image_tokens not in IMAGE_TOKENS:
        raise CompositionError(f"Unknown image_tokens {image_tokens!r}. Choose one of: {', '.join(IMAGE_TOKENS)}.")
    sources = vision_sources(vision)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if projector is not None:
            check_projector_arguments(projector)
        towers = [load_vision_tower(source, model.dtype, trust_remote_code) for source in sources]
        for tower in towers:
            cast_as_loaded(tower, model.dtype)
            tower.to(model.language_model.device)
        origins = [part_origin(source) for source in sources]
        if len(towers) == 1 and _same_type(towers[0], model.vision_tower):
            if image_size is None and image_processor is None:
                image_size = fixed_size(model, views)
            if vision_feature_layer is None:
                vision_feature_layer = model.config.vision_feature_layer
            if vision_feature_select_strategy is None:
                vision_feature_select_strategy = model.config.vision_feature_select_strategy
        if image_size is not None:
            towers = [_fitted(tower, image_size) for tower in towers]
        part = examine_vision_part(
            sources,
            towers,
            image_processor=image_processor,
            image_size=image_size,
            layer=None if vision_feature_layer == "last" else vision_feature_layer,
            select_strategy=vision_feature_select_strategy or "default",
            vision_fusion=vision_fusion,
            trust_remote_code=trust_remote_code,
        )
        is_trained = not all(isinstance(source, PreTrainedConfig) for source in sources)
        features = probe_features(part.tower, part.spec, part.layer, is_trained=is_trained)
        if views is None:
            settings = scaled_views(
                model.config.image_views, tuple(model.config.vision_tower_spec["image_size"]), part.size
            )
        else:
            settings = views_settings(views)
        grid = _kept_grid(model, part, settings) if image_tokens == "keep" and projector is None else None
        projector_config = _projector_config(model, part, projector, grid)
        plan = plan_pictures(
            part,
            sources[0],
            settings=settings,
            projector_config=projector_config,
            fusion=model.config.fusion,
            video_frames=carried_video_frames(model.config, part.spec, projector_config),
            image_processor=image_processor,
            image_size=image_size,
            trust_remote_code=trust_remote_code,
        )
        check_context(model.language_model.config, plan, part.spec)
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype  # saving writes its name there
        config.vision_config = copy.deepcopy(part.tower.config)
        config.vision_tower_spec = part.spec
        config.vision_feature_layer, config.vision_feature_select_strategy = part.layer, part.select_strategy
        config.projector_config = projector_config
        config.image_views = plan.measured.image_views
        config.video_frames = plan.measured.video_frames
        config.composed_from = {
            **(config.composed_from or {}),
            "vision": origins[0] if len(origins) == 1 else origins,
        }
        for tower in (*towers, part.tower):
            tower.config.dtype = model.dtype
            tower.config.name_or_path = ""
        swapped = assemble(
            config, part.tower, model.language_model, model.fusion, getattr(model, "image_newline", None)
        )
        _fill_projector(swapped, model, features, is_new=projector is not None)
    new_processor = processor_with(
        processor,
        image_processor=plan.image_processor,
        vision_tower_spec=part.spec,
        projector_config=projector_config,
        image_views=plan.measured.image_views,
        video_frames=plan.measured.video_frames,
    )
    return swapped.train(model.training), new_processor


def processor_with(processor: AnyVlmProcessor, **changes: Any) -> AnyVlmProcessor:
    """A processor that differs in some of its arguments; the others are shared."""
    names = inspect.signature(type(processor).__init__).parameters.keys() - {"self", "kwargs"}
    return type(processor)(**{**{name: getattr(processor, name, None) for name in names}, **changes})


def _same_type(tower: nn.Module, other: nn.Module) -> bool:
    return type(tower) is type(other) and tower.config.model_type == other.config.model_type


def _fitted(tower: nn.Module, image_size: int | tuple[int, int]) -> nn.Module:
    """The tower, resized if it does not take this size; or as it is, for the examination to say why it does not."""
    try:
        fitted, notes = fitted_tower(tower, image_size)
    except CompositionError:
        return tower
    if notes:
        logger.warning("%s is resized: %s.", type(tower).__name__, "; ".join(notes))
    return fitted


def fixed_size(model: AnyVlmForConditionalGeneration, views: str | dict | None = None) -> tuple[int, int] | None:
    """The size of pictures for the model's own tower, if it is one: also where it is given patches cut of pictures of any
    size, for which its image processor has none.

    Args:
        views: How pictures are to be shown; `None` for as before.
    """
    old = model.config
    settings = old.image_views if views is None else views_settings(views)
    is_cut = (old.image_views or {}).get("cut_patches", False)
    is_free = old.vision_tower_spec["any_size"] and not is_cut
    return None if is_free or (settings or {}).get("type") == "native" else tuple(old.vision_tower_spec["image_size"])


def _kept_grid(model: AnyVlmForConditionalGeneration, part: VisionPart, settings: dict | None) -> Grid | None:
    """The grid that features must be brought to, so that a picture keeps its tokens; `None` if nothing needs to be done,
    or pictures have no one grid."""
    old = model.config
    if old.vision_tower_spec["any_size"] or part.spec["any_size"] or (settings or {}).get("type") == "native":
        return None
    before = tuple(old.projector_config.get("aligned_grid") or old.vision_tower_spec["grid"])
    after = tuple(part.spec["grid"])
    # One row is what has no places, queries of a detector for one, and cannot be resampled.
    flat = any(rows == 1 and columns > 1 for rows, columns in (before, after))
    if before == after or flat:
        return None
    return before


def _projector_config(
    model: AnyVlmForConditionalGeneration, part: VisionPart, projector: dict | None, grid: Grid | None
) -> dict:
    """Raises `CompositionError` if the projector given cannot be built between the tower and the language model."""
    old, width = model.config.projector_config, part.spec["hidden_size"]
    if projector is not None:
        # The width of tokens stays, also where it is not that of the embeddings, as with some fusions.
        return complete_projector(projector, width, old["out_features"], "embed")
    core = core_config(old)
    if width != core["in_features"]:
        return mapped_config(core_projector(model.multi_modal_projector), core, width, grid)
    return core if grid is None else {**core, "aligned_grid": list(grid)}


def carried_video_frames(config: AnyVlmConfig, spec: dict, projector_config: dict) -> dict | None:
    """Settings of videos go on, unless a tower takes clips: those settings are its own. How tokens are pooled goes on where
    it could be chosen before and can be now.

    Args:
        config: Of the model as it was.
        spec, projector_config: As they are now.
    """
    settings = config.video_frames
    if settings is None or takes_clips(config.vision_tower_spec) or takes_clips(spec):
        return None
    before = has_rows_and_columns(config.vision_tower_spec, config.projector_config)
    if before and has_rows_and_columns(spec, projector_config):
        return settings
    return {key: value for key, value in settings.items() if key != "frame_pool"}


@torch.no_grad()
def _fill_projector(
    swapped: AnyVlmForConditionalGeneration,
    model: AnyVlmForConditionalGeneration,
    features: torch.Tensor,
    is_new: bool,
) -> None:
    """Copy what fits of the old projector's core; a new map of features gives what follows inputs of the size it knows.

    Args:
        features: Of synthetic pictures by the new tower, `(4, num_features, hidden_size)`, fp32.
        is_new: The projector is another one, of which nothing is kept.
    """
    newline = getattr(swapped, "image_newline", None)
    if newline is not None and newline is not getattr(model, "image_newline", None):
        newline.normal_(std=float(embedding_rms(swapped.language_model)))
    if is_new:
        match_embedding_scale(swapped, features, projector_only=True)
        return
    old_core, new_core = core_projector(model.multi_modal_projector), core_projector(swapped.multi_modal_projector)
    tensors = new_core.state_dict()
    for name, tensor in old_core.state_dict().items():
        if tensors[name].shape == tensor.shape:
            tensors[name].copy_(tensor)
    if core_config(model.config.projector_config)["in_features"] == swapped.config.vision_tower_spec["hidden_size"]:
        return
    alignment = getattr(swapped.multi_modal_projector, "alignment", None)
    new_layer = foldable_layer(new_core) if alignment is None or alignment.linear is None else alignment.linear
    old_spec = model.config.vision_tower_spec
    old_features = probe_features(model.vision_tower, old_spec, model.config.vision_feature_layer, is_trained=False)
    known, _ = core_features(model, old_features.to(model.device, model.dtype), tuple(old_spec["grid"]))
    old_layer = foldable_layer(old_core)
    if old_layer is not None:
        known = known.to(old_layer.weight.dtype) @ old_layer.weight.T
        new_layer.bias.copy_(old_layer.bias)
    found = features.to(new_layer.weight.device) @ new_layer.weight.float().T
    new_layer.weight.mul_(_rms(known) / _rms(found).clamp(min=1e-12))


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.float().square().mean().sqrt()
