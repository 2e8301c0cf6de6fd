"""Whether a native class computes what a model of ours does, shown on small copies: for weights that are never loaded."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...configuration.image_tokens import num_tokens_of_grid
from ...modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..language_model_probe import plain_words
from ..running import num_channels, synthetic_pictures
from ..small_copies import real_copies, shallow_copy, thin_copy
from .equality import TOLERANCE
from .exporting import as_native
from .family import Misfit, NativeFamily


@torch.no_grad()
def prove_on_small_copy(family: NativeFamily, model: PreTrainedModel) -> None:
    """Run a small random model like `model`, and what the family's class makes of it, on one picture between words.

    A model that was imported from this very family was compared with it then, and is not run again; that is also the only
    kind that is taken of models whose pictures are not plain ones of one size.

    Args:
        model: One of ours, without weights.

    Raises:
        Misfit: the two differ, or no copy could be run.
    """
    config = model.config
    if ((config.composed_from or {}).get("native") or {}).get("model_type") == family.model_type:
        return
    spec = config.vision_tower_spec
    whole = (config.image_views or {}).get("type", "resize") == "resize" and spec["inputs"] == "pictures"
    small = _small_model(model) if whole and not spec["any_size"] else None
    if small is None:
        raise Misfit(
            "whether it would compute the same cannot be shown without the weights: load the model, to_native"
        )
    native, _ = as_native(family, small, None)
    pictures = synthetic_pictures(1, num_channels(small.vision_tower.config), tuple(spec["image_size"]))
    words = plain_words(small.language_model, 8, avoid=small.config.image_token_id)
    placeholders = num_tokens_of_grid(config.projector_config, tuple(spec["grid"]))
    image = torch.full((1, placeholders), small.config.image_token_id)
    inputs = {"input_ids": torch.cat([words[:, :4], image, words[:, 4:]], dim=1), "pixel_values": pictures}
    try:
        difference = float((native(**inputs).logits - small(**inputs).logits).abs().max())
    except Exception as error:  # noqa: BLE001 - whatever a class of transformers says about parts it does not fit
        raise Misfit(f"it fails on a picture with a text ({type(error).__name__}: {error})") from error
    if not difference <= TOLERANCE:
        raise Misfit(
            f"the logits of small copies differ by {difference:.3g}, where {TOLERANCE:.1g} is allowed: it does not compute "
            "the same"
        )


def _small_model(model: PreTrainedModel) -> AnyVlmForConditionalGeneration | None:
    """Two layers of each part, with the widths that show from outside; weights large enough for a difference to show.

    `None` if no copy could be built.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = []
        for part in (model.vision_tower, model.language_model):
            copies = [make(part.config) for make in (thin_copy, shallow_copy)]
            parts.append(next(real_copies(type(part), part.config, copies), None))
        if None in parts:
            return None
        tower, language_model = parts
        values = {key: value for key, value in model.config.to_dict().items() if key not in model.config.sub_configs}
        values |= {
            "vision_config": copy.deepcopy(tower.config),
            "text_config": copy.deepcopy(language_model.config),
            "image_token_id": language_model.config.vocab_size - 1,
            "vision_feature_layer": _within(
                model.config.vision_feature_layer, getattr(tower.config, "num_hidden_layers", None)
            ),
            "dtype": torch.float32,
        }
        small = AnyVlmForConditionalGeneration(AnyVlmConfig(**values)).eval()
        for parameter in small.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return small


def _within(layer: int | Sequence[int] | None, num_layers: int | None) -> int | list[int] | None:
    """The same layers, as far as a shallower tower has them; else its outermost ones."""
    if layer is None or num_layers is None:  # a tower in stages has no shallower copy
        return layer
    if not isinstance(layer, int):
        return [_within(index, num_layers) for index in layer]
    return max(layer, -num_layers - 1) if layer < 0 else min(layer, num_layers)
