"""A new tower's projector in closed form."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from tiny_parts import compose, vision_config
from transformers import CLIPImageProcessorPil

import anyvlm
from anyvlm.swapping.alignment import align
from anyvlm.swapping.kept_views import KeptViews
from anyvlm.swapping.paired_features import AlignmentError, PairedFeatures, PairedView
from anyvlm.swapping.picture_paths import PicturePath
from anyvlm.swapping.projector_fit import FeatureFit, best_nearby
from anyvlm.swapping.ridge import RidgeSums, penalty
from anyvlm.swapping.vision_swap import swap_vision_tower


def _pictures(number: int, size=(48, 40), seed=0) -> list[Image.Image]:
    """Smooth ones, so that what is at a place and beside it is alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (number, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC) for picture in small]


def _swapped(old="dinov2", new="clip_vision_model", **kwargs):
    model, processor = compose(old, **kwargs)
    return (model, processor, *swap_vision_tower(model, processor, vision_config(new)))


def _tokens(model, processor, pictures) -> torch.Tensor:
    path = PicturePath(model, processor)
    return torch.stack(path.tokens(path.inputs(pictures))).float()


def _state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def related_towers():
    """A tower, and one that gives a linear function of its features: the last norm scales and mixes them."""
    model, processor = compose("dinov2", projector={"type": "mlp", "hidden_features": 48})
    tower = copy.deepcopy(model.vision_tower)
    order = torch.randperm(32)
    with torch.no_grad():
        tower.layernorm.weight.mul_(torch.rand(32) + 0.5)
        tower.layernorm.bias.add_(torch.randn(32))

    class Shuffled(torch.nn.Module):
        def forward(self, features):
            return torch.nn.functional.layer_norm(features, (32,), eps=1e-6)[..., order] * 2 + 1

    tower.layernorm = Shuffled()
    return model, processor, tower


def test_a_linear_relation_is_found(related_towers):
    model, processor, tower = related_towers
    new_model, new_processor = compose("dinov2", projector={"type": "mlp", "hidden_features": 48})
    new_model.vision_tower = tower
    result = align(model, processor, new_model, new_processor, _pictures(40), progress=False)
    assert result["explained_variance"] > 0.9999
    unseen = _pictures(8, seed=1)
    old, new = _tokens(model, processor, unseen), _tokens(new_model, new_processor, unseen)
    assert float((old - new).norm() / old.norm()) < 0.01
    # The gap is measured with the tokens of both.
    gap = result["modality_gap"]
    assert gap["before"]["distance"] == pytest.approx(gap["after"]["distance"], rel=0.01)


def test_linear_projector_as_scikit_learn():
    model, processor, new_model, new_processor = _swapped(projector="linear")
    pictures = _pictures(30)
    before = _state(new_model)
    result = align(model, processor, new_model, new_processor, pictures, progress=False, batch_size=7)
    assert result["pictures"] == 30 and result["held_out_pictures"] == 6
    assert {(entry["target"], entry["drawn_to"]) for entry in result["candidates"]} == {
        ("features", "zero"),
        ("features", "identity"),
        ("tokens", "zero"),
    }
    best = max(result["candidates"], key=lambda entry: entry["explained_variance"])
    assert (result["target"], result["regularisation"]) == (best["target"], best["regularisation"])

    old, new = PicturePath(model, processor), PicturePath(new_model, new_processor)
    x = torch.stack(new.features(new.inputs(pictures))[0]).double().numpy()
    y = torch.stack(old.features(old.inputs(pictures))[0]).double()
    y = torch.nn.functional.linear(y, model.multi_modal_projector.linear.weight.double()).detach().numpy()
    bias = model.multi_modal_projector.linear.bias.double().detach().numpy()
    for entry in result["candidates"]:
        if entry["drawn_to"] == "identity":
            continue
        held_out = np.arange(30) % 5 == 0
        for rows, is_final in ((~held_out, False), (np.ones(30, dtype=bool), True)):
            sums = RidgeSums(x.shape[-1], y.shape[-1])
            sums.update(torch.tensor(x[rows].reshape(-1, x.shape[-1])), torch.tensor(y[rows].reshape(-1, y.shape[-1])))
            oracle = Ridge(alpha=penalty(sums, entry["regularisation"]), solver="svd")
            oracle.fit(x[rows].reshape(-1, x.shape[-1]), y[rows].reshape(-1, y.shape[-1]))
            if is_final and entry is best:
                layer = new_model.multi_modal_projector.linear
                np.testing.assert_allclose(layer.weight.detach(), oracle.coef_, rtol=1e-3, atol=1e-5)
                np.testing.assert_allclose(layer.bias.detach(), oracle.intercept_ + bias, rtol=1e-3, atol=1e-5)
            elif not is_final:
                found = oracle.predict(x[held_out].reshape(-1, x.shape[-1]))
                share = r2_score(y[held_out].reshape(found.shape), found, multioutput="variance_weighted")
                assert entry["explained_variance"] == pytest.approx(share, abs=1e-5)
    changed = [name for name, tensor in new_model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert all(name.startswith("multi_modal_projector") for name in changed) and changed


@pytest.mark.parametrize(
    "projector",
    [
        "mlp",
        {"type": "mlp", "norm": "layer_norm", "gated": True, "hidden_act": "silu"},
        "pixel_shuffle",
        {"type": "avg_pool", "pool_last": True},
        "conv",
        "patch_merger",
        "resampler",
        {
            "type": "qformer",
            "num_queries": 4,
            "qformer_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
        },
        "identity",
    ],
    ids=lambda projector: projector if isinstance(projector, str) else projector["type"],
)
def test_projector_types(projector, tmp_path):
    """Each predicts old tokens of unseen pictures as well as it says, and better than before."""
    model, processor, new_model, new_processor = _swapped(projector=projector, text="llama")
    if projector == "identity":
        assert model.config.projector_config["in_features"] == 32
    unseen = _pictures(20, seed=1)
    wanted = _tokens(model, processor, unseen)
    old_state, before = _state(model), _state(new_model)
    start = r2_score(wanted.flatten(0, 1), _tokens(new_model, new_processor, unseen).flatten(0, 1))
    result = align(model, processor, new_model, new_processor, _pictures(60), progress=False)
    found = _tokens(new_model, new_processor, unseen)
    share = r2_score(wanted.flatten(0, 1), found.flatten(0, 1), multioutput="variance_weighted")
    assert share > max(start, 0.3)
    assert share == pytest.approx(result["explained_variance"], abs=0.15)
    assert all(torch.equal(tensor, old_state[name]) for name, tensor in model.state_dict().items())
    after = new_model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("multi_modal"))
    inputs = new_processor(text="<image>", images=unseen[0], return_tensors="pt")
    logits = new_model(**inputs).logits
    new_model.save_pretrained(tmp_path)
    again = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, logits)


def test_another_grid_and_width():
    """ResNet's 2x2x40 for DINOv2's 4x4x32: a picture keeps its 16 tokens."""
    model, processor, new_model, new_processor = _swapped(new="resnet")
    result = align(model, processor, new_model, new_processor, _pictures(40), progress=False)
    assert new_model.config.projector_config["aligned_grid"] == [4, 4]
    assert new_processor.projector_config == new_model.config.projector_config
    assert 0 < result["explained_variance"] < 1
    assert _tokens(new_model, new_processor, _pictures(2)).shape == (2, 16, 32)


def test_half_precision():
    model, processor, new_model, new_processor = _swapped(dtype=torch.bfloat16)
    result = align(model, processor, new_model, new_processor, _pictures(30), progress=False)
    assert result["explained_variance"] > 0.3
    assert {tensor.dtype for tensor in new_model.multi_modal_projector.state_dict().values()} == {torch.bfloat16}
    unseen = _pictures(10, seed=1)
    wanted, found = _tokens(model, processor, unseen), _tokens(new_model, new_processor, unseen)
    assert r2_score(wanted.flatten(0, 1), found.flatten(0, 1), multioutput="variance_weighted") > 0.3


def test_the_same_weights_stay_what_they_are():
    """Drawn to identity: a tower that was not changed needs nothing."""
    model, processor = compose("dinov2", projector="pixel_shuffle")
    new_model, new_processor = swap_vision_tower(model, processor, copy.deepcopy(model.vision_tower))
    result = align(model, processor, new_model, new_processor, _pictures(12), progress=False)
    assert result["explained_variance"] > 0.999999
    unseen = _pictures(4, seed=1)
    torch.testing.assert_close(
        _tokens(new_model, new_processor, unseen), _tokens(model, processor, unseen), rtol=1e-3, atol=1e-4
    )


def test_interrupted():
    model, processor, new_model, new_processor = _swapped()
    old_state, state = _state(model), _state(new_model)
    projector, config = new_model.multi_modal_projector, copy.deepcopy(new_model.config.to_dict())

    class Interrupting(list):
        def __getitem__(self, index):
            if index == 20:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        align(model, processor, new_model, new_processor, Interrupting(_pictures(30)), progress=False, batch_size=4)
    assert new_model.multi_modal_projector is projector and new_model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in new_model.state_dict().items())
    assert all(torch.equal(tensor, old_state[name]) for name, tensor in model.state_dict().items())


def test_views_belong_together():
    views = {"type": "tiles", "layout": "dynamic", "max_tiles": 4}
    model, processor, new_model, new_processor = _swapped("clip_vision_model", "siglip_vision_model", views=views)
    pictures = _pictures(12, size=(90, 50))
    pairs = PairedFeatures(PicturePath(model, processor), PicturePath(new_model, new_processor))(pictures[:2])
    assert [view.picture for view in pairs] == [0] * (len(pairs) // 2) + [1] * (len(pairs) // 2) and len(pairs) > 4
    assert all(view.reached.all() for view in pairs)
    assert align(model, processor, new_model, new_processor, pictures, progress=False)["explained_variance"] > 0.3


def test_old_features_are_read_where_the_new_ones_lie():
    """The old path sees the middle of a wide picture, the new one all of it: the same tower, squashed."""
    model, processor = compose("clip_vision_model")
    new_model, new_processor = swap_vision_tower(model, processor, copy.deepcopy(model.vision_tower))
    crop = {"height": 32, "width": 32}
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    new_processor.image_processor = CLIPImageProcessorPil(size=crop, do_center_crop=False)
    picture = _pictures(1, size=(64, 32))[0]
    (view,) = PairedFeatures(PicturePath(model, processor), PicturePath(new_model, new_processor))([picture])
    # Of the new columns, with their middles at 1/8, 3/8, 5/8 and 7/8 of the width, the old path saw two: it has middles at
    # 5/16, 7/16, 9/16 and 11/16. The second new column is twice as wide as an old one: a triangle over three of them.
    assert view.reached.view(4, 4).tolist() == [[False, True, True, False]] * 4
    old = PicturePath(model, processor)
    features = old.features(old.inputs([picture]))[0][0].view(4, 4, -1)
    expected = (3 * features[:, 0] + 3 * features[:, 1] + features[:, 2]) / 7
    torch.testing.assert_close(view.old.view(4, 4, -1)[:, 1], expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "old, new, settings, swap_settings",
    [
        ("qwen2_vl_vision", "clip_vision_model", {}, {}),
        ("clip_vision_model", "siglip2_vision_model", {"projector": "linear"}, {}),
        ("clip_vision_model", ("dinov2", "siglip_vision_model"), {}, {}),
        ("videomae", "clip_vision_model", {}, {}),
        ("clip_vision_model", "dinov2", {"fusion": "cross_attention"}, {}),
        (
            "clip_vision_model",
            "dinov2",
            {"views": {"type": "tiles", "layout": "dynamic", "max_tiles": 4}},
            {"views": "resize"},
        ),
        ("clip_vision_model", "dinov2", {}, {"views": {"type": "tiles", "layout": "dynamic", "max_tiles": 4}}),
        ("yolos", "yolos", {"vision_feature_select_strategy": "full"}, {"vision_feature_select_strategy": "full"}),
        (
            "clip_vision_model",
            "dinov2",
            {
                "projector": {
                    "type": "qformer",
                    "reads_text": True,
                    "num_queries": 4,
                    "qformer_config": {
                        "hidden_size": 16,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "intermediate_size": 16,
                    },
                }
            },
            {},
        ),
    ],
    ids=["patches", "native", "fused", "clips", "fusion", "one_view", "tiles", "no_places", "reads_text"],
)
def test_ways_of_seeing_pictures(old, new, settings, swap_settings):
    """Features of the new path say something about those of the old one at their places, whatever the views and shapes."""
    model, processor = compose(old, **settings)
    new = tuple(map(vision_config, new)) if isinstance(new, tuple) else vision_config(new)
    new_model, new_processor = swap_vision_tower(model, processor, new, **swap_settings)
    sizes = [(40, 48), (80, 50), (33, 90)] * 8
    pictures = [picture.resize(size) for picture, size in zip(_pictures(24), sizes)]
    result = align(model, processor, new_model, new_processor, pictures, progress=False)
    assert result["explained_variance"] > 0.15
    path = PicturePath(new_model, new_processor)
    assert all(torch.isfinite(tokens).all() for tokens in path.tokens(path.inputs(pictures[:3])))


def test_another_projector():
    """A new mlp: its first layer stays random, its last is solved for."""
    model, processor = compose("dinov2", projector="linear")
    projector = {"type": "mlp", "hidden_features": 96}
    new_model, new_processor = swap_vision_tower(
        model, processor, vision_config("clip_vision_model"), projector=projector
    )
    first = new_model.multi_modal_projector.layers[0].weight.clone()
    result = align(model, processor, new_model, new_processor, _pictures(60), is_replaced=True, progress=False)
    assert torch.equal(new_model.multi_modal_projector.layers[0].weight, first)
    unseen = _pictures(20, seed=1)
    wanted, found = _tokens(model, processor, unseen), _tokens(new_model, new_processor, unseen)
    share = r2_score(wanted.flatten(0, 1), found.flatten(0, 1), multioutput="variance_weighted")
    assert share == pytest.approx(result["explained_variance"], abs=0.15) and share > 0.3


def test_what_cannot_be_aligned():
    model, processor, new_model, new_processor = _swapped()
    with pytest.raises(AlignmentError, match="One picture"):
        align(model, processor, new_model, new_processor, _pictures(1), progress=False)
    model, processor = compose("clip_vision_model")
    new_model, new_processor = compose("yolos", vision_feature_select_strategy="full")
    with pytest.raises(AlignmentError, match="rows and columns"):
        align(model, processor, new_model, new_processor, _pictures(4), progress=False)


@pytest.mark.parametrize("limits", [{"max_bytes": 40_000}, {"max_views": 140}])
def test_what_is_kept_is_bounded(limits):
    """What is kept of the stream for errors behind a projector is halved when it is full, spread over all of it."""
    kept = KeptViews(5, **limits)
    for number in range(1000):
        view = PairedView(
            0,
            (2, 2),
            torch.zeros(4, 8),
            torch.zeros(4, 8),
            torch.ones(4).bool(),
            torch.zeros(4, 8),
            torch.ones(4).bool(),
        )
        kept.add(number, view)
        assert kept.bytes <= kept.max_bytes and len(kept.views) <= kept.max_views
    numbers = [view.number for view in kept.views]
    assert numbers == list(range(0, 1000, kept.stride)) and len(numbers) > 50
    assert len(kept.held_out()) == pytest.approx(len(numbers) / 5, abs=1)


def test_memory_does_not_grow():
    """While pictures stream by: those of one batch are there, and tensors but for the few that are kept on purpose."""
    model, processor, new_model, new_processor = _swapped()
    shown, alive, tensors = [], {}, {}

    class Lazy:
        def __iter__(self):
            for seed in range(160):
                if seed in (32, 144):
                    gc.collect()
                    alive[seed] = sum(reference() is not None for reference in shown)
                    tensors[seed] = sum(
                        o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor and o.device.type == "cpu"
                    )
                picture = _pictures(1, size=(300, 200), seed=seed)[0]
                shown.append(weakref.ref(picture))
                yield picture

    align(model, processor, new_model, new_processor, Lazy(), progress=False, batch_size=8)
    assert alive[32] == alive[144] <= 16
    a_kept_view = 16 * 32 * 4 + 16 * 32 * 4 + 16
    assert tensors[144] - tensors[32] <= (144 - 32) * a_kept_view


def test_best_nearby():
    asked = []

    def hill(index):
        asked.append(index)
        return -abs(index - 7) + (0.5 if index == 4 else 0)

    assert best_nearby(hill, 3, 20) == (7, 0)
    assert len(asked) == len(set(asked)) <= 10
    assert best_nearby(hill, 19, 20) == (7, 0)
    assert best_nearby(lambda index: index, 2, 4) == (3, 3)
    assert best_nearby(lambda index: -index, 0, 1) == (0, 0)


@torch.no_grad()
def test_the_last_layer_is_judged_by_held_out_pictures():
    """What is reported of the candidates is what their maps, fitted without the held-out pictures, do on these."""
    model, processor, new_model, new_processor = _swapped(projector={"type": "mlp", "hidden_features": 24})
    pictures = _pictures(50)
    pairs = PairedFeatures(PicturePath(model, processor), PicturePath(new_model, new_processor))
    fitted = FeatureFit(pairs, new_model)
    for number, picture in enumerate(pictures):
        for view in pairs([picture]):
            fitted.add(number, view)
    wanted = _tokens(model, processor, pictures[::5]).flatten(0, 1)
    path = PicturePath(new_model, new_processor)
    features = torch.stack(path.features(path.inputs(pictures[::5]))[0])
    candidates = fitted.candidates()
    assert [candidate.target for candidate in candidates] == ["features", "features", "tokens"]
    for candidate in candidates:
        found, _ = candidate.build(False)(features, (4, 4))
        share = r2_score(wanted, found.detach().flatten(0, 1), multioutput="variance_weighted")
        assert candidate.explained_variance == pytest.approx(share, abs=1e-4)
    assert candidates[2].explained_variance >= max(entry.explained_variance for entry in candidates[:2]) - 1e-6
