"""A model's own tower for pictures, or patches, of another size, or for pictures of their own size."""

from torch import nn

from ..composition.errors import CompositionError
from ..composition.views import views_settings
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from .native_tower import native_tower
from .resized_tower import fitted_tower, resized_tower


_NAFLEX_NOTE = (
    "embeddings.patch_embedding.weight: SigLIP's kernel as NaFlex has it, for patches in one row; equal features"
)


def same_tower(
    model: AnyVlmForConditionalGeneration,
    image_size: int | tuple[int, int] | None,
    patch_size: int | None,
    views: str | dict | None,
) -> tuple[nn.Module, list[str]]:
    """The tower of a model, or a resized copy where it cannot take pictures of this size by itself.

    Returns:
        The tower, and what was done to tensors that are not the old ones bit for bit.

    Raises:
        CompositionError: it cannot be resized.
    """
    tower = model.vision_tower
    if isinstance(tower, FusedVisionTowers):
        raise CompositionError(
            "This model has several towers, and which of them should change is not known. Pass all of them: vision=(…, …)."
        )
    is_native = (views_settings(views) or {}).get("type") == "native"
    if is_native and (image_size is not None or patch_size is not None):
        raise CompositionError(
            'views="native" shows pictures in their own size. Leave out image_size=… and patch_size=…, or views=….'
        )
    if is_native:
        native = native_tower(tower)
        return native, [] if native is tower else [_NAFLEX_NOTE]
    if patch_size is not None:
        return resized_tower(tower, image_size, patch_size)
    return (tower, []) if image_size is None else fitted_tower(tower, image_size)
