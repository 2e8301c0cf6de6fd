"""Answer before anything is downloaded: can these two be composed, and what would the model be like?"""

import time
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration.image_views import has_newline
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..modeling.projectors import build_projector
from .arguments import fusion_and_arguments, typed
from .check_findings import Findings
from .check_text import examine_joined, examine_language_model, fit_tokenizer, weightless_fusion
from .check_vision import CheckedVision, examine_pictures, examine_vision
from .compatibility_report import CompatibilityReport
from .model_sizes import (
    TRAINING_SETUPS,
    describe_parameter,
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
from .parts import PartSource
from .picture_plan import check_context
from .projector_grid import check_projector_arguments, complete_projector
from .views import views_settings
from .vision_part import check_vision_fusion, for_each, vision_sources
from .weightless_parts import WeightlessPart, source_as_text
from .written_text import check_settings, check_written, repeated_token


def check(
    vision: PartSource | Sequence[PartSource],
    text: PartSource,
    *,
    projector: str | dict = "mlp",
    fusion: str | dict = "embed",
    image_attention: str = "causal",
    views: str | dict | None = None,
    image_size: int | tuple[int, int] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_processor: BaseImageProcessor | str | Sequence | None = None,
    image_token: str = "<image>",
    image_text: dict | None = None,
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
        ValueError: an argument is not known, or excludes another. (What the parts cannot do is in the report.)
    """
    started = time.monotonic()
    fusion, fusion_arguments = fusion_and_arguments(fusion, image_attention)
    projector_config = typed(projector)
    sources = vision_sources(vision)
    check_vision_fusion(vision_fusion)
    settings = views_settings(views)
    check_settings(image_text)
    check_projector_arguments(projector_config)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    image_processors = for_each(image_processor, len(sources), "image_processor")
    report = CompatibilityReport(
        vision=" + ".join(map(source_as_text, sources)),
        text=source_as_text(text),
        fusion=fusion,
        image_attention=image_attention,
    )
    findings = Findings(report)
    # In the order of `compose`, here as below, so that the first reason is the one that it would give.
    text = findings.find_config("text", text, trust_remote_code)
    sources = [findings.find_config("vision", source, trust_remote_code) for source in sources]

    with torch.random.fork_rng(), torch.no_grad(), findings.warnings():
        torch.manual_seed(0)
        language_model = findings.open("text", text, dtype, trust_remote_code)
        towers = [findings.open("vision", source, dtype, trust_remote_code) for source in sources]
        language_model_spec = fusion_module = None
        if language_model is not None:
            dtype = dtype or language_model.model.dtype
            language_model_spec = examine_language_model(language_model, findings)
            token = repeated_token(image_text, image_token)
            fitted, projector_config = fit_tokenizer(
                language_model, tokenizer, text, token, projector_config, trust_remote_code, findings
            )
        checked = examine_vision(
            towers, sources, image_processors, image_size, vision_fusion, trust_remote_code, findings
        )
        if checked is not None:
            plan = examine_pictures(
                checked,
                sources[0],
                {
                    "settings": settings,
                    "projector_config": projector_config,
                    "fusion": fusion,
                    "video_frames": None,
                    "image_processor": image_processor,
                    "image_size": image_size,
                    "trust_remote_code": trust_remote_code,
                },
                findings,
            )
            if language_model is not None:
                width, spec = embedding_width(language_model.model), checked.part.spec
                with findings.refusals():
                    if plan is not None and fitted is not None:
                        check_written(image_text, image_token, fitted, plan.measured.image_views, fusion)
                with findings.refusals():
                    if plan is not None:
                        check_context(language_model.model.config, plan, spec)
                with findings.refusals():
                    projector_config = complete_projector(projector_config, spec["hidden_size"], width, fusion)
                    image_features = projector_config["out_features"]
                    fusion_module = weightless_fusion(
                        fusion, fusion_arguments, language_model, image_features, findings
                    )
        if checked is not None and language_model_spec is not None:
            examine_joined(checked, language_model, language_model_spec, fusion, image_attention, findings)
        _describe(report, towers, checked, language_model, projector_config, fusion_module, dtype)

    findings.finish()
    report.seconds = round(time.monotonic() - started, 2)
    return report


def _describe(
    report: CompatibilityReport,
    towers: list[WeightlessPart | None],
    checked: CheckedVision | None,
    language_model: WeightlessPart | None,
    projector_config: dict,
    fusion_module: nn.Module | None,
    dtype: torch.dtype | None,
) -> None:
    """Write into the report what the parts that could be built are like."""
    parts = report.parts
    tower = towers[0] if checked is None and len(towers) == 1 else checked and checked.weightless
    if tower is not None:
        parts.append(describe_part("vision_tower", tower.model, tower.known_from))
    if language_model is None:
        return
    model = language_model.model
    if "in_features" in projector_config and "out_features" in projector_config:
        with torch.device("meta"):
            parts.append(describe_part("multi_modal_projector", build_projector(projector_config), "its config"))
    parts.append(describe_part("language_model", model, language_model.known_from))
    if fusion_module is not None:
        parts.append(describe_part("fusion", fusion_module, "its config"))
    if has_newline(report.image_views):
        parts.append(describe_parameter("image_newline", projector_config["out_features"]))
    report.dtype = dtype_name(dtype)
    report.embedding_parameters = num_parameters(model.get_input_embeddings())
    report.head_parameters = head_parameters(model)
    report.max_position_embeddings = num_positions(model.config)
    if report.reasons or report.parameters is None:
        return
    report.cache = measure_cache(model, dtype)
    report.trainable = [*TRAINING_SETUPS["everything"], *(["fusion"] if fusion_module is not None else [])]
    report.training_bytes = training_bytes(parts, dtype)
    if isinstance(tower.model, FusedVisionTowers):
        llava = "no; it holds one vision tower"
    elif report.image_views or report.fusion != "embed" or report.image_attention != "causal":
        llava = "no; a picture is one view in the text there, and causal attention sees it"
    else:
        llava = describe_llava(tower, language_model, checked.part.spec)
    report.native_classes["LlavaForConditionalGeneration"] = llava
    report.servers = describe_servers(tower.model, model)
