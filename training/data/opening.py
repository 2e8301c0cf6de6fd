"""Everything that a recipe says of its data, in one call: read it, put examples before samples, open and change pictures."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin

from .augmentation import Augmentation
from .few_shot import CHOICES, FewShot
from .lengths import add_lengths
from .samples import OpenedSamples, OpenedStream, open_pictures
from .sources import load_training_data


#: What a recipe's `data` may say beside its sources.
OPENING_KEYS = ("augmentation", "few_shot", "judge_after", "value_range")
_FEW_SHOT_KEYS = ("examples", "shots", "choose", "label")
#: Rows that are examples at most, where the training data itself is: they are held in memory.
_MOST_EXAMPLES = 10_000


def open_training_data(
    spec: Any,
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    split: str = "train",
    report: str | os.PathLike | None = None,
    training: bool = True,
    lengths_for: ProcessorMixin | None = None,
) -> OpenedSamples | OpenedStream:
    """`load_training_data`, then `open_pictures`.

    Args:
        spec: For `load_training_data`.
        settings: `augmentation` (`true`, or arguments of `Augmentation`), `few_shot` (`shots`, `choose`, `label`, and
            `examples`, described as `spec`; default: the data itself), `max_unreadable`, `judge_after`, `value_range`.
        training: Else there is no augmentation, and a stream ends; examples stay: the model is asked as it was trained.
        lengths_for: A processor: rows get a column `length`, for batches of equal lengths.

    Raises:
        ValueError: as these do, and for settings that `opening_errors` lists.
    """
    settings = settings or {}
    errors = opening_errors(settings)
    if errors:
        raise ValueError("\n".join(text for _, text in errors))
    rows = load_training_data(spec, seed=seed, split=split)
    is_stream = not hasattr(rows, "__len__")
    if lengths_for is not None and not is_stream:
        rows = add_lengths(rows, lengths_for)
    few_shot = None
    if settings.get("few_shot"):
        wanted = dict(settings["few_shot"])
        given = wanted.pop("examples", None)
        if given is None and is_stream:
            raise ValueError("few_shot: streamed data needs `examples` of its own: a file with some samples.")
        examples = rows if given is None else load_training_data(given, seed=seed, split=split)
        if not hasattr(examples, "__len__"):
            examples = list(examples)
        elif len(examples) > _MOST_EXAMPLES:
            examples = examples.shuffle(seed=seed).select(range(_MOST_EXAMPLES))
        wanted["shots"] = (
            tuple(wanted["shots"]) if isinstance(wanted.get("shots"), list) else wanted.get("shots", (0, 4))
        )
        few_shot = FewShot(examples, seed=seed, **wanted)
    opening = {key: settings[key] for key in ("max_unreadable", "judge_after") if settings.get(key) is not None}
    if settings.get("value_range") is not None:
        opening["value_range"] = tuple(settings["value_range"])
    return open_pictures(
        rows,
        augmentation=Augmentation.from_settings(settings.get("augmentation")) if training else None,
        few_shot=few_shot,
        report=report,
        seed=seed,
        repeat=training,
        **opening,
    )


def opening_errors(settings: Mapping[str, Any]) -> list[tuple[tuple, str]]:
    """All that is wrong with what is said beside the sources: `(keys that lead there, sentence)`."""
    errors: list[tuple[tuple, str]] = []
    try:
        Augmentation.from_settings(settings.get("augmentation"))
    except ValueError as error:
        errors.append((("augmentation",), str(error).removeprefix("augmentation: ")))
    value_range = settings.get("value_range")
    if value_range is not None and not (_numbers(value_range) and value_range[0] < value_range[1]):
        errors.append(
            (("value_range",), f"value_range is what becomes black and white, [low, high], not {value_range!r}")
        )
    judge_after = settings.get("judge_after")
    if judge_after is not None and (
        isinstance(judge_after, bool) or not isinstance(judge_after, int) or judge_after < 1
    ):
        errors.append((("judge_after",), f"judge_after is a number of pictures, not {judge_after!r}"))
    few_shot = settings.get("few_shot")
    if few_shot is None:
        return errors
    if not isinstance(few_shot, Mapping):
        return [*errors, (("few_shot",), f"few_shot has some of {', '.join(_FEW_SHOT_KEYS)} below it")]
    for key in few_shot:
        if key not in _FEW_SHOT_KEYS:
            errors.append((("few_shot", key), f"{key!r} is not known; few_shot has {', '.join(_FEW_SHOT_KEYS)}"))
    # Nearest examples need the features of all pictures first: `FewShot` has them.
    if few_shot.get("choose", "random") not in CHOICES[:2]:
        errors.append((("few_shot", "choose"), f"choose is {' or '.join(CHOICES[:2])}"))
    shots = few_shot.get("shots", 0)
    if not (isinstance(shots, int) and shots >= 0 or _numbers(shots) and 0 <= shots[0] <= shots[1]):
        errors.append((("few_shot", "shots"), f"shots is a number, or the least and the most, not {shots!r}"))
    return errors


def _numbers(pair: Any) -> bool:
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
    return is_pair and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in pair)
