"""Parts without their weights: opened from a config, and run as small copies where a real run is needed."""

import copy
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..modeling.language_models import causal_lm_class
from .compatibility_table import table_row
from .errors import CompositionError
from .model_sizes import num_parameters
from .parts import CAUSAL_SWITCHES, PartSource, load_language_model, load_vision_tower
from .remote_code import find_remote_code
from .small_copies import build_on_meta, real_copies, shallow_copy, thin_copy, tiny_copy


@dataclass
class WeightlessPart:
    """A part in full size on the meta device, and what it was run as.

    Args:
        kind: `"vision"` or `"text"`.
        model: The whole part, without memory.
        given: The instance that was passed, if it has weights.
        run: The model that was run for real: `given`, or a copy with random weights.
        known_from: In words, what was run.
        trouble: Why nothing could be run.
        made_causal: Whether an encoder's config was changed to its causal form, as composing does.
    """

    kind: str
    model: PreTrainedModel
    given: PreTrainedModel | None = None
    run: PreTrainedModel | None = None
    known_from: str = "not known"
    trouble: str = "it is too large, and its config says nothing that could be made smaller"
    made_causal: bool = False

    def examine(self, look: Callable[[PreTrainedModel], Any]) -> Any:
        """What `look` returns for the instance that was passed, or for the first copy that it can run.

        A copy may be refused for being a copy (too few layers for what its config names), so the whole part, where it
        is small enough, has the last word. Returns `None` if nothing could be run; `trouble` then says why.

        Raises:
            CompositionError: it is refused.
        """
        refusal = None
        for model in [self.given] if self.given is not None else self._copies():
            result, modes = None, [(module, module.training) for module in model.modules()]
            try:
                result, refusal = look(model), None
            except CompositionError as error:
                refusal = error
            except Exception as error:  # noqa: BLE001 - a copy whose sizes do not go together fails in any way
                self.trouble = f"{type(error).__name__}: {error}"
                continue
            finally:
                for module, training in modes:
                    module.training = training
            if refusal is None or self.run is None:
                whole = num_parameters(model) == num_parameters(self.model)
                self.run, self.known_from = model, "run whole, here" if whole else "run here as a small copy"
            if refusal is None:
                return result
        if refusal is not None:
            raise refusal
        return None

    def consult_table(self) -> str | None:
        """Complete what was run by what the computed table says of the type. Returns why nothing is known, or `None`.

        Raises:
            CompositionError: the table, which is made with all checks of a pair, says that the type is refused or fails.
        """
        model_type = self.model.config.model_type
        row = table_row(self.kind, model_type)
        if row is not None and row["status"] != "works":
            raise CompositionError(row["reason"])
        if self.run is not None:
            return None
        if row is None:
            return (
                f"{type(self.model).__name__} could not be run here as a small copy ({self.trouble}), and the table of "
                f"types that were tried has no {model_type!r}."
            )
        self.known_from = "the table of types that were tried"
        return None

    def _copies(self):
        config = self.model.config
        makers = (shallow_copy, thin_copy) if self.kind == "vision" else (tiny_copy, shallow_copy)
        return real_copies(type(self.model), config, [make(config) for make in makers])


def open_part(kind: str, source: PartSource, dtype: torch.dtype | None, trust_remote_code: bool) -> WeightlessPart:
    """The part as `compose` would take it from `source`, on the meta device.

    Raises:
        CompositionError: there is no such part in it, or its config cannot be built.
    """
    load: Callable = load_vision_tower if kind == "vision" else load_language_model
    if isinstance(source, PreTrainedModel):
        given = load(source)
        has_weights = not any(parameter.is_meta for parameter in given.parameters())
        return WeightlessPart(
            kind, build_on_meta(type(given), given.config, given.dtype), given if has_weights else None
        )
    try:
        made_causal = False
        if kind == "text":
            source, made_causal = _causal_config(source, trust_remote_code)
        with torch.device("meta"):
            return WeightlessPart(kind, load(source, dtype, trust_remote_code).eval(), made_causal=made_causal)
    except CompositionError:
        raise
    except Exception as error:  # noqa: BLE001 - a config's values may not go together, which shows in any way
        raise CompositionError(
            f"A {source.model_type!r} model cannot be built from this config: {type(error).__name__}: {error}"
        ) from error


def _causal_config(config: PreTrainedConfig, trust_remote_code: bool) -> tuple[PreTrainedConfig, bool]:
    """The config in the causal form that `load_language_model` makes of it, and whether that is another one.

    It finds out by running the model; here it does so with a small copy.
    """
    text_config = getattr(config, "text_config", None)
    config = copy.deepcopy(text_config if isinstance(text_config, PreTrainedConfig) else config)
    model_class = causal_lm_class(config)
    switches = [name for name in CAUSAL_SWITCHES if getattr(config, name, None) is False]
    if not switches or model_class is None:
        return config, False
    for model in real_copies(model_class, config, [tiny_copy(config), shallow_copy(config)]):
        causal = load_language_model(model.config, None, trust_remote_code)
        for name in switches:
            setattr(config, name, getattr(causal.config, name))
        break
    else:
        for name in switches:
            setattr(config, name, True)
    return config, any(getattr(config, name) for name in switches)


def find_config(kind: str, source: PartSource, trust_remote_code: bool) -> PreTrainedConfig | PreTrainedModel:
    """The config of a path, a Hub id or a model type; instances and configs as they are.

    Only `config.json` is read. The config remembers where it came from, so that tokenizer and image processor are
    found there.

    Args:
        kind: `"vision"` or `"text"`.

    Raises:
        OSError: it is none of these.
        CompositionError: it has code of its own, which is not trusted.
    """
    if isinstance(source, (PreTrainedModel, PreTrainedConfig)):
        return source
    name = os.fspath(source)
    if not os.path.exists(name) and name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    try:
        if not os.path.exists(name):
            validate_repo_id(name)
    except HFValidationError as error:
        raise OSError(f"{name} is no folder here, and neither a model type of transformers nor a Hub id.") from error
    try:
        find_remote_code(name, "AutoModel" if kind == "vision" else "AutoModelForCausalLM", trust_remote_code)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        if os.path.exists(name):
            raise
        alike = difflib.get_close_matches(name, CONFIG_MAPPING, n=3)
        nearest = f" (nearest: {', '.join(alike)})" if alike else ""
        raise OSError(
            f"{name} is no folder here and no model type of transformers{nearest}, and could not be had from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    config.name_or_path = name
    return config


def source_as_text(source: PartSource) -> str:
    if isinstance(source, (PreTrainedModel, PreTrainedConfig)):
        return source.name_or_path or type(source).__name__
    return os.fspath(source)
