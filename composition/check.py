"""Answer before anything is downloaded: can these two be composed, and what would the model be like?"""

import contextlib
import copy
import difflib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.image_tokens import image_grid, num_image_tokens
from ..modeling.projectors import build_projector
from .compatibility_report import CompatibilityReport
from .compatibility_table import table_row
from .errors import CompositionError
from .image_processors import load_image_processor
from .language_model_probe import check_language_model
from .model_sizes import (
    TRAINING_SETUPS,
    describe_part,
    dtype_name,
    embedding_width,
    head_parameters,
    measure_cache,
    num_parameters,
    training_bytes,
)
from .native_classes import describe_llava, describe_servers
from .nearest import nearest_size, nearest_to_language_model, nearest_to_tower
from .parts import PartSource, load_language_model, load_vision_tower, pretrained_name
from .probe import probe_vision_tower
from .small_copies import build_on_meta, real_copies, shallow_copy, tiny_copy
from .tokenizers import add_image_token, load_tokenizer, normalise_special_tokens


def check(
    vision: PartSource,
    text: PartSource,
    *,
    projector: str | dict = "mlp",
    image_size: int | tuple[int, int] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_processor: BaseImageProcessor | str | None = None,
    image_token: str = "<image>",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> CompatibilityReport:
    """Find out in seconds whether `compose` would join two parts, without reading or downloading weights.

    The parts are built in full size without memory (the meta device), so their sizes are exact. What only arithmetic
    shows is learned from small copies: the same config with fewer layers, and of language models smaller widths. Model
    instances are run as they are, and left as they are.

    Args:
        vision: The tower, as for `compose`; or a model type such as `"dinov2"`, for that type's default config.
        text: The language model, likewise, such as `"qwen3"`.
        projector: As for `compose`, as are all that follow.

    Returns:
        A `CompatibilityReport`: `print(report)` reads well, `report.to_dict()` goes into JSON.

    Raises:
        OSError: a source is neither a folder, nor a model type, nor to be had from the Hub.
        ValueError: the projector is not known.
    """
    started = time.monotonic()
    projector_config = {"type": projector} if isinstance(projector, str) else dict(projector)
    build_projector({"in_features": 1, "out_features": 1, **projector_config})
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    report = CompatibilityReport(vision=_name_of(vision), text=_name_of(text))
    vision = _with_default_config(vision, trust_remote_code)
    text = _with_default_config(text, trust_remote_code)
    unknown: list[str] = []

    with torch.random.fork_rng(), torch.no_grad(), _warnings_in(report.notes):
        torch.manual_seed(0)
        # In the order of `compose`, so that the first reason is the one that it would give.
        language_model = _open("text", text, dtype, trust_remote_code, report)
        tower = _open("vision", vision, dtype, trust_remote_code, report)
        if language_model is not None:
            dtype = dtype or language_model.model.dtype
            _look_at_tokenizer_source(tokenizer, text, report)
            _examine_language_model(language_model, report, unknown)
            _fit_tokenizer(language_model, tokenizer, text, image_token, trust_remote_code, report)
        spec = None
        if tower is not None:
            spec = _examine_tower(tower, vision, image_processor, image_size, trust_remote_code, report, unknown)
        _describe(report, tower, language_model, spec, projector_config, dtype)

    report.works = False if report.reasons else None if unknown else True
    report.reasons += unknown
    report.notes = list(dict.fromkeys(report.notes))
    report.seconds = round(time.monotonic() - started, 2)
    return report


@dataclass
class _Part:
    """A part in full size on the meta device, the instance that was passed if it has weights, and the model that was
    run for real."""

    model: PreTrainedModel
    given: PreTrainedModel | None = None
    run: PreTrainedModel | None = None
    known_from: str = "not known"


def _open(kind: str, source: PartSource, dtype, trust_remote_code: bool, report: CompatibilityReport) -> _Part | None:
    """The part without weights, or `None` and a reason in the report."""
    load: Callable = load_vision_tower if kind == "vision" else load_language_model
    try:
        if isinstance(source, PreTrainedModel):
            given = load(source)
            has_weights = not any(parameter.is_meta for parameter in given.parameters())
            return _Part(build_on_meta(type(given), given.config, given.dtype), given if has_weights else None)
        with torch.device("meta"):
            return _Part(load(source, dtype, trust_remote_code).eval())
    except CompositionError as error:
        report.reasons.append(str(error))
    except Exception as error:  # noqa: BLE001 - a config's values may not go together, which shows in any way
        report.reasons.append(
            f"A {source.model_type!r} model cannot be built from this config: {type(error).__name__}: {error}"
        )
    finder = nearest_to_tower if kind == "vision" else nearest_to_language_model
    report.nearest += finder(source if isinstance(source, PreTrainedConfig) else source.config)
    return None


def _examine_language_model(part: _Part, report: CompatibilityReport, unknown: list[str]) -> None:
    """Whether it is causal and takes embeddings: the same check as when composing, on a model that can be run."""
    config = part.model.config
    copies = (tiny_copy, shallow_copy)
    try:
        if not _run_first(part, copies, _takes_embeddings):
            _known_from_table("text", part, unknown)
    except CompositionError as error:
        report.reasons.append(str(error))
        report.nearest += nearest_to_language_model(config, type(part.model))


def _examine_tower(
    part: _Part, vision, image_processor, image_size, trust_remote_code: bool, report, unknown: list[str]
) -> dict | None:
    """The tower's `vision_tower_spec`, or `None` and a reason."""
    try:
        _, size = load_image_processor(image_processor, vision, part.model.config, image_size, trust_remote_code)
        report.image_size = size
        spec = _run_first(part, (shallow_copy,), lambda tower: probe_vision_tower(tower, size))
        if spec is None:
            _known_from_table("vision", part, unknown)
        return spec
    except CompositionError as error:
        report.reasons.append(str(error))
        fitting = nearest_size(part.given or part.run, part.model.config) if part.given or part.run else []
        report.nearest += fitting or nearest_to_tower(part.model.config)
    return None


def _run_first(part: _Part, copies: tuple[Callable, ...], examine: Callable):
    """What `examine` says of the first model that it can run: the instance that was passed, or copies, smallest first.

    A copy may be refused for being a copy (too few layers for what its config names), so the whole part, where it is
    small enough, has the last word. Returns `None` if nothing could be run.

    Raises:
        CompositionError: it is refused.
    """
    if part.given is not None:
        candidates: Iterator[PreTrainedModel] = iter([part.given])
    else:
        candidates = real_copies(type(part.model), part.model.config, [make(part.model.config) for make in copies])
    refusal = None
    for model in candidates:
        result = None
        try:
            result, refusal = examine(model), None
        except CompositionError as error:
            refusal = error
        except Exception:  # noqa: BLE001 - a copy whose sizes do not go together fails in any way; the next may not
            continue
        whole = num_parameters(model) == num_parameters(part.model)
        part.run, part.known_from = model, "run whole, here" if whole else "run here on a small copy"
        if refusal is None:
            return result
    if refusal is not None:
        raise refusal
    return None


def _takes_embeddings(language_model: PreTrainedModel) -> bool:
    check_language_model(language_model)
    return True


def _known_from_table(kind: str, part: _Part, unknown: list[str]) -> None:
    """What the computed table says of the type, where nothing could be run here; if nothing, that goes to `unknown`.

    Raises:
        CompositionError: the table says that it is refused.
    """
    model_type = part.model.config.model_type
    row = table_row(kind, model_type)
    if row is None:
        unknown.append(
            f"{type(part.model).__name__} could not be run here in a small copy, and {model_type!r} is not in the table "
            "of types that were tried."
        )
        return
    if row["status"] != "works":
        raise CompositionError(row["reason"])
    part.known_from = "the table of types that were tried"


def _look_at_tokenizer_source(tokenizer, text: PartSource, report: CompatibilityReport) -> None:
    if tokenizer is None and not pretrained_name(text):
        report.notes.append(
            "The language model does not say which tokenizer it goes with: composing needs tokenizer=… (a path, a Hub id "
            "or an instance)."
        )


def _fit_tokenizer(
    part: _Part, tokenizer, text: PartSource, image_token: str, trust_remote_code: bool, report: CompatibilityReport
) -> None:
    """Go through what composing does with the tokenizer, on the model without weights."""
    if tokenizer is None and not pretrained_name(text):
        return
    language_model = part.model
    try:
        tokenizer = copy.deepcopy(load_tokenizer(tokenizer, text, trust_remote_code))
        normalise_special_tokens(tokenizer, language_model)
        rows = language_model.get_input_embeddings().weight.shape[0]
        needed = len(tokenizer) + (image_token not in tokenizer.get_vocab())
        if needed > rows:
            # Without weights there is no mean to start new rows from.
            language_model.resize_token_embeddings(needed, mean_resizing=False)
        add_image_token(tokenizer, language_model, image_token)
        report.new_embedding_rows = max(0, needed - rows)
    except (CompositionError, OSError) as error:
        report.reasons.append(str(error))


def _describe(report: CompatibilityReport, tower, language_model, spec, projector_config: dict, dtype) -> None:
    """Write into the report what the parts that could be built are like."""
    parts = report.parts
    if tower is not None:
        parts.append(describe_part("vision_tower", tower.model, tower.known_from))
    if spec is not None and language_model is not None:
        config = {"in_features": spec["hidden_size"], "out_features": embedding_width(language_model.model)}
        with torch.device("meta"):
            projector = build_projector({**config, **projector_config})
        parts.append(describe_part("multi_modal_projector", projector, "its config"))
        report.tokens_per_picture = num_image_tokens(spec, projector_config, *report.image_size)
        report.grid = image_grid(spec, *report.image_size)
    if language_model is None:
        return
    model = language_model.model
    parts.append(describe_part("language_model", model, language_model.known_from))
    report.dtype = dtype_name(dtype)
    report.embedding_parameters = num_parameters(model.get_input_embeddings())
    report.head_parameters = head_parameters(model)
    report.max_position_embeddings = getattr(model.config, "max_position_embeddings", None)
    if report.reasons or len(parts) < 3:
        return
    report.cache = measure_cache(model, dtype)
    report.trainable = list(TRAINING_SETUPS["everything"])
    report.training_bytes = training_bytes(parts, dtype)
    report.native_classes["LlavaForConditionalGeneration"] = describe_llava(
        tower.model,
        model,
        None if tower.given else tower.run,
        None if language_model.given else language_model.run,
        spec,
    )
    report.servers = describe_servers(tower.model, model)
    if report.context_share and report.context_share > 0.5:
        report.notes.append(
            "One picture takes more than half of the context. A smaller image_size=… gives fewer tokens."
        )


def _name_of(source: PartSource) -> str:
    if isinstance(source, (PreTrainedModel, PreTrainedConfig)):
        return source.name_or_path or type(source).__name__
    return os.fspath(source)


def _with_default_config(source: PartSource, trust_remote_code: bool) -> PartSource:
    """The config of a path, a Hub id or a model type; instances and configs as they are.

    Only `config.json` is read. The config remembers where it came from, so that tokenizer and image processor are
    found there.

    Raises:
        OSError: it is none of these.
    """
    if isinstance(source, (PreTrainedModel, PreTrainedConfig)):
        return source
    name = os.fspath(source)
    if not os.path.exists(name) and name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        if os.path.exists(name) or "/" in name:
            raise
        alike = difflib.get_close_matches(name, CONFIG_MAPPING, n=3)
        raise OSError(
            f"{name} is no folder here and no model type of transformers"
            + (f" (nearest: {', '.join(alike)})" if alike else "")
            + ", and could not be had from the Hub."
        ) from error
    config.name_or_path = name
    return config


@contextlib.contextmanager
def _warnings_in(notes: list[str]) -> Iterator[None]:
    """Collect what composing would warn about, instead of showing it."""
    logger = logging.getLogger(__package__)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
