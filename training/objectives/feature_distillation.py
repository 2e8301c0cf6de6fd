"""A tuned tower stays near another one, often itself as it was: its features of each place are compared with the other's."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from ...composition.parts import PartSource, load_vision_tower
from ...composition.vision_part import examine_tower
from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...configuration.image_tokens import Grid, image_grids
from ...configuration.image_views import has_several_views
from ...modeling.feature_alignment import resample_features
from ...modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ...modeling.vision_towers import call_vision_tower, read_features
from .base import Objective, ObjectiveBatch
from .fingerprint import weights_fingerprint
from .picture_features import (
    composed_model,
    media_of,
    tower_inputs,
    trained_features,
    view_features,
    views_of_pictures,
)


def _normalised(features: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 in each place, as Wei et al. 2022 do with a teacher's ("Contrastive Learning Rivals Masked Image
    Modeling in Fine-tuning via Feature Distillation"): towers differ much in the size of theirs, and some have
    very small ones, which the usual epsilon would change."""
    return nn.functional.layer_norm(features, features.shape[-1:], eps=1e-12)


#: Loss -> of features and the teacher's `(places, width)`, mean over places and channels.
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": lambda features, teacher: 1 - nn.functional.cosine_similarity(features, teacher, dim=-1).mean(),
    "mse": lambda features, teacher: nn.functional.mse_loss(_normalised(features), _normalised(teacher)),
    "smooth_l1": lambda features, teacher: nn.functional.smooth_l1_loss(
        _normalised(features), _normalised(teacher), beta=2.0
    ),
}


@dataclass
class TeacherTower:
    """A frozen tower. It is no module, so that no checkpoint holds it.

    Args:
        vision_tower, spec, layer: The tower, its `vision_tower_spec`, and `vision_feature_layer`.
        image_processor: Where it sees other pixels than the trained tower.
    """

    vision_tower: nn.Module
    spec: dict[str, Any]
    layer: int | list[int] | None
    image_processor: BaseImageProcessor | None = None

    def __post_init__(self):
        self.vision_tower.eval().requires_grad_(False)

    @property
    def fingerprint(self) -> torch.Tensor:
        """`(32,)`, uint8: sha256 of its weights."""
        return weights_fingerprint(self.vision_tower)

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Any], device: torch.device) -> tuple[list[torch.Tensor], list[Grid]]:
        """Features `(places, hidden_size)` of every view, and their grids.

        Args:
            inputs: `pixel_values` and what goes with them.
        """
        tower = self.vision_tower.to(device)
        pixel_values, beside = inputs["pixel_values"], tower_inputs(inputs)
        grids = image_grids(self.spec, pixel_values, beside)
        raw = call_vision_tower(tower, self.spec, pixel_values.to(device, tower.dtype), self.layer, beside)
        return read_features(raw, self.spec, grids), grids


class FeatureDistillationObjective(Objective):
    """Keeps the features of a tower that is tuned near those of a teacher: the tower as it was, or another one, behind a
    linear map that is learnt along where their widths differ, on the trained tower's grid.

    The teacher is in no checkpoint. A run that goes on after a break makes it as it was made at first, from the model that
    the run began with, or from `teacher`; a fingerprint of its weights in the checkpoint is compared, so that a teacher that
    is another one by then is an error.

    Args:
        model: What is trained. Without `teacher`, its tower is copied as it is now.
        teacher: A composed model or the path of one, whose tower sees the same pixels, such as the checkpoint that the
            training began with; or another tower, as `anyvlm.compose` takes one: a Hub id, a path, or an instance.
        image_processor: Of such a tower. Default: its own.
        image_size: Pixels of its pictures. Default: as the image processor makes them.
        layer: Which of its hidden states; as `vision_feature_layer`.
        distance: `"cosine"`, or `"mse"` or `"smooth_l1"` of normalised features.
        linear_map: A map from the trained tower's features to the teacher's. Default: only where the widths differ.
        trust_remote_code: Allow a teacher whose code is in its own checkpoint.
        learning_rate: Of the map. Default: the trainer's.

    Raises:
        ValueError: an unknown distance; a teacher without weights; a composed teacher that sees other pixels; another tower
            as the teacher of a model that cuts pictures.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: PartSource | None = None,
        *,
        image_processor: BaseImageProcessor | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        layer: int | Sequence[int] | None = None,
        distance: str = "cosine",
        linear_map: bool | None = None,
        trust_remote_code: bool = False,
        learning_rate: float | None = None,
    ):
        super().__init__(learning_rate)
        if distance not in DISTANCES:
            raise ValueError(f"Unknown distance {distance!r}. Choose one of: {', '.join(DISTANCES)}.")
        self.distance = distance
        model = composed_model(model)
        composed = model if teacher is None else _composed(teacher)
        if composed is not None:
            self.teacher = _tower_of(composed, model.config.vision_tower_spec)
        else:
            if has_several_views(model.config.image_views):
                raise ValueError(
                    "This model's tower sees pictures cut into views, and another tower as its teacher would see them "
                    "whole. Leave out teacher=…, or pass a composed model with the same views."
                )
            self.teacher = _other_tower(teacher, image_processor, image_size, layer, trust_remote_code)
        own, others = model.config.vision_tower_spec["hidden_size"], self.teacher.spec["hidden_size"]
        if linear_map is False and own != others:
            raise ValueError(
                f"The teacher's features are {others} wide and the model's {own}. They cannot be compared without a "
                "linear map: leave out linear_map=False."
            )
        self.linear_map = nn.Linear(own, others) if linear_map or own != others else None

    def get_extra_state(self) -> torch.Tensor:
        return self.teacher.fingerprint

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not torch.equal(state.cpu(), self.teacher.fingerprint):
            raise ValueError(
                "The teacher's weights are not those that this training began with. Make FeatureDistillationObjective "
                "with the model as it was then, not as a checkpoint of the training has it, or name the same teacher=…."
            )

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """What the teacher's own image processor makes of the pictures, where it has one.

        Raises:
            ValueError: a sample has a video, and the teacher is another tower.
        """
        if self.teacher.image_processor is None:
            return {}
        pictures = []
        for index, sample in enumerate(samples):
            media = media_of(sample)
            if media.get("video"):
                raise ValueError(
                    f"Sample {index} of the batch has a video, which another tower as a teacher cannot see."
                )
            pictures += [load_image(picture) for picture in media.get("image", ())]
        return dict(self.teacher.image_processor(pictures, return_tensors="pt")) if pictures else {}

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        """The distance of features, mean over places, then over the views of a picture, then over pictures.

        Raises:
            ValueError: the tower is frozen.
        """
        features = trained_features(batch, "it stays where it is without this loss")
        if features is None:
            return None
        config = composed_model(batch.model).config
        views, grids = view_features(config, batch.inputs, features)
        seen = batch.inputs if self.teacher.image_processor is None else batch.extra
        old_views, old_grids = self.teacher.features(seen, features.device)
        distances = []
        for own, grid, old, old_grid in zip(views, grids, old_views, old_grids, strict=True):
            own, old = own.float(), old.float()
            if tuple(old_grid) != tuple(grid):
                old = resample_features(old[None], old_grid, grid)[0]
            own = own if self.linear_map is None else self.linear_map(own)
            distances.append(DISTANCES[self.distance](own, old))
        of_pictures = torch.stack(distances).split(views_of_pictures(config, batch.inputs, len(views)))
        return torch.stack([of_picture.mean() for of_picture in of_pictures]).mean()


def _composed(teacher: Any) -> PreTrainedModel | None:
    """A composed model, of an instance or of where it is saved; `None` for anything else."""
    if isinstance(teacher, (str, os.PathLike)):
        saved, _ = PreTrainedConfig.get_config_dict(teacher)
        if saved.get("model_type") == AnyVlmConfig.model_type:
            return AnyVlmForConditionalGeneration.from_pretrained(teacher)
        return None
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"A teacher needs weights, and a {type(teacher).__name__} has none. Pass a model or its path."
        )
    return teacher if teacher.config.model_type == AnyVlmConfig.model_type else None


def _tower_of(model: PreTrainedModel, trained_spec: dict[str, Any]) -> TeacherTower:
    """A copy of the tower of a composed model.

    Raises:
        ValueError: it takes other pixels than the trained one.
    """
    config = model.config
    for key in ("inputs", "image_size", "patch"):
        if config.vision_tower_spec[key] != trained_spec[key]:
            raise ValueError(
                f"The teacher's tower takes other pixels than the model's: {key} is {config.vision_tower_spec[key]!r} "
                f"and {trained_spec[key]!r}. Pass the tower alone, teacher=….vision_tower, with its image_processor=…."
            )
    return TeacherTower(
        copy.deepcopy(model.vision_tower), copy.deepcopy(config.vision_tower_spec), config.vision_feature_layer
    )


def _other_tower(
    source: PartSource, image_processor: Any, image_size: Any, layer: Any, trust_remote_code: bool
) -> TeacherTower:
    """Another tower, measured as `anyvlm.compose` does it."""
    tower = load_vision_tower(source, None, trust_remote_code)
    image_processor, _, spec = examine_tower(
        source, tower, image_processor, image_size, layer, "default", trust_remote_code, plain=True
    )
    return TeacherTower(tower, spec, layer, image_processor)
