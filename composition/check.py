"""Answer before anything is downloaded: can these two be composed, and what would the model be like?"""

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.image_tokens import num_tokens_of_grid
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..modeling.projectors import build_projector
from ..processing.prepared_views import grids_of_sizes, makes_one_size
from .compatibility_report import CompatibilityReport
from .compatibility_table import table_row
from .compose import _assemble
from .errors import CompositionError
from .image_processors import fits_tower, load_image_processor
from .language_model_probe import probe_generation, probe_language_model
from .model_sizes import (
    TRAINING_SETUPS,
    describe_part,
    dtype_name,
    embedding_width,
    head_parameters,
    measure_cache,
    num_parameters,
    num_positions,
    training_bytes,
)
from .native_classes import describe_llava, describe_servers
from .nearest import nearest_size, nearest_types_to
from .parts import PartSource, pretrained_name
from .probe import probe_vision_tower
from .projector_grid import check_projector_arguments, check_projector_grid
from .small_copies import MAX_REAL_PARAMETERS
from .tokenizers import add_image_token, load_tokenizer, normalise_special_tokens
from .vision_part import check_own_code, check_vision_fusion, for_each, fuse_towers, fused_spec, vision_sources
from .weightless_parts import WeightlessPart, find_config, open_part, source_as_text


def check(
    vision: PartSource | Sequence[PartSource],
    text: PartSource,
    *,
    projector: str | dict = "mlp",
    image_size: int | tuple[int, int] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_processor: BaseImageProcessor | str | Sequence | None = None,
    image_token: str = "<image>",
    vision_fusion: str = "channel",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> CompatibilityReport:
    """Find out in seconds whether `compose` would join two parts, without reading or downloading weights.

    The parts are built in full size without memory (the meta device), so their sizes are exact. What only arithmetic
    shows is learned from small copies: the same config with fewer layers, and of language models smaller widths. Model
    instances are run as they are, and left as they are.

    Args:
        vision: The tower, as for `compose`; or a model type such as `"dinov2"`, for that type's default config. Several
            in a tuple are fused.
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
    check_projector_arguments(projector_config)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    sources = vision_sources(vision)
    check_vision_fusion(vision_fusion)
    image_processors = for_each(image_processor, len(sources), "image_processor")
    report = CompatibilityReport(vision=" + ".join(map(source_as_text, sources)), text=source_as_text(text))
    # In the order of `compose`, here as below, so that the first reason is the one that it would give.
    text = _find_config("text", text, trust_remote_code, report)
    sources = [_find_config("vision", source, trust_remote_code, report) for source in sources]
    unknown: list[str] = []

    with torch.random.fork_rng(), torch.no_grad(), _warnings_in(report.notes):
        torch.manual_seed(0)
        language_model = None if text is None else _open("text", text, dtype, trust_remote_code, report)
        towers = [
            None if source is None else _open("vision", source, dtype, trust_remote_code, report) for source in sources
        ]
        tower = towers[0] if len(towers) == 1 else None
        spec = language_model_spec = None
        if language_model is not None:
            dtype = dtype or language_model.model.dtype
            language_model_spec = _examine_language_model(language_model, report, unknown)
            _fit_tokenizer(language_model, tokenizer, text, image_token, trust_remote_code, report)
        specs = [
            _examine_tower(
                part, source, own_processor, image_size, trust_remote_code, report, unknown, plain=len(towers) > 1
            )
            for part, source, own_processor in zip(towers, sources, image_processors)
            if part is not None
        ]
        if len(towers) > 1 and len(specs) == len(towers):
            tower, spec = _fuse(towers, specs, vision_fusion, report)
        elif tower is not None:
            spec = specs[0]
        if spec is not None:
            _examine_projector(projector_config, spec, report)
        if spec is not None and language_model_spec is not None:
            _examine_generation(tower, language_model, spec, language_model_spec, report)
        _describe(report, tower, language_model, spec, projector_config, dtype)

    report.works = False if report.reasons else None if unknown else True
    report.reasons = report.reasons or unknown
    report.notes = list(dict.fromkeys(report.notes))
    report.seconds = round(time.monotonic() - started, 2)
    return report


def _find_config(kind: str, source: PartSource, trust_remote_code: bool, report: CompatibilityReport):
    """The config, or the instance that was passed; `None` if its code is not trusted, with the reason in the report."""
    try:
        return find_config(kind, source, trust_remote_code)
    except CompositionError as error:
        report.reasons.append(str(error))
        return None


def _open(
    kind: str, source: Any, dtype, trust_remote_code: bool, report: CompatibilityReport
) -> WeightlessPart | None:
    try:
        part = open_part(kind, source, dtype, trust_remote_code)
        if part.made_causal and pretrained_name(source):
            name, of_a_pair = type(part.model).__name__, getattr(source, "is_encoder_decoder", False)
            report.notes.append(
                f"{name} was trained to read the output of an encoder, which it does without when composed: train the "
                "language model, not the projector alone."
                if of_a_pair
                else f"{name} was trained as an encoder. Composed, it is a causal decoder and must learn to write: train "
                "the language model, not the projector alone."
            )
        return part
    except CompositionError as error:
        config = source.config if isinstance(source, PreTrainedModel) else source
        report.reasons.append(str(error))
        report.nearest += nearest_types_to(kind, config.model_type)
        return None


def _examine_language_model(part: WeightlessPart, report: CompatibilityReport, unknown: list[str]) -> dict | None:
    """The `language_model_spec`: the same probe as when composing, on a model that can be run. `None` if it is refused
    or not known, with the reason in the report."""
    try:
        spec = part.examine(probe_language_model)
        _consult_table(part, report, unknown)
        return spec
    except CompositionError as error:
        report.reasons.append(str(error))
        report.nearest += nearest_types_to("text", part.model.config.model_type)
    return None


def _examine_generation(
    tower: WeightlessPart, language_model: WeightlessPart, spec: dict, language_model_spec: dict, report
) -> None:
    """Join the small copies as composing joins the parts, and let them generate: the last thing it probes."""
    parts = []
    for part in (tower, language_model):
        if part.given is None:
            parts.append(part.run)
        elif num_parameters(part.given) <= MAX_REAL_PARAMETERS:
            parts.append(copy.deepcopy(part.given))
        else:
            report.notes.append(
                f"Generation is tried when composing: {type(part.given).__name__} is too large to copy."
            )
            return
    small_tower, small_language_model = parts
    embeddings = small_language_model.get_input_embeddings()
    width = embeddings(torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)).shape[-1]
    config = AnyVlmConfig(
        vision_config=copy.deepcopy(small_tower.config),
        text_config=copy.deepcopy(small_language_model.config),
        vision_tower_spec=spec,
        language_model_spec=language_model_spec,
        projector_config={"type": "linear", "in_features": spec["hidden_size"], "out_features": width},
        # Some have rows of their own beyond the vocabulary (moshi), which they cannot generate.
        image_token_id=min(embeddings.weight.shape[0], small_language_model.config.vocab_size) - 1,
        dtype=small_language_model.dtype,
    )
    try:
        probe_generation(_assemble(config, small_tower, small_language_model).eval())
    except CompositionError as error:
        row = table_row("text", language_model.model.config.model_type)
        is_copy = num_parameters(small_language_model) != num_parameters(language_model.model)
        if is_copy and row is not None and row["status"] == "works":
            return  # the copy lacks something that the type, which was tried with all checks, has
        report.reasons.append(str(error))
        report.nearest += nearest_types_to("text", language_model.model.config.model_type)


def _examine_tower(
    part: WeightlessPart,
    source,
    image_processor,
    image_size,
    trust_remote_code: bool,
    report,
    unknown: list[str],
    plain: bool = False,
) -> dict | None:
    """The tower's `vision_tower_spec`; `None` if it is refused or not known, with the reason in the report."""
    try:
        processor, size = load_image_processor(
            image_processor, source, part.model, image_size, trust_remote_code, plain
        )
        if plain:
            check_own_code(part.model, processor)
        report.image_size = size
        spec = part.examine(lambda tower: probe_vision_tower(tower, size))
        if spec is not None:
            if not plain and not fits_tower(processor, part.run, spec, None):
                processor, size = load_image_processor(None, part.model.config, part.model, size, False)
            report.grid = grids_of_sizes(processor, spec, [size])[0]
            report.one_size = makes_one_size(processor, spec)
        _consult_table(part, report, unknown)
        return spec
    except CompositionError as error:
        report.reasons.append(str(error))
        fitting = [] if part.run is None else nearest_size(part.run, part.model.config)
        report.nearest += fitting or nearest_types_to("vision", part.model.config.model_type)
    return None


def _examine_projector(projector_config: dict, spec: dict, report: CompatibilityReport) -> None:
    try:
        check_projector_grid(projector_config, spec, any_grid=spec["any_size"])
        report.tokens_per_picture = num_tokens_of_grid(projector_config, report.grid)
    except CompositionError as error:
        report.reasons.append(str(error))


def _fuse(
    towers: list[WeightlessPart], specs: list[dict | None], vision_fusion: str, report
) -> tuple[WeightlessPart | None, dict | None]:
    """Several towers as one part, and its spec, if every one of them could be measured."""
    if None in specs:
        return None, None
    try:
        spec = fused_spec(specs, vision_fusion)
    except CompositionError as error:
        report.reasons.append(str(error))
        return None, None
    layers = [None] * len(towers)
    run = fuse_towers([part.run for part in towers], specs, layers, vision_fusion)
    fused = WeightlessPart(
        "vision",
        fuse_towers([part.model for part in towers], specs, layers, vision_fusion),
        given=None if all(part.given is None for part in towers) else run,
        run=run,
        known_from=", ".join(dict.fromkeys(part.known_from for part in towers)),
    )
    report.image_size, report.grid = tuple(spec["image_size"]), tuple(spec["grid"])
    return fused, spec


def _consult_table(part: WeightlessPart, report: CompatibilityReport, unknown: list[str]) -> None:
    missing = part.consult_table()
    if missing is not None:
        unknown.append(missing)
    row = table_row(part.kind, part.model.config.model_type) or {"marks": []}
    report.notes += [f"{type(part.model).__name__}: {mark}." for mark in row["marks"]]


def _fit_tokenizer(
    part: WeightlessPart, tokenizer, source, image_token: str, trust_remote_code: bool, report: CompatibilityReport
) -> None:
    """Go through what composing does with the tokenizer, on the model without weights."""
    if tokenizer is None and not pretrained_name(source):
        report.notes.append("Composing needs tokenizer=…: this language model does not say which one it goes with.")
        return
    language_model = part.model
    try:
        try:
            tokenizer = copy.deepcopy(load_tokenizer(tokenizer, source, trust_remote_code))
        except (OSError, ValueError) as error:
            if tokenizer is not None:
                raise
            report.notes.append(
                f"Composing needs tokenizer=…: none could be loaded with the language model ({_first_line(error)})."
            )
            return
        normalise_special_tokens(tokenizer, language_model)
        rows = language_model.get_input_embeddings().weight.shape[0]
        needed = len(tokenizer) + (image_token not in tokenizer.get_vocab())
        if needed > rows:
            # Without weights there is no mean to start new rows from.
            language_model.resize_token_embeddings(needed, mean_resizing=False)
        add_image_token(tokenizer, language_model, image_token)
        report.new_embedding_rows = max(0, needed - rows)
    except (OSError, ValueError) as error:
        report.reasons.append(str(error))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _describe(report: CompatibilityReport, tower, language_model, spec, projector_config: dict, dtype) -> None:
    """Write into the report what the parts that could be built are like."""
    parts = report.parts
    if tower is not None:
        parts.append(describe_part("vision_tower", tower.model, tower.known_from))
    if language_model is None:
        return
    model = language_model.model
    if spec is not None:
        widths = {"in_features": spec["hidden_size"], "out_features": embedding_width(model)}
        with torch.device("meta"):
            projector = build_projector({**widths, **projector_config})
        parts.append(describe_part("multi_modal_projector", projector, "its config"))
    parts.append(describe_part("language_model", model, language_model.known_from))
    report.dtype = dtype_name(dtype)
    report.embedding_parameters = num_parameters(model.get_input_embeddings())
    report.head_parameters = head_parameters(model)
    report.max_position_embeddings = num_positions(model.config)
    if report.reasons or report.parameters is None:
        return
    report.cache = measure_cache(model, dtype)
    report.trainable = list(TRAINING_SETUPS["everything"])
    report.training_bytes = training_bytes(parts, dtype)
    report.native_classes["LlavaForConditionalGeneration"] = (
        "no; it holds one vision tower"
        if isinstance(tower.model, FusedVisionTowers)
        else describe_llava(tower, language_model, spec)
    )
    report.servers = describe_servers(tower.model, model)
    if report.context_share and report.context_share > 0.5:
        report.notes.append(
            "One picture takes more than half of the context. A smaller image_size=… gives fewer tokens."
        )


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
