"""The text that stands for a picture: its image tokens, and what is written around and between them.

`image_text` in the processor's config is a dict of strings, all optional; `None` means the tokens alone. In each, `{tokens}`
stands for the tokens of one view and `{row}`, `{column}`, `{index}` for the place of a tile, counted from 1:

| key | meaning | such as |
|---|---|---|
| `token` | what is repeated, if not the token of the user's text | Gemma 3's `<image_soft_token>` |
| `prefix` | before a picture; `{number}` counts the pictures of a text from 0 | MiniCPM-V's `<image_id>0</image_id>` |
| `start`, `end` | around all views of a picture | InternVL's `<img>`, `</img>` |
| `whole` | the whole picture beside tiles | Idefics3's `\\n<fake><global-img>{tokens}<fake>` |
| `whole_alone` | the whole picture without tiles; default: as `whole` | Gemma 3 |
| `tile` | a tile | Idefics3's `<fake><row_1_col_1>{tokens}` |
| `tile_separator` | between tiles of one row | Gemma 3's space |
| `row_separator` | between rows of tiles | MiniCPM-V's line break |
| `row_end` | after each row of tiles | Idefics3's line break |
| `line_end` | after each row of tokens within a view | Mistral's `[IMG_BREAK]` |
| `last_line_end` | in its place after a view's last row | Mistral's `[IMG_END]` |
| `boundary` | begins and ends a picture, once between two; a space parts it from a word | Idefics2's `<fake>` |
"""

from ..configuration.image_tokens import Grid
from ..configuration.image_views import has_newline
from ..configuration.tile_layouts import PictureViews


KEYS = (
    "token",
    "prefix",
    "start",
    "end",
    "whole",
    "whole_alone",
    "tile",
    "tile_separator",
    "row_separator",
    "row_end",
    "line_end",
    "last_line_end",
    "boundary",
)

_TOKENS = "{tokens}"


def check_image_text(image_text: dict | None, image_views: dict | None = None, fusion: str = "embed") -> None:
    """Refuse unknown keys, what is no text, templates without tokens, and text where these views or this fusion leave no
    place for it.

    Raises:
        ValueError: naming them.
    """
    unknown = sorted(set(image_text or {}) - set(KEYS))
    if unknown:
        raise ValueError(f"Unknown keys in image_text: {', '.join(unknown)}. Known ones: {', '.join(KEYS)}.")
    for key, template in (image_text or {}).items():
        if not isinstance(template, str):
            raise ValueError(f"image_text[{key!r}] must be a text, not {template!r}. Leave it out for none.")
        if key in ("whole", "whole_alone", "tile") and _TOKENS not in template:
            raise ValueError(f"image_text[{key!r}] must have {_TOKENS} where the tokens of the view belong.")
    if has_newline(image_views) and has_text_between_views(image_text):
        raise ValueError(
            "image_text writes something between the views of a picture, whose tokens image_views joins into one map "
            '("join": "spatial"). Leave out either.'
        )
    if fusion != "embed" and has_text_between_views(image_text):
        raise ValueError(
            f"With fusion={fusion!r} a picture has one token in the text, so image_text can write nothing between its "
            'views. Leave out all but "token", "prefix", "start", "end" and "boundary".'
        )


def has_text_between_views(image_text: dict | None) -> bool:
    """Whether something is written between tokens of one picture, so that they are not one run."""
    return bool(image_text) and bool(set(image_text) - {"token", "prefix", "start", "end", "boundary"})


def joined_text(image_text: dict | None, token: str, num_tokens: int) -> str:
    """A picture whose tokens are one run."""
    image_text = image_text or {}
    return image_text.get("start", "") + token * num_tokens + image_text.get("end", "")


def picture_text(image_text: dict | None, token: str, plan: PictureViews, grids: list[Grid]) -> str:
    """A picture whose views have tokens in `grids`, each view with what is written around it."""
    image_text = image_text or {}
    whole = image_text.get("whole", _TOKENS)
    if plan.rows == 0:
        whole = image_text.get("whole_alone", whole)
    parts: list[str] = []
    tile = 0
    for view, grid in enumerate(grids):
        tokens = view_tokens(image_text, token, grid)
        if view == plan.whole:
            parts.append(whole.replace(_TOKENS, tokens))
            continue
        row, column = divmod(tile, plan.columns)
        tile += 1
        if column:
            parts.append(image_text.get("tile_separator", ""))
        elif row:
            parts.append(image_text.get("row_separator", ""))
        parts.append(fill_places(image_text.get("tile", _TOKENS), row + 1, column + 1, tile, tokens))
        if column + 1 == plan.columns:
            parts.append(image_text.get("row_end", ""))
    return image_text.get("start", "") + "".join(parts) + image_text.get("end", "")


def view_tokens(image_text: dict, token: str, grid: Grid) -> str:
    """The tokens of one view, row by row."""
    rows, columns = grid
    line_end = image_text.get("line_end", "")
    if not line_end:
        return token * (rows * columns)
    last = image_text.get("last_line_end", line_end)
    return line_end.join([token * columns] * rows) + last


def share_boundaries(image_text: dict | None, text: str, image_token: str, pictures: list[str]) -> list[str]:
    """What stands for the pictures of one text, with the `boundary` between neighbours once, and a space before a word."""
    boundary = (image_text or {}).get("boundary")
    if not boundary:
        return pictures
    around, shared = text.split(image_token), []
    for index, picture in enumerate(pictures):
        if index and not around[index]:
            picture = picture.removeprefix(boundary)
        following = around[index + 1][:1]
        shared.append(picture + " " if following.strip() and following != "<" else picture)
    return shared


def picture_prefix(image_text: dict | None, number: int) -> str:
    """What stands before the picture with this number, counted from 0 in each text."""
    return (image_text or {}).get("prefix", "").replace("{number}", str(number))


def fill_places(template: str, row: int, column: int, index: int, tokens: str) -> str:
    """What is written for the tile at a place, counted from 1."""
    for name, value in (("{row}", row), ("{column}", column), ("{index}", index), (_TOKENS, tokens)):
        template = template.replace(name, str(value))
    return template
