"""Cut pictures into the views that `configuration/image_views.py` has planned."""

from PIL import Image

from ..configuration.tile_layouts import PictureViews, View


def cut_views(picture: Image.Image, plan: PictureViews, resample: int | None = None) -> list[Image.Image]:
    """The views of one RGB picture, each a picture of the planned size.

    Args:
        resample: Pillow's resampling filter, that of the image processor; `None` for bilinear, which image processors
            take for it.
    """
    resample = Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))
    # Views of one picture share their first steps.
    stages: dict[tuple, Image.Image] = {((), None): picture}
    return [_cut(stages, view, resample) for view in plan.views]


def _cut(stages: dict[tuple, Image.Image], view: View, resample: Image.Resampling) -> Image.Image:
    resized = _resized(stages, view.resizes, resample)
    if view.canvas is not None:
        key = (view.resizes, view.canvas)
        if key not in stages:
            stages[key] = _laid_on_canvas(resized, view)
        resized = stages[key]
    if view.box is None:
        return resized
    top, left, bottom, right = view.box
    part = resized.crop((left, top, right, bottom))
    height, width = view.size
    return part if part.size == (width, height) else part.resize((width, height), resample=resample)


def _resized(stages: dict[tuple, Image.Image], resizes: tuple, resample: Image.Resampling) -> Image.Image:
    if (resizes, None) not in stages:
        before = _resized(stages, resizes[:-1], resample)
        height, width = resizes[-1]
        stages[resizes, None] = before.resize((width, height), resample=resample)
    return stages[resizes, None]


def _laid_on_canvas(picture: Image.Image, view: View) -> Image.Image:
    height, width = view.canvas
    canvas = Image.new(picture.mode, (width, height), view.background if picture.mode == "RGB" else 0)
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas
