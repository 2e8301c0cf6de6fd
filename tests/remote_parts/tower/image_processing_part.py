"""The made-up tower's image processor, with code of its own."""

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images, to_numpy_array


class PartImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]

    def __init__(self, edge=32, **kwargs):
        super().__init__(**kwargs)
        self.edge = edge

    def preprocess(self, images, return_tensors=None, **kwargs):
        pictures = []
        for image in make_flat_list_of_images(images):
            array = to_numpy_array(image).astype(np.float32)
            if array.shape[0] == 3 and array.ndim == 3 and array.shape[-1] != 3:
                array = array.transpose(1, 2, 0)
            rows = np.linspace(0, array.shape[0] - 1, self.edge).round().astype(int)
            columns = np.linspace(0, array.shape[1] - 1, self.edge).round().astype(int)
            pictures.append((array[rows][:, columns] / 127.5 - 1).transpose(2, 0, 1))
        return BatchFeature({"pixel_values": np.stack(pictures)}, tensor_type=return_tensors)
