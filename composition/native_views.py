"""Pictures of their own size and proportions, within a budget of tokens: which towers take them, and in what steps."""

from ..configuration.token_grids import token_grid
from ..modeling.picture_inputs import PICTURE_INPUTS
from .errors import CompositionError


#: A budget where none is given: 512 x 512 pixels with patches of 16, as many as the largest NaFlex SigLIP 2 was trained on.
_MAX_TOKENS = 1024
_KEYS = ("type", "max_tokens", "min_tokens")
#: Grids by which is seen how many features along each side become one token.
_GRIDS = ((1, 1), (2, 3), (7, 5), (40, 41))
_LARGEST_FACTOR = 64


def native_settings(settings: dict, spec: dict, projector_config: dict) -> dict:
    """`image_views` of type `"native"`, with every key.

    Args:
        settings: `max_tokens` and `min_tokens`, both optional.
        spec: The `vision_tower_spec`.
        projector_config: With its `type`.

    Raises:
        CompositionError: the tower takes pictures of one size, the projector makes more tokens than the budget, or a
            setting is unknown.
    """
    unknown = [key for key in settings if key not in _KEYS]
    if unknown:
        raise CompositionError(
            f'views of type "native" have no {", ".join(map(repr, unknown))}. They take max_tokens and min_tokens.'
        )
    if not spec["any_size"] or not PICTURE_INPUTS[spec["inputs"]].from_processor:
        height, width = spec["image_size"]
        raise CompositionError(
            f'This vision tower takes pictures of {height}x{width} pixels, so views="native" cannot be used. Use '
            'views="tiles" or views="slices", which show large pictures in several views of that size; or a tower that '
            "takes patches of any size, such as siglip2_vision_model (NaFlex), qwen2_5_vl_vision or minicpmv4_6_vision."
        )
    found = {"max_tokens": _MAX_TOKENS, "min_tokens": 1, **settings}
    factor = _features_along_a_token(projector_config)
    if factor is None:
        # Queries: their number does not follow from the picture, so the budget is for what they look at.
        fixed = max(_num_tokens(projector_config, grid) for grid in _GRIDS)
        if fixed > found["max_tokens"]:
            raise CompositionError(
                f"Projector {projector_config['type']!r} makes up to {fixed} tokens of any picture, more than max_tokens="
                f"{found['max_tokens']}. Raise max_tokens, which with this projector is a budget of features, or let the "
                "projector make fewer."
            )
    edge = spec["patch"]["size"] * spec["merge_size"] * (factor or 1)
    return {**found, "view_size": None, "cell_size": edge}


def _features_along_a_token(projector_config: dict) -> int | None:
    """Features along each edge of the square that becomes one token; `None` if the number of tokens is another rule's."""
    for factor in range(1, _LARGEST_FACTOR + 1):
        try:
            if all(
                token_grid(projector_config, (factor * rows, factor * columns)) == (rows, columns)
                for rows, columns in _GRIDS
            ):
                return factor
        except ValueError:  # a grid that this projector cannot take
            continue
    return None


def _num_tokens(projector_config: dict, grid: tuple[int, int]) -> int:
    rows, columns = token_grid(projector_config, grid)
    return rows * columns
