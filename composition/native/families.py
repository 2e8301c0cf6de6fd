"""Every native family, in the order in which `to_native` tries them."""

from functools import cache
from importlib import import_module

from transformers import PreTrainedConfig

from ..errors import CompositionError
from .family import NativeFamily


#: Modules of this package; each has its families in a tuple `FAMILIES`. A simpler class comes before a richer one.
_MODULES = (
    "llava",
    "llava_next",
    "got_ocr2",
    "perception_lm",
    "internvl",
    "cohere_vision",
    "idefics3",
    "blip_2",
    "idefics2",
    "minicpmv",
    "mistral3",
    "pixtral",
    "gemma3",
    "paligemma",
    "qwen2_vl",
    "lighton_ocr",
    "idefics",
)


@cache
def native_families() -> tuple[NativeFamily, ...]:
    return tuple(family for name in _MODULES for family in import_module(f".{name}", __package__).FAMILIES)


def family_of(native_config: PreTrainedConfig) -> NativeFamily:
    """The family of a native config.

    Raises:
        CompositionError: there is none; the message lists those there are.
    """
    for family in native_families():
        if family.model_type == native_config.model_type and family.is_family_of(native_config):
            return family
    raise CompositionError(
        f"{native_config.model_type!r} is no family of vision-language models that can be converted. Those that can be: "
        f"{', '.join(sorted({family.model_type for family in native_families()}))}. Of another, the parts can still be "
        "composed: anyvlm.compose(vision=…, text=…)."
    )
