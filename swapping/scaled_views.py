"""The views of a model for a tower of another picture size."""

from typing import Any


#: Settings in pixels, which belong to the size of the tower's pictures.
_PIXELS = ("view_size", "tile_size", "pinpoints", "longest_edge", "min_crop_size", "slice_size")
#: Settings that follow from the tower's patches, measured again for another tower.
_MEASURED = ("cell_size", "cell_tokens", "cut_patches", "unit")


def scaled_views(image_views: dict | None, before: tuple[int, int], after: tuple[int, int]) -> dict | None:
    """Settings for `complete_views` that cut a picture into as many views for the new tower as for the old one.

    Args:
        image_views: As in the config of the model.
        before, after: Pixels `(height, width)` of the old and of the new tower's pictures.
    """
    if image_views is None:
        return None
    settings = {key: value for key, value in image_views.items() if key not in _MEASURED}
    if image_views["type"] == "native":
        settings.pop("view_size", None)
        return settings
    for key in _PIXELS:
        if settings.get(key) is not None:
            settings[key] = _scaled(settings[key], before, after)
    if settings.get("view_size") is None:
        settings.pop("view_size", None)
    return settings


def _scaled(value: Any, before: tuple[int, int], after: tuple[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):
            return [_scaled(entry, before, after) for entry in value]
        return [round(length * new / old) for length, old, new in zip(value, before, after)]
    # One edge stands for both.
    return round(value * max(after) / max(before))
