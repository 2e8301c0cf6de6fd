"""Config of a made-up vision tower; its files are called as those of the language models are."""

import os

from transformers import PretrainedConfig


if "REMOTE_PART_MARK" in os.environ:  # tests look here for code that ran
    with open(os.environ["REMOTE_PART_MARK"], "a") as mark:
        mark.write(__name__ + "\n")


class PartConfig(PretrainedConfig):
    model_type = "made_up_tower"

    def __init__(self, width=24, depth=2, heads=3, image_size=32, patch=8, **kwargs):
        self.width = width
        self.depth = depth
        self.heads = heads
        self.image_size = image_size
        self.patch = patch
        super().__init__(**kwargs)
