"""What to train after a swap, in which order and at which rates: a recipe of stages.

What is new learns first and alone, then what was replaced comes along, and what was kept comes last and slowest: so nothing
that works is pulled towards something that does not work yet. The figures are the field's: LLaVA-1.5 (Liu et al. 2023;
projector 1e-3, then everything 2e-5, LoRA 2e-4), LLaVA-NeXT (tower 2e-6), Prismatic (Karamcheti et al. 2024; a pretrained
tower is best left alone while the language model learns), InternVL 2 (4e-5 for small language models, layer-wise decay of
0.9 in the tower), Flamingo (Alayrac et al. 2022; 1e-4 for gated layers).
"""

import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..composition.compatibility_report import count
from ..training.parts.layer_groups import LAYER, layer_groups
from .report import SwapReport, percent


#: A projector that starts from nothing (LLaVA), and one that a good closed form or a distillation left little to do.
FRESH_PROJECTOR, GOOD_PROJECTOR = 1e-3, 1e-4
#: What works already and only follows the others (LLaVA's second stage).
KEPT_PROJECTOR = 2e-5
FUSION = 1e-4
#: Parameters up to which a rate is for: smaller models take larger ones.
TOWER_RATES = ((1e8, 2e-5), (1e9, 1e-5), (float("inf"), 2e-6))
LANGUAGE_MODEL_RATES = ((2e8, 1e-4), (2e9, 4e-5), (1.4e10, 2e-5), (float("inf"), 1e-5))
LORA_RATES = ((1.4e10, 2e-4), (float("inf"), 1e-4))
#: From here on AdamW on all weights takes more memory than most cards have, and forgets more than LoRA does.
LORA_FROM = 1e9
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
LAYER_DECAY = 0.9

_NEW = ("initialised", "resized", "solved", "trained")
#: Between the towers and the language model.
_BRIDGE = ("multi_modal_projector", "audio_projector", "image_newline", "fusion")
_TOWERS = {"vision": "vision_tower", "audio": "audio_tower"}

TRAINING_ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}


def recipe_after(
    report: SwapReport, model: nn.Module, *, checkpoint: str | None = None, output: str | None = None
) -> dict[str, Any]:
    """The recipe for a model after a swap.

    Args:
        report: What was kept, solved and initialised (`parts`), and how well (`alignment`, `distillation`).
        model: The new model; only its names, sizes and dtype are read.
        checkpoint: Where it is saved. Default: a place to fill in.
        output: Where the trained model is to go. Default: beside the checkpoint.

    Returns:
        `{"model", "output", "seed", "data", "training_arguments", "stages"}`. A stage is `{"name", "why", "epochs", "parts",
        "losses"}`; what is not in its `parts` (name of a module -> `{"train", "learning_rate", …}`) is frozen. `train` is
        `"all"`, `"last 4 layers"` (with their names in `layers`, and `layer_decay`) or `"lora"` (with its arguments).
    """
    replaced = {part["name"].split(".", 1)[0] for part in report.parts if part["what"] == "replaced"}
    if report.swapped == "text" or "language_model" in replaced:
        stages = _stages_of_language_model(report, model, replaced)
    else:
        stages = _stages_of_tower(report, model)
    checkpoint = checkpoint or "PATH OF THE SWAPPED MODEL"
    return {
        "model": checkpoint,
        "output": output or f"{checkpoint}-trained",
        "seed": 0,
        "data": {"train": "YOUR DATA"},
        "training_arguments": {**TRAINING_ARGUMENTS, "bf16": "bfloat16" in str(getattr(model, "dtype", ""))},
        "stages": stages,
    }


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """A recipe as YAML, with the reason of each stage as a comment above it."""
    import yaml  # transformers needs it too, so it is there

    def dump(values: Any) -> str:
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)

    head = (
        "What to train after the swap, in this order. What is not among the parts of a stage stays frozen in it. Fill in "
        "the data: rows of `messages` and `images`, LLaVA's JSON, or pictures with captions. Rates are for AdamW; the "
        "reasons stand above each stage. To run it: anyvlm train recipe.yaml"
    )
    text = _comment(head) + dump({key: value for key, value in recipe.items() if key != "stages"}) + "stages:\n"
    for number, stage in enumerate(recipe["stages"], 1):
        body = dump([{key: value for key, value in stage.items() if key != "why"}])
        text += textwrap.indent(_comment(f"{number}. {stage['why']}") + body, "  ")
    return text


@dataclass
class _New:
    """A part between tower and language model that the swap made or changed, and the rate it learns at."""

    name: str
    rate: float
    why: str


def _stages_of_tower(report: SwapReport, model: nn.Module) -> list[dict]:
    tower = _TOWERS.get(report.swapped, "vision_tower")
    new = _new_parts(report, model, tower)
    layers, tower_part = _last_layers(model, tower)
    lower = (
        f", lower layers slower still (a decay of {LAYER_DECAY} a layer, as in InternVL)"
        if "layers" in tower_part
        else ""
    )
    model_part, how = _language_model(model, halved=True)
    return [
        *([_first_stage(new)] if new else []),
        _stage(
            "tower",
            {**_bridge(model, model_part["learning_rate"]), tower: tower_part},
            f"{layers[0].upper()}{layers[1:]} of the tower learns what this data needs, slowly{lower}: it is pretrained, "
            "and what it sees in general should stay. What is between it and the language model follows.",
        ),
        _stage(
            "all",
            {**_bridge(model, model_part["learning_rate"]), tower: tower_part, "language_model": model_part},
            f"The language model was kept and has answered about pictures before, so it comes last, {how}: half of what one "
            "takes that has not. Leave this stage out if its answers are good after the one before.",
        ),
    ]


def _stages_of_language_model(report: SwapReport, model: nn.Module, replaced: set[str]) -> list[dict]:
    new = _new_parts(report, model)
    model_part, how = _language_model(model, halved=False)
    parts = {**_bridge(model, model_part["learning_rate"]), "language_model": model_part}
    towers = [tower for tower in _TOWERS.values() if tower in replaced]
    alone = (
        "The tower is new too and waits for the next stage."
        if towers
        else "The tower was kept and stays frozen: tuned along, a pretrained tower loses more than it gains (Prismatic)."
    )
    stages = [
        *([_first_stage(new)] if new else []),
        _stage(
            "language model",
            parts,
            f"The new language model has never seen a picture, so it learns with what is in front of it, {how}. {alone} Mix "
            "in text without pictures if its other skills matter.",
        ),
    ]
    if towers:
        tower_parts = {tower: _last_layers(model, tower)[1] for tower in towers}
        why = "Last the new tower learns what this data needs, slowly, now that what reads it can tell good from bad."
        stages.append(_stage("all", {**parts, **tower_parts}, why))
    return stages


def _first_stage(new: list[_New]) -> dict:
    only_good = all(part.rate <= GOOD_PROJECTOR for part in new)
    why = "Only what the swap made; the rest stays as it is. " + " ".join(part.why for part in new)
    name = "projector" if any(part.name.split(".", 1)[0] in _BRIDGE for part in new) else "what was resized"
    # Pictures with captions are enough, as in the first stage of LLaVA.
    return _stage(name, {part.name: _part(part.rate) for part in new}, why, epochs=0.5 if only_good else 1)


def _stage(name: str, parts: dict[str, dict], why: str, epochs: float = 1) -> dict[str, Any]:
    return {"name": name, "why": why, "epochs": epochs, "parts": parts, "losses": {"language_model": 1.0}}


def _part(rate: float, train: str = "all", **further) -> dict[str, Any]:
    return {"train": train, "learning_rate": rate, **further}


def _bridge(model: nn.Module, rate: float) -> dict[str, dict]:
    """What stands between the towers and the language model, at the rate of LLaVA's second stage, or at the language model's
    if it is small and learns faster: never slower than what is behind it. The rates of LoRA are for LoRA alone."""
    with_weights = {name.split(".", 1)[0] for name, _ in model.named_parameters()}
    rate = max(KEPT_PROJECTOR, rate if _parameters(model.get_submodule("language_model")) < LORA_FROM else 0)
    return {name: _part(rate) for name in _BRIDGE if name in with_weights}


def _new_parts(report: SwapReport, model: nn.Module, tower: str | None = None) -> list[_New]:
    """What the swap made between tower and language model, or in the tower; rows of vocabularies are not among it: no image
    token is read from them."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
    found = []
    for part in report.parts:
        name, what = part["name"], part["what"]
        if what not in _NEW or name not in names or not part["parameters"]:
            continue
        if tower is not None and name.startswith(f"{tower}."):
            rate, why = (
                _tower_rate(model, tower),
                "was made to fit from what the tower had, and follows at the tower's rate.",
            )
        elif name.split(".", 1)[0] in _BRIDGE:
            rate, why = _rate_of_new(name, what, report)
        else:
            continue
        found.append(_New(name, rate, f"{name} ({count(part['parameters'])}) {why}"))
    return found


def _rate_of_new(name: str, what: str, report: SwapReport) -> tuple[float, str]:
    if name.split(".", 1)[0] == "fusion":
        return FUSION, "learns at the rate of Flamingo's gated layers."
    if what == "initialised":
        return FRESH_PROJECTOR, "starts from nothing, so it learns at LLaVA's rate for a fresh projector."
    done = _share_done(what, report)
    if done is None:
        return _between(
            0.5
        ), f"was {what}; how well is not known, so its rate is between a fresh one's and a good one's."
    measure = "explains" if what == "solved" else "agrees with the old model on"
    of = "of the variance on held-out pictures" if what == "solved" else "of held-out answers"
    return _between(done), f"was {what} and {measure} {percent(done)} {of}: the better, the less is left to learn."


def _share_done(what: str, report: SwapReport) -> float | None:
    explained = (report.alignment or {}).get("explained_variance")
    agreement = ((report.distillation or {}).get("agreement") or {}).get("after")
    return agreement if what == "trained" and agreement is not None else explained


def _between(done: float) -> float:
    """From the rate of a fresh projector (0) to that of a good one (1), evenly in the exponent."""
    done = min(max(done, 0.0), 1.0)
    return float(f"{FRESH_PROJECTOR * (GOOD_PROJECTOR / FRESH_PROJECTOR) ** done:.1g}")


def _by_size(rates: tuple[tuple[float, float], ...], parameters: int) -> float:
    return next(rate for most, rate in rates if parameters <= most)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _language_model(model: nn.Module, *, halved: bool) -> tuple[dict, str]:
    """How the language model is trained, and that in words."""
    parameters = _parameters(model.get_submodule("language_model"))
    factor = 0.5 if halved else 1.0
    if parameters >= LORA_FROM:
        rate = _by_size(LORA_RATES, parameters) * factor
        return _part(rate, "lora", lora=dict(LORA)), f"by LoRA on all its linear maps at {rate:.0e}"
    rate = _by_size(LANGUAGE_MODEL_RATES, parameters) * factor
    return _part(rate), f"whole, at {rate:.0e} for its {count(parameters)} parameters"


def _tower_rate(model: nn.Module, tower: str) -> float:
    return _by_size(TOWER_RATES, _parameters(model.get_submodule(tower)))


def _last_layers(model: nn.Module, tower: str) -> tuple[str, dict]:
    """The last third of the tower's layers, at most four, in words and as a part."""
    rate = _tower_rate(model, tower)
    read = model.config.vision_feature_layer if tower == "vision_tower" else None
    layers = [group for group in layer_groups(model.get_submodule(tower), read) if group.kind == LAYER]
    if len(layers) < 2:
        return "all", _part(rate / 2)
    last = layers[-min(4, max(1, len(layers) // 3)) :]
    words = f"last {len(last)} layers" if len(last) > 1 else "last layer"
    names = [f"{tower}.{name}" for group in last for name in group.modules]
    part = _part(rate, words, layers=names, layer_decay=LAYER_DECAY)
    return f"the {words}", part


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 108))
