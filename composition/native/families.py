"""Every native family, in the order in which `to_native` tries them."""

from functools import cache
from importlib import import_module

from ..errors import CompositionError
from .family import NativeFamily


#: Modules of this package; each has its families in a tuple `FAMILIES`. A simpler class comes before a richer one.
_MODULES = (
    "llava",
    "internvl",
    "cohere_vision",
    "idefics3",
    "blip_2",
    "mistral3",
)


@cache
def native_families() -> tuple[NativeFamily, ...]:
    return tuple(family for name in _MODULES for family in import_module(f".{name}", __package__).FAMILIES)


def family_of(model_type: str) -> NativeFamily:
    """The family of a native config's `model_type`.

    Raises:
        CompositionError: there is none; the message lists those there are.
    """
    for family in native_families():
        if family.model_type == model_type:
            return family
    raise CompositionError(
        f"{model_type!r} is no family of vision-language models that can be converted. Those that can be: "
        f"{', '.join(sorted(family.model_type for family in native_families()))}. Of another, the parts can still be "
        "composed: anyvlm.compose(vision=…, text=…)."
    )
