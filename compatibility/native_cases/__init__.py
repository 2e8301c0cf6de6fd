"""Tiny models of every native family, for the tests and for the table in `docs/architectures.md`.

Each module here has a tuple `CASES`. A family may have several cases, for what its checkpoints differ in.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import BatchFeature, CLIPImageProcessorPil, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..tiny_tokenizer import tiny_tokenizer


def _flat_pixel_values(inputs: BatchFeature) -> torch.Tensor:
    return inputs["pixel_values"]


def _as_they_are(inputs: BatchFeature) -> BatchFeature:
    return inputs


@dataclass(frozen=True)
class NativeCase:
    """Tiny models of a family.

    Args:
        name: Family and what is special, such as `"llava, siglip tower"`.
        config: `tied -> native config`, with `model_type` of the family.
        processor: `native config -> native processor`.
        sizes: `(height, width)` of the pictures of the checks with several sizes.
        max_images: Most pictures in one sample; 1 for families that take no more.
        ties: Values of `tied` that the family has.
        pixel_values: What the native processor makes -> views as our model takes them, flat and without padding; where
            the native processor hands them on in another form.
        oracle_inputs: What the native processor makes -> what the native model's `forward` is called with; where it would
            not compute what its own `generate` does.
        note: What the table says beside the numbers.
    """

    name: str
    config: Callable[[bool], PreTrainedConfig]
    processor: Callable[[PreTrainedConfig], ProcessorMixin]
    sizes: tuple[tuple[int, int], ...] = ((48, 96), (80, 40), (33, 31))
    max_images: int = 3
    ties: tuple[bool, ...] = (False, True)
    pixel_values: Callable[[BatchFeature], torch.Tensor] = _flat_pixel_values
    oracle_inputs: Callable[[BatchFeature], BatchFeature] = _as_they_are
    note: str = ""

    def __str__(self) -> str:
        return self.name


def native_cases(module: str | None = None) -> list[NativeCase]:
    """All cases, or those of one module of this package, in the order of their names."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return [
        case
        for name in names
        if module in (None, name)
        for case in importlib.import_module(f".{name}", __name__).CASES
    ]


#: Words that chats of the checks and templates of families are made of; the tiny tokenizer knows them as `w0` … `w79`.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}User : {% else %}Assistant : {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image-token> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant :{% endif %}"
)


def case_tokenizer(*special_tokens: str) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with the special tokens that a family's processor needs, which follow its 90 words."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


def chat_template(image_token: str = "<image>") -> str:
    return CHAT_TEMPLATE.replace("<image-token>", image_token)


def square_pictures(edge: int) -> CLIPImageProcessorPil:
    """CLIP's image processor for small pictures: shortest edge to `edge`, middle cropped."""
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
