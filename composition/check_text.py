"""The language side of `check`: a language model without weights, its tokenizer, and a small copy joined with a tower."""

import copy
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.fusion import FUSION_CLASSES, build_fusion
from .assembly import trial_model
from .check_findings import Findings
from .check_vision import CheckedVision
from .compatibility_table import table_row
from .decoder_layers import complete_fusion_config, find_decoder_layers
from .errors import CompositionError
from .image_attention_probe import probe_image_attention
from .language_model_probe import probe_generation, probe_language_model
from .model_sizes import embedding_width, num_parameters
from .nearest import nearest_types_to
from .parts import PartSource, pretrained_name
from .small_copies import MAX_REAL_PARAMETERS
from .tokenizers import add_image_token, load_instruction_tokenizer, load_tokenizer, normalise_special_tokens
from .weightless_parts import WeightlessPart


def examine_language_model(part: WeightlessPart, findings: Findings) -> dict | None:
    """The `language_model_spec`: the same probe as when composing, on a model that can be run. `None` if it is refused
    or not known."""
    with findings.refusals(lambda: nearest_types_to("text", part.model.config.model_type)):
        spec = part.examine(probe_language_model)
        findings.consult_table(part)
        return spec
    return None


def fit_tokenizer(
    part: WeightlessPart,
    tokenizer: PreTrainedTokenizerBase | str | None,
    source: PartSource,
    image_token: str,
    projector_config: dict,
    trust_remote_code: bool,
    findings: Findings,
) -> tuple[PreTrainedTokenizerBase | None, dict]:
    """Go through what composing does with the tokenizer, on the model without weights.

    Returns:
        A copy of it, or `None` if there is none or it is refused; and the projector's config, with the vocabulary of one
        that reads.
    """
    report, language_model = findings.report, part.model
    if tokenizer is None and not pretrained_name(source):
        report.notes.append("Composing needs tokenizer=…: this language model does not say which one it goes with.")
        return None, projector_config
    try:
        try:
            fitted = copy.deepcopy(load_tokenizer(tokenizer, source, trust_remote_code))
        except (OSError, ValueError) as error:
            if tokenizer is not None:
                raise
            report.notes.append(
                "Composing needs tokenizer=…: none could be loaded with the language model "
                f"({str(error).splitlines()[0].rstrip('.')})."
            )
            return None, projector_config
        normalise_special_tokens(fitted, language_model)
        _, projector_config = load_instruction_tokenizer(None, fitted, projector_config, trust_remote_code)
        rows = language_model.get_input_embeddings().weight.shape[0]
        needed = len(fitted) + (image_token not in fitted.get_vocab())
        if needed > rows:
            # Without weights there is no mean to start new rows from.
            language_model.resize_token_embeddings(needed, mean_resizing=False)
        add_image_token(fitted, language_model, image_token)
        report.new_embedding_rows = max(0, needed - rows)
        return fitted, projector_config
    except (OSError, ValueError) as error:
        report.reasons.append(str(error))
        return None, projector_config


def examine_joined(
    vision: CheckedVision,
    language_model: WeightlessPart,
    language_model_spec: dict,
    fusion: str,
    image_attention: str,
    findings: Findings,
) -> None:
    """Join the small copies as composing joins the parts, and let them generate: the last thing it probes."""
    parts = []
    for part in (vision.weightless, language_model):
        if part.given is None:
            parts.append(part.run)
        elif num_parameters(part.given) <= MAX_REAL_PARAMETERS:
            parts.append(copy.deepcopy(part.given))
        else:
            findings.report.notes.append(
                f"Generation is tried when composing: {type(part.given).__name__} is too large to copy."
            )
            return
    tower, small = parts
    with findings.refusals(lambda: nearest_types_to("text", language_model.model.config.model_type)):
        width = embedding_width(small)
        # What was asked of the fusion is for the whole model: a copy has fewer layers, and other heads.
        fusion_config = None if fusion == "embed" else complete_fusion_config(fusion, {}, small, (width, width))
        model = trial_model(
            tower, small, vision.part.spec, language_model_spec, fusion=fusion, image_fusion_config=fusion_config
        )
        try:
            model.learn_about_language_model(probe_generation(model))
        except CompositionError:
            row = table_row("text", language_model.model.config.model_type)
            is_copy = num_parameters(small) != num_parameters(language_model.model)
            if not (is_copy and row is not None and row["status"] == "works"):
                raise
            return  # the copy lacks something that the type, which was tried with all checks, has
        model.config.image_attention = image_attention
        probe_image_attention(model)


def weightless_fusion(
    fusion: str, arguments: dict[str, Any], language_model: WeightlessPart, image_features: int, findings: Findings
) -> torch.nn.Module | None:
    """The fusion's module in full size, on the meta device; `None` if there is none, or its width is not known."""
    if fusion == "embed" or language_model.run is None:
        return None
    whole, layers = language_model.model, None
    with findings.refusals():
        if not FUSION_CLASSES[fusion].changes_embeddings:
            path, _, width = find_decoder_layers(language_model.run)
            if width != getattr(language_model.run.config, "hidden_size", None):
                return None  # so the width between the layers of the whole model does not follow from its config
            layers = path, len(whole.get_submodule(path)), whole.config.hidden_size
        widths = embedding_width(whole), image_features
        config = complete_fusion_config(fusion, arguments, whole, widths, layers)
        with torch.device("meta"):
            return build_fusion(fusion, config)
    return None
