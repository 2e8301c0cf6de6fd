"""What image processors make of a flat list of pictures, as a flat batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


#: Axes of what some image processors (Idefics2's) hand on in a list for each text, of which a flat list is one.
_NESTED_AXES = {"pixel_values": 5, "pixel_attention_mask": 4}


def image_outputs(image_processor: Any, pictures: Sequence[Image.Image], **kwargs) -> Mapping[str, Any]:
    """The image processor's outputs with one entry for each picture."""
    outputs = image_processor(pictures, **kwargs)
    mask = outputs.get("pixel_attention_mask")
    if mask is None or mask.ndim != _NESTED_AXES["pixel_attention_mask"]:
        return outputs
    for key in _NESTED_AXES:
        outputs[key] = outputs[key].reshape(-1, *outputs[key].shape[2:])
    return outputs
