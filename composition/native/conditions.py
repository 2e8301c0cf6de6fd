"""Conditions of native classes that several of them have, for `require`: each with words that say what the class is like."""

from typing import Any

from transformers import PreTrainedConfig

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .family import Misfit


def embedded_as_text(config: AnyVlmConfig) -> list[tuple[bool, str]]:
    """Conditions of every class that puts pictures into the text, as text."""
    return [
        (config.fusion == "embed", f"fusion is {config.fusion!r}, not 'embed'"),
        (config.image_attention == "causal", f"image_attention is {config.image_attention!r}, not 'causal'"),
    ]


def plain_embedding(config: AnyVlmConfig) -> list[tuple[bool, str]]:
    """Conditions of every class that puts one picture of one size into the text, as text."""
    image_views = config.image_views
    return [
        *embedded_as_text(config),
        (
            image_views is None or image_views["type"] == "resize",
            f"a picture becomes several views ({image_views and image_views['type']!r})",
        ),
    ]


def called_plainly(spec: dict[str, Any]) -> tuple[bool, str]:
    """A native class hands its tower pictures and nothing else."""
    return set(spec["call_kwargs"]) <= {"return_dict"}, f"it calls its tower without {spec['call_kwargs']}"


def whole_pictures(spec: dict[str, Any]) -> list[tuple[bool, str]]:
    """Conditions of classes whose tower takes plain pictures of one size."""
    return [
        (not spec["any_size"] and spec["inputs"] == "pictures", "its tower takes whole pictures of one size"),
        called_plainly(spec),
    ]


def square_tower(config: AnyVlmConfig, beside: tuple[tuple[int, int], ...]) -> list[tuple[bool, str]]:
    """Conditions of classes that read a square of patches behind one of `beside`, numbers of tokens before and after."""
    spec = config.vision_tower_spec
    found = spec["num_prefix_tokens"], spec["num_suffix_tokens"]
    return [
        (spec["layout"] == "sequence", f"its tower gives a sequence of tokens, not {spec['layout']!r}"),
        (spec["inputs"] in ("pictures", "padded_pictures"), "its tower takes whole pictures"),
        (spec["grid"][0] == spec["grid"][1], f"its grids are square, not {spec['grid']}"),
        (found in beside, f"tokens beside the patches are one of {beside}, not {found}"),
        called_plainly(spec),
    ]


def sized_tower(spec: dict) -> list[tuple[bool, str]]:
    """Conditions of classes with a tower such as Pixtral's."""
    return [
        (spec["inputs"] == "sized_pictures", "its tower takes pictures of their own size with image_sizes (pixtral)"),
        (spec["merge_size"] == 1, "its tower gives a feature for each patch"),
        called_plainly(spec),
    ]


def check_tokens_dropped(native: PreTrainedConfig, spec: dict[str, Any]) -> dict[str, Any]:
    """The classes drop the first token or none as the config says, whatever the tower's tokens are.

    Raises:
        CompositionError: what is left would be no square of patches.
    """
    strategy = native.vision_feature_select_strategy
    return require_dropped(spec, strategy == "default", f"vision_feature_select_strategy={strategy!r}")


def require_dropped(spec: dict[str, Any], first: bool, setting: str) -> dict[str, Any]:
    """The spec, if what the class drops is what the tower has beside its patches.

    Args:
        first: Whether it drops the first token.
        setting: By which it does, in words.

    Raises:
        CompositionError: it is not.
    """
    wanted = (int(first), 0)
    found = spec["num_prefix_tokens"], spec["num_suffix_tokens"]
    if found != wanted:
        raise CompositionError(
            f"{setting} drops {wanted[0]} tokens, but this tower has {found[0]} before its patches and {found[1]} after "
            "them. Only where these are as many is what is left a square of patches; change the setting in the config "
            "if the model was trained so."
        )
    return spec


def require_text(processor: AnyVlmProcessor, text: dict[str, Any], also: bool = True) -> None:
    """Raise `Misfit` if ours writes something else than `text`, or if what must hold `also` does not."""
    if not also or (processor.image_text or {}) != text:
        raise Misfit(f"its processor writes {text} around the tokens of a picture, not {processor.image_text}")
