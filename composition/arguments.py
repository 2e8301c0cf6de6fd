"""What `compose` and `check` are told, checked before anything is loaded."""

from ..configuration.configuration_anyvlm import FUSIONS, IMAGE_ATTENTIONS
from .errors import CompositionError


def typed(setting: str | dict) -> dict:
    """A name, or a dict with `type` and arguments, as a dict of its own."""
    return {"type": setting} if isinstance(setting, str) else dict(setting)


def fusion_and_arguments(fusion: str | dict, image_attention: str) -> tuple[str, dict]:
    """The fusion's name, and its arguments.

    Raises:
        CompositionError: an unknown name, or settings that exclude one another.
    """
    arguments = typed(fusion)
    name = arguments.pop("type", None)
    if name not in FUSIONS:
        raise CompositionError(f"Unknown fusion {name!r}. Choose one of: {', '.join(FUSIONS)}.")
    if image_attention not in IMAGE_ATTENTIONS:
        raise CompositionError(
            f"Unknown image_attention {image_attention!r}. Choose one of: {', '.join(IMAGE_ATTENTIONS)}."
        )
    if image_attention != "causal" and name != "embed":
        raise CompositionError(
            f"With fusion={name!r} there are no image tokens in the text, so image_attention={image_attention!r} has "
            'nothing to act on. Use image_attention="causal".'
        )
    if name == "embed" and arguments:
        raise CompositionError(f"fusion 'embed' takes no arguments, but got {arguments}.")
    return name, arguments
