"""Pictures without answers beside those with: `unlabelled` in a recipe's `data`, for the loss `semi_supervised`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


#: Keys of `data` that are about pictures without answers.
UNLABELLED_KEYS = ("unlabelled", "unlabelled_per_sample")
#: How many come with each sample that has an answer, where a recipe does not say.
PER_SAMPLE = 2
#: The loss that they are for.
LOSS = "semi_supervised"

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def is_picture_folder(source: Any) -> bool:
    """Whether it is `{pictures: FOLDER, question: …}`: nothing but pictures, all with one question."""
    return isinstance(source, Mapping) and "pictures" in source


def picture_rows(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Samples without answers, of all pictures below a folder.

    Raises:
        ValueError: there are none.
    """
    files = sorted(path for path in Path(source["pictures"]).rglob("*") if path.suffix.lower() in _PICTURES)
    if not files:
        raise ValueError(f"There is no picture below {source['pictures']}.")
    question = [{"type": "image"}, {"type": "text", "text": source.get("question", "")}]
    return [{"messages": [{"role": "user", "content": question}], "images": [str(path)]} for path in files]


def picture_folder_errors(source: Mapping[str, Any]) -> list[tuple[tuple, str]]:
    """What is wrong with such a folder: `(keys that lead there, sentence)`."""
    errors: list[tuple[tuple, str]] = []
    unknown = ", ".join(sorted(source.keys() - {"pictures", "question"}))
    if unknown:
        errors.append(((), f"{unknown}: beside `pictures` there is only `question`"))
    if not Path(str(source["pictures"])).is_dir():
        errors.append((("pictures",), f"there is no folder {source['pictures']}"))
    return errors


def unlabelled_errors(data: Mapping[str, Any], losses: Iterable[str]) -> list[tuple[tuple, str]]:
    """What is wrong with `unlabelled` and `unlabelled_per_sample`: `(keys that lead there, sentence)`."""
    errors: list[tuple[tuple, str]] = []
    number = data.get("unlabelled_per_sample")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        errors.append((("unlabelled_per_sample",), f"{number!r} is not a whole number from 1 on"))
    source = data.get("unlabelled")
    if source is None:
        return errors
    if LOSS not in losses:
        errors.append((("unlabelled",), f"no loss of this stage learns from them; add {LOSS} to its `losses`"))
    for other in ("domains", "few_shot"):
        if data.get(other):
            errors.append((("unlabelled",), f"`{other}` and this exclude each other in one stage; keep one"))
    if is_picture_folder(source):
        errors += [(("unlabelled", *keys), text) for keys, text in picture_folder_errors(source)]
    return errors


def with_max_length(losses: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    """A stage's losses; the one that learns from answers of its own is told how long a sample may be."""
    losses = dict(losses)
    if LOSS in losses:
        written = losses[LOSS]
        settings = dict(written) if isinstance(written, Mapping) else {"weight": written}
        losses[LOSS] = {"max_length": max_length, **settings}
    return losses
