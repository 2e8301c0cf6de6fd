"""From pictures to features and tokens, by a model and its processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..configuration.image_tokens import Grid
from ..configuration.instructions import INSTRUCTION_KEYS
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.picture_inputs import PROCESSOR_KEYS
from ..processing.processing_anyvlm import AnyVlmProcessor


@dataclass
class PicturePath:
    """How a model sees pictures: its tower, its projector and the processor's pictures.

    Args:
        model: A composed model; its language model is not used.
        processor: Its processor.
    """

    model: AnyVlmForConditionalGeneration
    processor: AnyVlmProcessor

    def inputs(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What `get_image_features` takes for pictures, on the model's device."""
        inputs = self.inputs_of(self.processor, [[picture] for picture in pictures])
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    @staticmethod
    def inputs_of(processor: AnyVlmProcessor, groups: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """The same on the CPU, without a model; pictures of a group are looked at as those of one text."""
        texts = [processor.image_token * len(group) for group in groups]
        # Pictures may have different numbers of tokens.
        batch = processor(text=texts, images=[list(group) for group in groups], padding=True, return_tensors="pt")
        return {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def features(self, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[Grid]]:
        """Features `(places, hidden_size)` of every view of the pictures, before the projector, and their grids."""
        # An instruction is read by the projector, not by the tower.
        outputs = {k: v for k, v in inputs.items() if k in PROCESSOR_KEYS and k not in INSTRUCTION_KEYS}
        tower = self.model.vision_tower
        was_training = tower.training
        tower.eval()
        try:
            return self.model.get_tower_features(inputs["pixel_values"], **outputs)
        finally:
            tower.train(was_training)

    def by_picture(
        self, inputs: dict[str, Any], number: int
    ) -> list[tuple[list[torch.Tensor], list[Grid], torch.Tensor | None]]:
        """Of each of so many pictures: features of its views, as `features` gives them, their grids, and its row of
        `original_sizes`, if there is one."""
        features, grids = self.features(inputs)
        sizes = inputs.get("original_sizes")
        plans = self.model._plans(sizes, None, len(features))
        counts = [len(plan.views) for plan in plans] if plans else [1] * number
        spans = [span.tolist() for span in torch.arange(len(features)).split(counts)]
        return [
            (
                [features[view] for view in span],
                [grids[view] for view in span],
                None if sizes is None else sizes[index],
            )
            for index, span in enumerate(spans)
        ]

    def project(
        self, features: Sequence[torch.Tensor], grid: Grid, projector: nn.Module | None = None, **instructions: Any
    ) -> tuple[torch.Tensor, Grid]:
        """Tokens `(views, tokens, width)` of views of one grid, and their grid."""
        projector = projector or self.model.multi_modal_projector
        layer = projector.output_layer
        batch = torch.stack(list(features))
        return projector(batch if layer is None else batch.to(layer.weight.dtype), grid, **instructions)

    @torch.no_grad()
    def tokens(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Tokens `(num_tokens, width)` of each picture, as the language model gets them."""
        was_training = self.model.multi_modal_projector.training
        self.model.multi_modal_projector.eval()
        try:
            return list(self.model.get_image_features(**inputs).pooler_output)
        finally:
            self.model.multi_modal_projector.train(was_training)
