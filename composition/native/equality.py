"""A native model and ours, side by side on one picture with a text."""

import copy

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ...configuration.image_views import has_several_views
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .family import NativeFamily


#: Largest difference of logits between a native model and ours; in 16-bit dtypes, so many steps of rounding.
TOLERANCE, _STEPS = 1e-4, 8


def sample_picture(height: int = 96, width: int = 64, seed: int = 0) -> Image.Image:
    """Noise, so that every patch has something of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(
    processor: ProcessorMixin, num_images: int, words: str = "What is in the picture?", placeholders: bool = True
) -> str:
    """A user's message with pictures, as the processor's chat template writes it; without one, words behind placeholders,
    if the text has any."""
    if processor.chat_template is None:
        return (str(processor.image_token) * num_images + "\n" if placeholders else "") + words
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": words}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: BatchFeature) -> torch.Tensor:
    """In fp32. Pictures go in the model's dtype, as the model's own code would cast them."""
    inputs = inputs.to(model.device)
    inputs = {
        key: value.to(model.dtype) if key == "pixel_values" and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model(**inputs).logits.float()


def _without_torchvision(
    native_processor: ProcessorMixin, processor: AnyVlmProcessor
) -> tuple[ProcessorMixin, Image.Image]:
    """A native processor and a picture of which it makes the same views as ours.

    Ours cuts pictures with Pillow. Image processors that cut with torchvision round pixels otherwise, so their twin in
    Pillow is asked; where they have none, for a picture as large as a tile, which need not be resized.
    """
    image_processor = native_processor.image_processor
    name = type(image_processor).__name__
    if name.endswith("Pil") or not has_several_views(processor.image_views):
        return native_processor, sample_picture()
    twin = getattr(transformers, name + "Pil", None)
    if twin is None:
        return native_processor, sample_picture(*processor.vision_tower_spec["image_size"])
    native_processor = copy.copy(native_processor)
    native_processor.image_processor = twin.from_dict(image_processor.to_dict())
    return native_processor, sample_picture()


def compare_on_a_sample(
    family: NativeFamily,
    native: PreTrainedModel,
    native_processor: ProcessorMixin,
    ours: PreTrainedModel,
    processor: AnyVlmProcessor,
) -> float:
    """The largest difference of their logits, each with the inputs that its own processor makes.

    Raises:
        CompositionError: the processors make other ids, or the models' logits differ by more than `TOLERANCE`.
    """
    native_processor, picture = _without_torchvision(native_processor, processor)
    names = f"{type(native).__name__} and {type(ours).__name__}"
    # Words that both complete are left to them; else a native processor without a template is given what ours writes.
    ours_writes = native_processor.chat_template is None and processor.prompt_form is None
    writer = processor if ours_writes else native_processor
    text = prompt(writer, 1, placeholders=not processor.pictures_first)
    native_inputs = family.call_processor(native_processor, [text], [picture], return_tensors="pt")
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    if not torch.equal(native_inputs["input_ids"], inputs["input_ids"]):
        raise CompositionError(
            f"The processors of {names} make {native_inputs['input_ids'].shape[1]} and {inputs['input_ids'].shape[1]} "
            f"ids of one picture with a text, or others. The text was {text!r}."
        )
    modes = native.training
    expected, found = logits_of(native.eval(), native_inputs), logits_of(ours.eval(), inputs)
    native.train(modes)
    if expected.shape != found.shape:
        raise CompositionError(f"{names} give logits of shapes {tuple(expected.shape)} and {tuple(found.shape)}.")
    difference = float((expected - found).abs().max())
    rounding = _STEPS * torch.finfo(native.dtype).eps * float(expected.abs().max())
    allowed = TOLERANCE if native.dtype == torch.float32 else max(TOLERANCE, rounding)
    if not difference <= allowed:
        raise CompositionError(
            f"{names} give logits for one picture with a text that differ by {difference:.3g}, where {allowed:.1g} is "
            "allowed: they do not compute the same."
        )
    return difference
