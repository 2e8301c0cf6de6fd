"""Pictures that a tower saw once, projected as often as a projector is to be trained on them."""

from collections.abc import Sequence

import torch
from PIL import Image

from ..configuration.image_tokens import Grid
from ..modeling.image_features import AnyVlmImageFeatures
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from .picture_paths import PicturePath


class CachedPictures:
    """Features of pictures, kept in memory; the vision tower, by far the most of the work, runs once for each picture.

    Args:
        path: The model whose tower sees the pictures, and its processor.

    Attributes:
        sizes: Height and width of each picture in pixels.

    Raises:
        ValueError: the projector reads the text beside the picture, so that there are no tokens of a picture alone.
    """

    def __init__(self, path: PicturePath):
        if path.processor.qformer_tokenizer is not None:
            raise ValueError(
                "This projector reads the instruction beside each picture, so a picture has no tokens of its own to learn "
                "from. Swap the language model without pictures, and train the projector on conversations."
            )
        self.path = path
        self.sizes: list[tuple[int, int]] = []
        self._features: list[list[torch.Tensor]] = []
        self._grids: list[list[Grid]] = []
        self._original_sizes: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._features)

    def add(self, pictures: Sequence[Image.Image]) -> list[int]:
        """Run the tower on pictures; returns their indices."""
        inputs = self.path.inputs(pictures)
        features, grids = self.path.features(inputs)
        sizes = inputs.get("original_sizes")
        plans = self.path.model._plans(sizes, None, len(features))
        counts = [len(plan.views) for plan in plans] if plans else [1] * len(pictures)
        first, start = len(self), 0
        for index, (picture, count) in enumerate(zip(pictures, counts, strict=True)):
            # Copies: a slice would keep the whole batch's hidden states.
            self._features.append([view.clone() for view in features[start : start + count]])
            self._grids.append(list(grids[start : start + count]))
            self.sizes.append((picture.height, picture.width))
            if sizes is not None:
                self._original_sizes.append(sizes[index])
            start += count
        return list(range(first, len(self)))

    def features(self, indices: Sequence[int]) -> tuple[list[torch.Tensor], list[Grid]]:
        """Features `(places, hidden_size)` of every view of these pictures, and their grids."""
        return (
            [view for index in indices for view in self._features[index]],
            [grid for index in indices for grid in self._grids[index]],
        )

    def encoded(self, indices: Sequence[int], model: AnyVlmForConditionalGeneration) -> AnyVlmImageFeatures:
        """What `model.get_image_features` would return for these pictures, with a graph through the projector.

        Args:
            model: A model with this tower and any projector.
        """
        features, grids = self.features(indices)
        sizes = torch.stack([self._original_sizes[index] for index in indices]) if self._original_sizes else None
        tokens, token_grids = model._project(features, grids, {})
        tokens, token_grids = model._join_views(tokens, token_grids, model._plans(sizes, None, len(features)), sizes)
        return AnyVlmImageFeatures(pooler_output=tokens, token_grids=token_grids)
