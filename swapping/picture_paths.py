"""From pictures to features and tokens, by a model and its processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..configuration.image_tokens import Grid, image_grids
from ..configuration.instructions import INSTRUCTION_KEYS
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.picture_inputs import PROCESSOR_KEYS
from ..modeling.vision_towers import call_vision_tower, read_features
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
        texts = [self.processor.image_token] * len(pictures)
        images = [[picture] for picture in pictures]
        # Pictures may have different numbers of tokens.
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        of_text = ("input_ids", "attention_mask")
        return {name: value.to(self.model.device) for name, value in batch.items() if name not in of_text}

    @torch.no_grad()
    def features(self, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[Grid]]:
        """Features `(places, hidden_size)` of every view of the pictures, before the projector, and their grids."""
        config, tower = self.model.config, self.model.vision_tower
        # An instruction is read by the projector, not by the tower.
        outputs = {k: v for k, v in inputs.items() if k in PROCESSOR_KEYS and k not in INSTRUCTION_KEYS}
        pixel_values = inputs["pixel_values"]
        grids = image_grids(config.vision_tower_spec, pixel_values, outputs)
        was_training = tower.training
        tower.eval()
        try:
            raw = call_vision_tower(
                tower,
                config.vision_tower_spec,
                pixel_values.to(tower.dtype),
                config.vision_feature_layer,
                outputs,
            )
        finally:
            tower.train(was_training)
        return read_features(raw, config.vision_tower_spec, grids), grids

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
