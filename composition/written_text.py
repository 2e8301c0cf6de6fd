"""What is written around and between the tokens of a picture, and whether a tokenizer knows it."""

from transformers import PreTrainedTokenizerBase

from ..configuration.image_views import plan_views
from ..processing.image_text import check_image_text, fill_places, picture_prefix
from .errors import CompositionError
from .views import TRIED_EDGES


def repeated_token(image_text: dict | None, image_token: str) -> str:
    """What is repeated for the tokens of a picture, and so is one token of the tokenizer."""
    return (image_text or {}).get("token", image_token)


def check_settings(image_text: dict | None) -> None:
    """What can be said before anything is loaded.

    Raises:
        CompositionError: unknown keys, or what is no text.
    """
    try:
        check_image_text(image_text)
    except ValueError as error:
        raise CompositionError(str(error)) from error


def check_written(
    image_text: dict | None,
    image_token: str,
    tokenizer: PreTrainedTokenizerBase,
    image_views: dict | None,
    fusion: str,
) -> None:
    """Refuse an `image_text` that these views cannot have or that the tokenizer would lose.

    Only the repeated token is ever added to a tokenizer: which pieces of the other strings were meant as tokens cannot be
    known, and as plain text they would mean something else.

    Raises:
        CompositionError: naming the string.
    """
    token = repeated_token(image_text, image_token)
    try:
        check_image_text(image_text, image_views, fusion)
    except ValueError as error:
        raise CompositionError(str(error)) from error
    for key, template in (image_text or {}).items():
        if key != "token" and token in template:
            raise CompositionError(
                f"image_text[{key!r}] has {token!r} in it, which stands for the tokens of a picture. Leave it out: "
                "{tokens} is where they belong."
            )
        for written in _fillings(template, image_views) if key != "token" else ():
            ids = tokenizer.encode(written, add_special_tokens=False)
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise CompositionError(
                    f"image_text[{key!r}] writes {written!r}, which {type(tokenizer).__name__} does not know. Add what is "
                    "meant to be a token, and pass the tokenizer: tokenizer.add_special_tokens("
                    '{"additional_special_tokens": […]}, replace_extra_special_tokens=False).'
                )


def _fillings(template: str, image_views: dict | None) -> list[str]:
    """A string as it is written for each place that a tile can have, without the tokens."""
    grids = {(1, 1)}
    for height in TRIED_EDGES:
        for width in TRIED_EDGES:
            plan = plan_views(image_views, height, width)
            grids.add((plan.rows, plan.columns))
    places = sorted(
        {(row, column, columns) for rows, columns in grids for row in range(max(rows, 1)) for column in range(columns)}
    )
    written = (
        fill_places(picture_prefix({"prefix": template}, column), row + 1, column + 1, row * columns + column + 1, "")
        for row, column, columns in places
    )
    return list(dict.fromkeys(written))
