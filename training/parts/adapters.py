"""PEFT's adapters on chosen parts of a composed model, in one adapter folder that loads with PEFT alone."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ...modeling.bottleneck_adapters import ADAPTER_NAME
from .bottleneck import add_bottleneck_adapters


logger = logging.get_logger(__name__)

#: What `type` may be: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), which learns each output's magnitude by itself.
#: `bottleneck`: a small network behind each layer (Houlsby et al. 2019), which PEFT has not.
ADAPTER_TYPES = ("lora", "dora", "bottleneck")
#: New in a composed model, and lost with the adapter unless it is saved with it.
NEW_PARTS = ("multi_modal_projector", "audio_projector", "fusion")
#: Settings that may differ from part to part; PEFT has one value of any other for the whole adapter.
_PER_PART = ("type", "target_modules", "r", "lora_alpha")


def add_adapters(
    model: PreTrainedModel,
    parts: Mapping[str, Mapping[str, Any]],
    also_train: Sequence[str] | None = None,
    token_indices: Sequence[int] = (),
    base_model: str | None = None,
):
    """Freeze a model and put adapters on parts of it; what is new beside them is trained whole and saved with them.

    ```python
    model = add_adapters(model, {"language_model": {"type": "lora", "r": 16, "lora_alpha": 32}, "vision_tower": {"r": 8}})
    ```

    Args:
        model: A composed model. It is changed in place, as PEFT does.
        parts: Name of a part (`language_model`, `vision_tower`, or a module inside one) -> its settings: `type` (`"lora"`,
            `"dora"`), `r`, `lora_alpha` (default `2 * r`), `target_modules`, and any other field of `peft.LoraConfig`.
            Or `"bottleneck"`, with `r` and `activation`.
            `target_modules` is `"all-linear"` (the default: every linear layer of the part but the language model's head),
            a list of names or ends of names, or a regular expression; it never reaches beyond its part.
        also_train: Modules trained whole, saved in the adapter (PEFT's `modules_to_save`). Default: the projectors and
            the fusion.
        token_indices: Rows of the language model's embeddings to train, for tokens that were added.
        base_model: Folder or Hub id of this model's weights, for `base_model_name_or_path`. Default: where it was loaded.
            Empty: none, for adapters that will be merged.

    Returns:
        A `peft.PeftModelForCausalLM`: `PeftModel.from_pretrained(base, folder)` and `AutoPeftModelForCausalLM` load what
        its `save_pretrained(folder)` writes. With `"bottleneck"` the model itself, whose checkpoints are whole.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: a part, target or setting that does not exist or cannot be; the message lists those that do.
    """
    if not parts:
        raise ValueError('No part is named. Pass parts={"language_model": {"type": "lora", "r": 16}}.')
    if isinstance(model, PreTrainedModel) and "bottleneck" in _types(parts).values():
        return _with_bottlenecks(model, parts, also_train, token_indices)
    peft = import_peft()
    if isinstance(model, peft.PeftModel):
        raise ValueError("This model has adapters already. Merge them first: model = model.merge_and_unload().")
    targets = {part: target_modules(model, part, settings.get("target_modules")) for part, settings in parts.items()}
    _refuse_overlap(targets)
    saved = [_module_to_save(model, name, targets) for name in _also_trained(model, also_train)]
    first, *_ = parts
    ranks = {part: int(settings.get("r", 8)) for part, settings in parts.items()}
    alphas = {part: settings.get("lora_alpha", 2 * ranks[part]) for part, settings in parts.items()}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=_pattern(model, [name for names in targets.values() for name in names]),
        modules_to_save=saved or None,
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={rf"{re.escape(part)}\..*": rank for part, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={rf"{re.escape(part)}\..*": alpha for part, alpha in alphas.items() if alpha != alphas[first]},
        trainable_token_indices=_token_rows(model, token_indices),
        **_common_settings(parts, peft.LoraConfig),
    )
    adapted = peft.get_peft_model(model, config)
    # PEFT writes the model's own, the empty one of a composed model too.
    config.base_model_name_or_path = _base_model(model, base_model)
    return adapted


def import_peft():
    """The module `peft`.

    Raises:
        ImportError: it is not there; the message says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need PEFT: pip install 'anyvlm[train]'.") from error
    return peft


def has_module(model: nn.Module, name: str) -> bool:
    return dict(model.named_modules()).get(name) is not None


def target_modules(model: nn.Module, part: str, targets: str | Sequence[str] | None = None) -> list[str]:
    """Full names of the modules of a part that get an adapter.

    Args:
        targets: As `target_modules` of `add_adapters`.

    Raises:
        ValueError: no such part, or nothing in it is called so.
    """
    _check_part(model, part)
    possible = _possible_targets(model, part)
    if targets is None or targets == "all-linear":
        found = possible
        if not found:
            raise ValueError(f"{part} has no linear layer that an adapter could be on. Leave it out of the parts.")
        return found
    if isinstance(targets, str):
        found = [
            name
            for name in possible
            if re.fullmatch(targets, name) or re.fullmatch(targets, name.removeprefix(f"{part}."))
        ]
        unknown = [] if found else [targets]
    else:
        ends = {target: [name for name in possible if f".{name}".endswith(f".{target}")] for target in targets}
        unknown = [target for target, names in ends.items() if not names]
        wanted = {name for names in ends.values() for name in names}
        found = [name for name in possible if name in wanted]
    if unknown:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in possible})) or "none"
        raise ValueError(
            f"{part} has no linear layer called {', '.join(map(repr, unknown))}. Its linear layers: {known}. Or pass "
            'target_modules="all-linear".'
        )
    return found


def _possible_targets(model: nn.Module, part: str) -> list[str]:
    """Linear layers of a part, but for the head, for adapters, and for those whose weights torch's attention reads past
    `forward`."""
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        inside = (name == part or name.startswith(f"{part}.")) and f".{ADAPTER_NAME}." not in name
        if not inside or module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, nn.MultiheadAttention):
            found.append(name)
    return found


def _pattern(model: nn.Module, names: Sequence[str]) -> str | list[str]:
    """A regular expression that matches these modules and no other, short enough for a person to read: one alternative for
    all layers. The names themselves where layers differ."""
    alternatives = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    pattern = "|".join(alternatives)
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    return f"({pattern})" if matched == set(names) else list(names)


def _refuse_overlap(targets: Mapping[str, Sequence[str]]) -> None:
    parts = list(targets)
    for index, part in enumerate(parts):
        for other in parts[index + 1 :]:
            if set(targets[part]) & set(targets[other]):
                raise ValueError(f"{part} and {other} overlap, so their settings contradict. Name disjoint parts.")


def _module_to_save(model: nn.Module, name: str, targets: Mapping[str, Sequence[str]]) -> str:
    if name in dict(model.named_parameters()):
        raise ValueError(
            f"{name} is a parameter and no module, and PEFT saves modules only: trained, it would be lost. Train it before, "
            f"without adapters (with the projector, as a first stage), and leave {name!r} out of also_train."
        )
    if not has_module(model, name):
        named = ", ".join(child for child, _ in model.named_children())
        raise ValueError(f"also_train names {name!r}, which the model has not. Its modules: {named}.")
    hit = [other for other, _ in model.named_modules() if other.endswith(name) and other != name]
    if hit:
        raise ValueError(
            f"PEFT finds modules to save by the end of their name, and {name!r} is also the end of {', '.join(hit[:4])}. "
            "Leave it out of also_train."
        )
    adapted = [target for names in targets.values() for target in names if target.startswith(f"{name}.")]
    if adapted:
        raise ValueError(
            f"{name} is to be trained whole, and has adapters too ({adapted[0]}, …). Choose one of the two."
        )
    return name


def _types(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    types = {part: settings.get("type", "lora") for part, settings in parts.items()}
    for part, kind in types.items():
        if kind not in ADAPTER_TYPES:
            raise ValueError(
                f"{part}: there is no adapter of type {kind!r}. Choose one of: {', '.join(ADAPTER_TYPES)}."
            )
    return types


def _also_trained(model: nn.Module, also_train: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(name for name in NEW_PARTS if has_module(model, name)) if also_train is None else tuple(also_train)


def _with_bottlenecks(
    model: PreTrainedModel,
    parts: Mapping[str, Mapping[str, Any]],
    also_train: Sequence[str] | None,
    token_indices: Sequence[int],
) -> PreTrainedModel:
    types = _types(parts)
    others = [part for part, kind in types.items() if kind != "bottleneck"]
    if others:
        raise ValueError(
            f"{', '.join(others)}: bottleneck adapters are part of the model, and those of PEFT are not. Take one type for "
            "all parts."
        )
    if token_indices:
        raise ValueError("token_indices go with LoRA and DoRA. Train the rows before, without adapters.")
    for part in parts:
        _check_part(model, part)
    whole = _also_trained(model, also_train)
    for name in whole:
        if name not in dict(model.named_parameters()):  # the checkpoint is whole, so here one may be named too
            _module_to_save(model, name, {})
    return add_bottleneck_adapters(model, parts, whole)


def _check_part(model: nn.Module, part: str) -> None:
    if not has_module(model, part):
        named = ", ".join(name for name, child in model.named_children() if next(child.parameters(), None) is not None)
        raise ValueError(f"The model has no part {part!r}. Its parts: {named}.")


def _token_rows(model: nn.Module, indices: Sequence[int]) -> dict[str, list[int]] | None:
    if not indices:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # PEFT ties what it trains to the head only where the outermost model's config says that it is tied.
        raise ValueError(
            "This language model's head is tied to its embeddings, and PEFT would train the rows of new tokens in the "
            "embeddings alone. Train them before, without adapters, and leave out token_indices."
        )
    return {next(name for name, module in model.named_modules() if module is embeddings): list(indices)}


def _base_model(model: PreTrainedModel, given: str | None) -> str | None:
    name = (model.name_or_path if given is None else given) or None
    if name is None and given is None:
        logger.warning(
            "This model was not loaded from anywhere, and an adapter is of no use without its base. Save the model first "
            "(model.save_pretrained(folder)), and pass base_model=folder."
        )
    return name


def _common_settings(parts: Mapping[str, Mapping[str, Any]], config_class: type) -> dict[str, Any]:
    """Settings for the whole adapter, the same for all parts.

    Raises:
        ValueError: unknown ones, or different ones for two parts.
    """
    known = config_class.__dataclass_fields__
    unknown = sorted({key for settings in parts.values() for key in settings} - {*known, *_PER_PART})
    if unknown:
        raise ValueError(
            f"Not a setting of an adapter: {', '.join(unknown)}. Known: type, and those of peft.LoraConfig: "
            f"{', '.join(sorted(known))}."
        )
    types = _types(parts)
    common: dict[str, dict[str, Any]] = {"type": types}
    for part, settings in parts.items():
        for key in settings.keys() - set(_PER_PART):
            common.setdefault(key, {})[part] = settings[key]
    values = {}
    for key, given in common.items():
        different = [value for value in given.values() if value != next(iter(given.values()))]
        if different or (len(given) < len(parts) and next(iter(given.values())) != known[key].default):
            named = ", ".join(f"{part}: {given.get(part, 'left out')}" for part in parts)
            raise ValueError(
                f"PEFT has one {key} for a whole adapter ({named}). Give all parts the same; r, lora_alpha and "
                "target_modules may differ."
            )
        values[key] = next(iter(given.values()))
    values["use_dora"] = values.pop("type") == "dora" or values.get("use_dora", False)
    return values
