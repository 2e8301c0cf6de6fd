"""Compose two tiny parts of given types and say what works: the eight checks of the table of compatibility."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..composition.errors import CompositionError
from . import tiny_configs
from .composed_model import ComposedModel


#: What may be said of a pair or of a type.
WORKS = "works"
REFUSED = "refused"
FAILS = "fails"
NOT_TRIED = "not tried"

#: Number and meaning of each check, in the order they are run.
CHECKS = {
    "builds": "it is composed, and its logits are finite",
    "picture": "another picture changes the logits of the text after it, and of none before it",
    "gradients": "every part gets gradients, with gradient checkpointing the same ones; frozen parts get none",
    "cache": "greedy generation with a cache gives the same tokens as without",
    "padding": "a padded batch gives each sample its own logits and answer, or is refused where the language model by "
    "itself gives others",
    "save": "saved and loaded it gives the same logits and answers, and tied weights are still tied",
    "text": "text without a picture gives the language model's own logits",
    "embeddings": "the embeddings of words in place of image tokens give what the words' ids give",
}

#: What a pair may lack although it works: the part itself lacks it.
RIGHT_PADDING_ONLY = "right padding only"
LEFT_PADDING_ONLY = "left padding only"
NO_PADDING = "batch of one only"
#: Sides on which padding is refused -> mark.
PADDING = {("left",): RIGHT_PADDING_ONLY, ("right",): LEFT_PADDING_ONLY, ("left", "right"): NO_PADDING}
SHORT_PADDING = "padding of short texts only"
NO_CACHE = "no cache"
NO_CHECKPOINTING = "no gradient checkpointing: {}"
NO_GRID = "no grid"
MARKS = {
    NO_GRID: "the tower's features are no grid of places in the picture, such as the queries of a detector; each becomes "
    "a token all the same",
    RIGHT_PADDING_ONLY: "the language model by itself gives other results for a left-padded text, so train with right "
    "padding and generate one sample at a time",
    LEFT_PADDING_ONLY: "the language model by itself gives other results for a right-padded text",
    SHORT_PADDING: "the language model by itself gives other results for padded texts of this length; attention that "
    "picks some of the tokens picks padding too",
    NO_PADDING: "the language model by itself gives other results for any padded text",
    NO_CACHE: "the language model by itself generates other tokens with its cache than without, so it goes without",
    NO_CHECKPOINTING.format("tower"): "the tower's class in transformers does not support it",
    NO_CHECKPOINTING.format("language model"): "the language model's class in transformers does not support it",
}


@dataclass
class PairResult:
    """What was found about one pair.

    Args:
        vision, text: Model types.
        status: `"works"`, `"refused"` (with a reason, when composed), `"fails"`, or `"not tried"` for want of a
            library.
        marks: What a pair that works lacks, see `MARKS`.
        reason: Why it is refused, was not tried, or (the first of `failed`) fails.
        failed: Check -> what was found, for a pair that fails.
        details: Tokens of a picture, kind of input and layout of the features, parameters of each part.
        seconds: How long it took.
        combination: How the parts were joined, where it is not the usual way.
    """

    vision: str
    text: str
    combination: str | None = None
    status: str = WORKS
    marks: list[str] = field(default_factory=list)
    reason: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_pair(
    vision_type: str, text_type: str, seed: int = 0, combination: str | None = None, **composed_arguments
) -> PairResult:
    """Compose tiny parts of two types and run the checks. Whatever goes wrong is recorded, never raised.

    Args:
        combination: A name for `composed_arguments`, which are handed to `ComposedModel`.
    """
    result = PairResult(vision_type, text_type, combination)
    start = time.monotonic()
    torch.manual_seed(seed)
    try:
        composed = ComposedModel(
            tiny_configs.vision_config(vision_type),
            tiny_configs.text_config(text_type),
            tiny_configs.picture_size(vision_type),
            seed=seed,
            new_tokens=3,
            **composed_arguments,
        )
    except (CompositionError, ImportError) as error:
        missing = missing_library(error)
        result.status = NOT_TRIED if missing else REFUSED
        result.reason = missing or one_line(error)
    except Exception as error:  # noqa: BLE001 - that something unforeseen happened is what the table must say
        result.status = FAILS
        result.failed["builds"] = one_line(error)
    else:
        result.details = _details(composed)
        _run_checks(composed, result)
        result.status = FAILS if result.failed else WORKS
    if result.failed:
        check, found = next(iter(result.failed.items()))
        result.reason = f"{check}: {found}"
    result.seconds = round(time.monotonic() - start, 2)
    return result


def one_line(error: BaseException, limit: int = 400) -> str:
    """The message of an error in one line; with its class where that says more than the message."""
    message = " ".join(str(error).split())
    if not isinstance(error, (CompositionError, AssertionError)) or not message:
        message = f"{type(error).__name__}: {message}"
    return message if len(message) <= limit else message[: limit - 1] + "…"


def missing_library(error: BaseException | None) -> str | None:
    """What to install, if an error comes of a library that transformers needs for a type and that is not here."""
    while error is not None:
        if isinstance(error, ImportError):
            words = str(error).split()
            before = [word for word, after in zip(words, words[1:]) if after == "library"]
            return f"{before[0]} is not installed" if before else one_line(error)
        error = error.__cause__
    return None


def _details(composed: ComposedModel) -> dict[str, Any]:
    spec = composed.model.config.vision_tower_spec
    ids = composed.one_picture()["input_ids"]
    return {
        "tokens": int((ids == composed.model.config.image_token_id).sum()),
        "inputs": spec.get("inputs", "pixel_values"),
        "layout": spec["layout"],
        "parameters": {
            "vision_tower": composed.model.vision_tower.num_parameters(),
            "language_model": composed.model.language_model.num_parameters(),
        },
    }


def _run_checks(composed: ComposedModel, result: PairResult) -> None:
    supporting = composed.checkpointing_parts()
    rows, columns = composed.model.config.vision_tower_spec["grid"]
    if rows == 1 and columns > 1:
        result.marks.append(NO_GRID)
    result.marks += [NO_CHECKPOINTING.format(part) for part in ("tower", "language model") if part not in supporting]
    if not composed.uses_cache():
        result.marks.append(NO_CACHE)
    directory = Path(tempfile.mkdtemp(prefix="anyvlm-pair-"))
    checks: dict[str, Callable[[], None]] = {
        "builds": composed.check_forward_is_finite,
        "picture": composed.check_picture_changes_logits,
        "gradients": composed.check_gradients,
        "cache": composed.check_cached_generation_equals_uncached,
        "padding": lambda: _check_padding(composed, result),
        "save": lambda: composed.check_save_and_load(directory, resize=False),
        "text": composed.check_text_only_equals_bare_language_model,
        "embeddings": composed.check_embeddings_equal_ids,
    }
    try:
        for name, check in checks.items():
            try:
                check()
            except Exception as error:  # noqa: BLE001 - see above
                result.failed[name] = one_line(error)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _check_padding(composed: ComposedModel, result: PairResult) -> None:
    refused = composed.check_padding()
    if refused:
        result.marks.append(PADDING[tuple(refused)])
    if composed.pads_short_texts_only:
        result.marks.append(SHORT_PADDING)
