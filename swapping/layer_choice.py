"""Which layer of a new tower says most of what the old tower said: tried on pictures."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ..composition.errors import CompositionError
from ..composition.running import device_of, in_mode, num_channels, synthetic_pictures
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.picture_inputs import tower_arguments
from ..processing.processing_anyvlm import AnyVlmProcessor
from .alignment import AlignmentError, align
from .pictures import Pictures


logger = logging.getLogger(__name__)

#: Pictures that each layer is tried with, at most; some of them are held out.
_PICTURES = 200
#: Depths that are tried in a tower of many layers, as shares of it. Middle layers transfer better than the last where the
#: pictures are not those that the tower was trained on (Evci et al. 2022, "Head2Toe").
_DEPTHS = (11 / 12, 5 / 6, 2 / 3, 1 / 2)
#: A tower of so few hidden states has stages of maps, each of which is tried.
_STAGES = 6
#: A layer is left for one before it only if that explains so much more of the variance.
_LEAST_GAIN = 0.01

SwapLayer = Callable[[int | None], tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor]]


def best_layer(
    model: AnyVlmForConditionalGeneration,
    processor: AnyVlmProcessor,
    swap_layer: SwapLayer,
    images: Any,
    seed: int = 0,
    progress: bool = True,
) -> tuple[int | None, list[dict[str, Any]]]:
    """The layer whose features, mapped in closed form, give the old tokens of held-out pictures best.

    Args:
        model, processor: The old ones.
        swap_layer: The new model and processor that read this layer, `None` for the tower's last hidden state.
        images: A source of pictures; a sample of them is looked at.

    Returns:
        The `vision_feature_layer`, and for each layer that was tried `{"layer", "explained_variance"}`, or `"refused"` with
        the reason.

    Raises:
        CompositionError: not even the last layer can be used.
    """
    sample = Pictures(images, limit=_PICTURES, seed=seed)
    swapped = swap_layer(None)
    tried: list[dict[str, Any]] = []
    layers = [None, *_candidates(swapped[0].vision_tower, swapped[0].config.vision_tower_spec)]
    for layer in track(layers, "trying layers", console=Console(stderr=True), disable=not progress):
        try:
            if layer is not None:
                swapped = swap_layer(layer)
            found = align(model, processor, *swapped, sample, seed=seed, progress=False)
        except (CompositionError, AlignmentError) as error:
            if layer is None:
                return None, [{"layer": None, "refused": str(error)}]
            tried.append({"layer": layer, "refused": str(error)})
            continue
        tried.append({"layer": layer, "explained_variance": found["explained_variance"]})
    usable = [entry for entry in tried if "explained_variance" in entry]
    best = max(entry["explained_variance"] for entry in usable)
    deepest = next(entry for entry in usable if entry["explained_variance"] >= best - _LEAST_GAIN)
    return deepest["layer"], tried


@torch.no_grad()
def _candidates(vision_tower: nn.Module, spec: dict) -> list[int]:
    """Indices into the hidden states, from the back; none for a tower that does not show them."""
    pictures = synthetic_pictures(1, num_channels(vision_tower.config), tuple(spec["image_size"]))
    pictures = pictures.to(device_of(vision_tower), vision_tower.dtype)
    try:
        with in_mode(vision_tower):
            outputs = vision_tower(
                **tower_arguments(spec, pictures, {}), **spec["call_kwargs"], output_hidden_states=True
            )
        number = len(outputs.hidden_states)
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way; then its last layer is the only one
        logger.info("%s shows no hidden states: %s", type(vision_tower).__name__, error)
        return []
    # The first is what the embeddings give.
    if number <= _STAGES:
        return [-depth for depth in range(2, number)]
    return sorted({round(share * (number - 1)) - number for share in _DEPTHS}, reverse=True)
