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
        first = len(self)
        seen = self.path.by_picture(self.path.inputs(pictures), len(pictures))
        for picture, (views, grids, original_size) in zip(pictures, seen, strict=True):
            # Copies: a slice would keep the whole batch's hidden states.
            self._features.append([view.clone() for view in views])
            self._grids.append(grids)
            self.sizes.append((picture.height, picture.width))
            if original_size is not None:
                self._original_sizes.append(original_size)
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
        return model.get_image_features(
            tower_features=torch.cat(features), tower_grids=torch.tensor(grids), original_sizes=sizes
        )
