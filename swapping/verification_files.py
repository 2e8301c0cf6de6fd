"""Step "checkpoint": its files are there and belong together, and every weight finds its place."""

import logging
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoProcessor

from ..configuration.configuration_anyvlm import CODE_VERSION, AnyVlmConfig
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from ..publishing.errors import PublishingError
from ..publishing.static_checks import loading_problems
from .verification_checks import CheckFailed, Finding, NotChecked, Subject


logger = logging.getLogger(__name__)


def folder_of(checkpoint: str | os.PathLike) -> Path:
    """The folder of a checkpoint, downloaded if it is a Hub id.

    Raises:
        OSError: there is none.
        ValueError: it is of another kind of model.
    """
    folder = Path(checkpoint) if os.path.isdir(checkpoint) else Path(snapshot_download(os.fspath(checkpoint)))
    if (folder / "config.json").is_file():
        config, _ = AnyVlmConfig.get_config_dict(folder)
        if config.get("model_type") != AnyVlmConfig.model_type:
            raise ValueError(
                f"{checkpoint} is a {config.get('model_type')!r} model, not a composed one. Pass the composed "
                "checkpoint first, and what it is made of with against=… (--against)."
            )
    return folder


def check_files(subject: Subject) -> Finding:
    if subject.checkpoint is None:
        raise NotChecked("a model in memory has no files")
    try:
        problems = loading_problems(subject.checkpoint)
    except PublishingError as error:
        raise CheckFailed(str(error)) from error
    if problems:
        raise CheckFailed(f"In {subject.checkpoint}: {'; '.join(problems)}.", {"problems": problems})
    return Finding("Configs, code, weights and tokenizer are there, and configs lead to the code.")


def load_model(subject: Subject, trust_remote_code: bool, **arguments) -> Finding:
    """Load the model into the subject: every weight finds its place, and none is left over."""
    model, info = AnyVlmForConditionalGeneration.from_pretrained(
        subject.checkpoint, trust_remote_code=trust_remote_code, output_loading_info=True, **arguments
    )
    left_over = sorted(info["unexpected_keys"])
    if left_over:
        named = ", ".join(left_over[:5]) + (f" and {len(left_over) - 5} more" if len(left_over) > 5 else "")
        raise CheckFailed(f"The model has no place for {len(left_over)} weights: {named}.", {"left_over": left_over})
    subject.model = model.eval()
    return Finding(
        f"Every weight has its place ({model.num_parameters():,} parameters, {model.dtype}).".replace("torch.", "")
    )


def load_processor(subject: Subject, trust_remote_code: bool) -> Finding:
    processor = AutoProcessor.from_pretrained(subject.checkpoint, trust_remote_code=trust_remote_code)
    if not isinstance(processor, AnyVlmProcessor):
        raise CheckFailed(f"AutoProcessor makes a {type(processor).__name__} of this folder, not an AnyVlmProcessor.")
    subject.processor = processor
    return Finding("The processor loads.")


def check_version(subject: Subject) -> Finding:
    """The code that wrote the checkpoint. Another version is worth knowing, and no failure."""
    if subject.checkpoint is None:
        raise NotChecked("a model in memory runs with the code that is imported")
    written = AnyVlmConfig.get_config_dict(subject.checkpoint)[0].get("code_version")
    figures = {"checkpoint": written, "in_use": CODE_VERSION}
    if written != CODE_VERSION:
        subject.notes.append(
            f"The checkpoint was written by anyvlm {written}, and is verified with the code of anyvlm {CODE_VERSION}; "
            "only the fresh process runs its own code."
        )
    return Finding(f"Written by anyvlm {written}; {CODE_VERSION} is in use.", figures)
