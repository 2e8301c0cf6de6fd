"""One image processor for several vision towers, each of which gets the pictures that its own makes."""

import copy
import json
import os
import tempfile
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..configuration.checkpoint_code import FUSED_IMAGE_PROCESSOR_AUTO_MAP, write_checkpoint_code


class FusedImageProcessor(BaseImageProcessor):
    """Pictures for several towers, stacked along the channels (as OpenVLA's, Kim et al. 2024).

    Towers may take pictures of different sizes: smaller ones stand in the upper left corner, with zeros around them,
    and the model cuts each tower's own out again.

    Args:
        image_processors: That of each tower, or what it writes of itself (`to_dict`).
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_processors: list[BaseImageProcessor | dict[str, Any]] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.image_processors = [
            _from_dict(processor) if isinstance(processor, dict) else processor for processor in image_processors or []
        ]

    def preprocess(self, images, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """As any image processor's. `pixel_values` is `(num_images, channels of all towers, height, width)`.

        Args:
            kwargs: For the image processor of every tower.
        """
        pictures = [
            processor(images, return_tensors="pt", **kwargs)["pixel_values"] for processor in self.image_processors
        ]
        height, width = (max(own.shape[axis] for own in pictures) for axis in (-2, -1))
        padded = [F.pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])) for own in pictures]
        return BatchFeature({"pixel_values": torch.cat(padded, dim=1)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        output = copy.deepcopy(self.__dict__)
        output["image_processors"] = [json.loads(processor.to_json_string()) for processor in self.image_processors]
        # Without it, AutoImageProcessor would look for this class in transformers.
        output["auto_map"] = dict(FUSED_IMAGE_PROCESSOR_AUTO_MAP)
        output["image_processor_type"] = type(self).__name__
        return output

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the settings and, beside them, the code."""
        write_checkpoint_code(os.path.dirname(os.path.abspath(json_file_path)))
        super().to_json_file(json_file_path)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoImageProcessor") -> None:
        """Nothing to do: AutoImageProcessor calls this at every remote load, and `to_dict` has the `auto_map`."""


def _from_dict(values: dict[str, Any]) -> BaseImageProcessor:
    """An image processor from what it wrote of itself. AutoImageProcessor, which knows what class of a family works
    with the libraries that are there, reads it from a file."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, IMAGE_PROCESSOR_NAME), "w", encoding="utf-8") as file:
            json.dump(values, file)
        return AutoImageProcessor.from_pretrained(folder)


__all__ = ["FusedImageProcessor"]
