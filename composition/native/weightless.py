"""What is measured of a model's parts, learned from small copies: for conversions that never load the weights."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..assembly import trial_model
from ..errors import CompositionError
from ..language_model_probe import probe_generation, probe_language_model
from ..probe import probe_vision_tower
from ..small_copies import build_on_meta
from ..weightless_parts import WeightlessPart, open_part
from .exporting import build_native, families_for, native_config_of, no_family, require_plain_logits
from .family import NativeFamily
from .keys import NATIVE
from .logits import require_plain
from .small_proof import prove_on_small_copy
from .weights import language_model_rules, put_weights, translate


@torch.no_grad()
def measure_tower(
    vision_config: PreTrainedConfig, size: tuple[int, int], layer: int | Sequence[int] | None, select_strategy: str
) -> tuple[dict, WeightlessPart]:
    """The `vision_tower_spec`, and the part, of which a small copy was run.

    Raises:
        CompositionError: no copy could be run, or what was run cannot be a tower.
    """
    part = open_part("vision", vision_config, None, False)
    # A copy has fewer layers; those of one tower that a native class reads have one shape.
    layers = -1 if isinstance(layer, int) else None if layer is None else [-1] * len(layer)
    spec = part.examine(lambda tower: probe_vision_tower(tower, size, layers, select_strategy))
    _require(spec, part)
    return spec, part


@torch.no_grad()
def measure_language_model(
    text_config: PreTrainedConfig, vision_tower_spec: dict, tower: WeightlessPart, family: NativeFamily
) -> dict:
    """The `language_model_spec`, what generation shows included.

    Raises:
        CompositionError: no copy could be run, what was run cannot be a causal language model, or it changes the logits
            of its head, which the family's class does not.
    """
    part = open_part("text", text_config, None, False)
    spec = part.examine(probe_language_model)
    _require(spec, part)
    if family.plain_logits:
        require_plain(part.run, family.model_class)
    return {**spec, **probe_generation(trial_model(tower.run, part.run, vision_tower_spec, spec))}


@torch.no_grad()
def choose_family(model: PreTrainedModel) -> tuple[NativeFamily, PreTrainedModel]:
    """The first native class that can hold a model of ours without weights, and that class's model, likewise.

    By the family's conditions, by every key, and by what small copies compute.

    Raises:
        CompositionError: there is none; the message says of each why.
    """
    reasons = []
    for family in families_for(model.config):
        try:
            native_config = native_config_of(family, model)
            open_part("text", model.config.text_config, None, False).examine(
                lambda language_model, family=family: require_plain_logits(family, language_model) or True
            )
            native = build_native(
                family, native_config, lambda native_class, config=native_config: build_on_meta(native_class, config)
            )
            rules = [*family.rules(native_config), *language_model_rules(family, model.language_model)]
            put_weights(native, translate(model, rules, NATIVE), family.model_class)
            prove_on_small_copy(family, model)
            return family, native
        except CompositionError as error:
            reasons.append(f"{family.model_class}: {error}")
    raise no_family(reasons)


def _require(spec: dict | None, part: WeightlessPart) -> None:
    if spec is None:
        raise CompositionError(
            f"{type(part.model).__name__} could not be run here as a small copy ({part.trouble}), so how it is called is "
            "not known. Load the model, convert it with anyvlm.from_native, and save it."
        )
