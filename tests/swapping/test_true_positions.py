"""Where features lie, against crops and paddings computed by hand and by Pillow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import compose
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from anyvlm.configuration.image_views import plan_views
from anyvlm.modeling.feature_alignment import resample_features
from anyvlm.processing.view_cutting import cut_views
from anyvlm.swapping.true_positions import Places, TruePositions, interpolation


_NORM = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.27, 0.28]}
_SPEC = {"inputs": "pictures", "any_size": False, "patch": None, "image_size": [32, 32], "grid": [4, 4]}


def _positions(image_processor, image_views=None, **spec) -> TruePositions:
    return TruePositions(
        SimpleNamespace(vision_tower_spec={**_SPEC, **spec}, image_views=image_views, image_processor=image_processor)
    )


def _close(found, expected, tolerance=0.003):
    np.testing.assert_allclose(found.numpy(), expected, atol=tolerance)


def _even(length: int, start=0.0, end=1.0) -> np.ndarray:
    return start + (end - start) * (np.arange(length) + 0.5) / length


@pytest.mark.parametrize("scale", [0.4, 1, 7])
def test_crop_of_the_middle(scale):
    """CLIP: the shorter side to 32 pixels, then the middle: of 100 x 60 pixels the middle 60."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **_NORM)
    height, width = int(60 * scale), int(100 * scale)
    (places,) = _positions(processor)(height, width, [(4, 4)])
    _close(places.y, _even(4))
    resized = int(32 * width / height)
    left = (resized - 32) // 2 / resized
    _close(places.x, _even(4, left, left + 32 / resized))
    (tall,) = _positions(processor)(width, height, [(4, 4)])
    _close(tall.y, _even(4, left, left + 32 / resized))


def test_shorter_side_larger_than_the_crop():
    """ResNet's usual 256 and 224: a seventh is cut off even from a square."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **_NORM)
    (places,) = _positions(processor, image_size=[224, 224])(28, 28, [(7, 7)])
    _close(places.y, _even(7, 1 / 16, 15 / 16))
    _close(places.x, _even(7, 1 / 16, 15 / 16))


@pytest.mark.parametrize("size", [(28, 28), (400, 90), (31, 1200)])
def test_squashed(size):
    """SigLIP: all of it, whatever its proportions."""
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    (places,) = _positions(processor)(*size, [(4, 8)])
    _close(places.y, _even(4))
    _close(places.x, _even(8))


def test_padded_to_a_square():
    """LLaVA: 100 x 50 pixels in the middle of a square: of four rows the first and the last show nothing."""
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_pad=True, **_NORM
    )
    (places,) = _positions(processor)(50, 100, [(4, 4)])
    _close(places.x, _even(4))
    assert places.y.isnan().tolist() == [True, False, False, True]
    _close(places.y[1:3], [0.25, 0.75])


def test_not_normalised_and_by_itself_normalised():
    plain = SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False)
    (places,) = _positions(plain)(64, 64, [(4, 4)])
    _close(places.y, _even(4))

    class OwnNorm(SiglipImageProcessorPil):
        def preprocess(self, images, **kwargs):
            outputs = super().preprocess(images, **kwargs)
            pixels = outputs["pixel_values"]
            outputs["pixel_values"] = (pixels - pixels.mean((1, 2, 3), True)) / (
                pixels.std((1, 2, 3), keepdim=True) + 1
            )
            return outputs

    (places,) = _positions(OwnNorm(size={"height": 32, "width": 32}))(64, 64, [(4, 4)])
    _close(places.y, _even(4))


@pytest.mark.parametrize(
    "views",
    [
        {"type": "tiles", "layout": "anyres", "tile_size": [32, 32], "pinpoints": [[32, 64], [64, 32], [64, 64]]},
        {"type": "tiles", "layout": "dynamic", "tile_size": [32, 32], "min_tiles": 1, "max_tiles": 6, "whole": True},
    ],
)
def test_views(views):
    """Of each view, a ramp that was cut the same way shows the coordinates."""
    model, processor = compose(views=views)
    height, width = 60, 100
    plan = plan_views(processor.image_views, height, width)
    assert len(plan.views) > 2
    found = TruePositions(processor)(height, width, [(4, 4)] * len(plan.views))
    for axis, size in (("y", height), ("x", width)):
        ramp = np.arange(size, dtype=np.uint8)
        ramp = np.repeat(ramp[:, None], width, 1) if axis == "y" else np.repeat(ramp[None], height, 0)
        picture = Image.fromarray(np.stack([ramp, np.full_like(ramp, 255), ramp], -1))
        for view, places in zip(cut_views(picture, plan), found):
            pixels = np.asarray(view.resize((32, 32)), dtype=float)
            middles = pixels.mean(0 if axis == "x" else 1) if axis == "y" else pixels.mean(0)
            shown = middles[:, 1] > 250
            coordinates = (middles[:, 0] + 0.5) / size
            for part, place in enumerate(getattr(places, axis).tolist()):
                own = slice(8 * part, 8 * part + 8)
                if shown[own].all():
                    assert place == pytest.approx(coordinates[own].mean(), abs=0.02)


def test_composed_models():
    """A processor of each way of taking pictures; patches show the whole picture."""
    for tower in ("resnet", "sam_vision_model", "siglip2_vision_model", "qwen2_vl_vision", "pixtral", "videomae"):
        model, processor = compose(vision=tower)
        inputs = processor(text="<image>", images=Image.new("RGB", (80, 50)), return_tensors="pt")
        assert len(inputs["pixel_values"])
        spec = model.config.vision_tower_spec
        (places,) = TruePositions(processor)(50, 80, [tuple(spec["grid"])])
        if spec["grid"][0] == 1:
            assert places is None
        else:
            assert places.grid == tuple(spec["grid"])
            assert not places.y.isnan().any()
            assert bool((places.y[1:] > places.y[:-1]).all())


def test_no_places():
    (places,) = _positions(SiglipImageProcessorPil(size={"height": 32, "width": 32}))(40, 40, [(1, 17)])
    assert places is None


def test_measured_once_for_a_size():
    calls = []

    class Counting(SiglipImageProcessorPil):
        def preprocess(self, images, **kwargs):
            calls.append(len(images))
            return super().preprocess(images, **kwargs)

    positions = _positions(Counting(size={"height": 32, "width": 32}))
    for size in ((40, 50), (40, 50), (50, 40)):
        positions(*size, [(4, 4)])
    assert len(calls) == 2


def test_resampled_as_the_features_are():
    places = Places(torch.tensor([0.1, 0.3, 0.5, 0.7]).double(), torch.tensor([0.2, 0.6]).double())
    grown = places.resampled((2, 4))
    both = torch.stack(torch.meshgrid(places.y, places.x, indexing="ij"), -1).view(1, 8, 2)
    expected = resample_features(both, (4, 2), (2, 4))[0].view(2, 4, 2)
    torch.testing.assert_close(grown.y, expected[:, 0, 0].double())
    torch.testing.assert_close(grown.x, expected[0, :, 1].double())


def test_interpolation():
    old = torch.tensor(_even(8))
    weights, reached = interpolation(old, old)
    torch.testing.assert_close(weights, torch.eye(8).double())
    assert reached.all()
    # A linear function is linear afterwards, at finer places and at coarser ones inside.
    fine, reached = interpolation(old, torch.tensor(_even(16)))
    assert reached.all()
    torch.testing.assert_close((fine @ old)[1:-1], torch.tensor(_even(16))[1:-1])
    coarse, reached = interpolation(old, torch.tensor(_even(2)))
    torch.testing.assert_close(coarse.sum(1), torch.ones(2).double())
    assert (coarse @ old).tolist() == pytest.approx([0.25, 0.75], abs=0.06)
    # The old path saw the middle only.
    middle = torch.tensor(_even(4, 0.25, 0.75))
    weights, reached = interpolation(middle, torch.tensor(_even(8)))
    assert reached.tolist() == [False, False, True, True, True, True, False, False]
    torch.testing.assert_close((weights @ middle)[2:6], torch.tensor([0.3125, 0.4375, 0.5625, 0.6875]).double())
    padded = torch.cat([torch.tensor([torch.nan]).double(), middle])
    weights, reached = interpolation(padded, torch.tensor([0.1, 0.5, torch.nan]).double())
    assert reached.tolist() == [False, True, False]
    assert weights[1, 0] == 0 and float(weights[1].sum()) == pytest.approx(1)
