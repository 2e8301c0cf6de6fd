"""A linear map in front of a trained projector: exact where it is exact, and the core never changes."""

import pytest
import torch

from anyvlm.configuration.token_grids import token_grid
from anyvlm.modeling.feature_alignment import AlignedProjector, FeatureAlignment, resample_features
from anyvlm.modeling.projectors import PROJECTORS, build_projector
from anyvlm.swapping.feature_maps import (
    core_config,
    core_projector,
    foldable_layer,
    mapped_config,
    mapped_projector,
)


OLD, NEW, TEXT, GRID = 16, 24, 32, (4, 6)
QFORMER = {
    "num_queries": 4,
    "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}
#: Every type, and what of a type decides whether a map can be folded into it.
CORES = {
    "linear": ({"type": "linear"}, True),
    "linear without bias": ({"type": "linear", "bias": False}, False),
    "mlp": ({"type": "mlp"}, True),
    "mlp of four layers": ({"type": "mlp", "num_layers": 4, "hidden_features": [20, 12, 28]}, True),
    "mlp of one layer": ({"type": "mlp", "num_layers": 1}, True),
    "mlp without bias": ({"type": "mlp", "bias": False}, False),
    "mlp with norm": ({"type": "mlp", "norm": "layer_norm"}, False),
    "gated mlp": ({"type": "mlp", "gated": True, "hidden_act": "silu", "hidden_features": 20}, True),
    "pixel_shuffle": ({"type": "pixel_shuffle"}, False),
    "patch_merger": ({"type": "patch_merger"}, False),
    "avg_pool": ({"type": "avg_pool"}, False),
    "conv": ({"type": "conv"}, False),
    "resampler": ({"type": "resampler", "num_queries": 5}, False),
    "qformer": ({"type": "qformer", **QFORMER}, False),
    "identity": ({"type": "identity"}, False),
}


def make_core(name: str, in_features: int = OLD):
    config, foldable = CORES[name]
    width = in_features if config["type"] == "identity" else TEXT
    config = {**config, "in_features": in_features, "out_features": width}
    core = build_projector(config).double().eval()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.normal_(std=0.3)
    return core, config, foldable


@pytest.fixture
def features():
    return torch.randn(3, GRID[0] * GRID[1], NEW, dtype=torch.float64)


def random_map() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(OLD, NEW, dtype=torch.float64) * NEW**-0.5, torch.randn(OLD, dtype=torch.float64)


def test_every_type_is_here():
    assert {config["type"] for config, _ in CORES.values()} == set(PROJECTORS)


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("grid", [None, (8, 4)], ids=["own grid", "aligned"])
def test_mapped_projector_is_the_map_and_then_the_core(name, grid, features):
    core, config, foldable = make_core(name)
    before = {key: tensor.clone() for key, tensor in core.state_dict().items()}
    weight, bias = random_map()
    projector, new_config = mapped_projector(core, config, weight, bias, grid)
    mapped = features @ weight.T + bias
    expected, expected_grid = core(mapped if grid is None else resample_features(mapped, GRID, grid), grid or GRID)
    found, found_grid = projector.double()(features, GRID)
    # Resampling is done in single precision, and so is a map in front of a core without tensors.
    tolerance = 1e-9 if grid is None and list(core.parameters()) else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found_grid == expected_grid == token_grid(new_config, GRID)
    assert new_config["in_features"] == NEW
    assert ("aligned_features" in new_config) is not foldable
    assert (foldable_layer(core) is not None) is foldable
    # Nothing of the core was changed, and nothing is shared with it.
    assert all(torch.equal(tensor, before[key]) for key, tensor in core.state_dict().items())
    pointers = {tensor.data_ptr() for tensor in core.state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in projector.state_dict().values()}


@pytest.mark.parametrize("name", CORES)
def test_identity_map_is_the_core(name, features):
    core, config, _ = make_core(name, NEW)
    projector, new_config = mapped_projector(core, config, torch.eye(NEW), torch.zeros(NEW), None)
    assert torch.equal(projector.double()(features, GRID)[0], core(features, GRID)[0])
    assert core_config(new_config) == config or core_config(new_config) == {
        **config,
        "hidden_features": new_config["hidden_features"],
    }


@pytest.mark.parametrize("name", CORES)
def test_the_core_is_found_again(name):
    core, config, foldable = make_core(name)
    weight, bias = random_map()
    projector, new_config = mapped_projector(core, config, weight, bias, (2, 2))
    found = core_projector(projector)
    assert type(found) is type(core)
    changed = {key for key, tensor in core.state_dict().items() if not torch.equal(tensor, found.state_dict()[key])}
    first = {"linear": "linear", "mlp": "layers.0"}.get(config["type"])
    assert changed == ({f"{first}.weight", f"{first}.bias"} if foldable else set())
    # A map in front of a mapped projector goes in front of its core.
    expected = {**config, "in_features": NEW} if foldable else config
    assert {**core_config(new_config), "hidden_features": None} == {**expected, "hidden_features": None}
    width = core_config(new_config)["in_features"]
    again, again_config = mapped_projector(found, core_config(new_config), torch.eye(width), torch.zeros(width), None)
    assert "aligned_grid" not in again_config
    assert not isinstance(again, AlignedProjector) or again.alignment.grid is None


@pytest.mark.parametrize("name", [name for name, (_, foldable) in CORES.items() if foldable])
def test_folded_is_unfolded(name):
    """In fp32, as it is used; the sizes are those of real towers."""
    core, config, _ = make_core(name)
    core = core.float()
    weight, bias = (tensor.float() for tensor in random_map())
    features = torch.randn(3, GRID[0] * GRID[1], NEW)
    folded, _ = mapped_projector(core, config, weight, bias, None)
    assert not isinstance(folded, AlignedProjector)
    alignment = FeatureAlignment(NEW, OLD)
    alignment.linear.weight.data, alignment.linear.bias.data = weight, bias
    expected = AlignedProjector(alignment, core)(features, GRID)[0]
    difference = (folded(features, GRID)[0] - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-6


@pytest.mark.parametrize("name", CORES)
def test_dtype_and_mode_are_the_cores(name):
    core, config, _ = make_core(name)
    for dtype, training in ((torch.bfloat16, True), (torch.float32, False)):
        projector, _ = mapped_projector(core.to(dtype).train(training), config, *random_map(), (2, 2))
        assert {parameter.dtype for parameter in projector.parameters()} == (
            {dtype} if list(core.parameters()) else {torch.float32}
        )
        assert projector.training is training


def test_config_says_what_is_built():
    core, config, _ = make_core("mlp")
    assert mapped_config(core, config, NEW, None) == {**config, "in_features": NEW, "hidden_features": [TEXT]}
    # A list of widths stays as it is.
    core, config, _ = make_core("mlp of four layers")
    assert mapped_config(core, config, NEW, (2, 3)) == {**config, "in_features": NEW, "aligned_grid": [2, 3]}
    core, config, _ = make_core("conv")
    expected = {**config, "in_features": NEW, "aligned_features": OLD, "aligned_grid": [2, 3]}
    assert mapped_config(core, config, NEW, (2, 3)) == expected


@pytest.mark.parametrize("target", [(4, 6), (8, 12), (2, 3), (3, 5), (1, 1), (7, 2)])
def test_resampling_keeps_what_is_linear_in_the_place(target):
    """The mean of a picture stays, and a ramp over it is read off at the middles of the new places."""

    def ramp(grid):
        rows = (torch.arange(grid[0]) + 0.5) / grid[0]
        columns = (torch.arange(grid[1]) + 0.5) / grid[1]
        places = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([2 * places[0] - places[1] + 1, torch.ones(grid)], dim=-1).view(1, -1, 2)

    grid = (24, 36)
    found = resample_features(ramp(grid), grid, target)
    assert found.shape == (1, target[0] * target[1], 2)
    torch.testing.assert_close(found[..., 1], torch.ones(1, target[0] * target[1]))
    inner = (found - ramp(target)).unflatten(1, target).abs()[0, 1:-1, 1:-1, 0]
    assert inner.numel() == 0 or inner.max() < 1e-3
    torch.testing.assert_close(found.mean(1), ramp(grid).mean(1), rtol=1e-3, atol=2e-2)


def test_resampling_to_the_same_grid_changes_nothing():
    features = torch.randn(2, 24, 8, dtype=torch.bfloat16)
    alignment = FeatureAlignment(8, None, (4, 6))
    found, grid = alignment(features, (4, 6))
    assert found is features and grid == (4, 6)
    found, grid = alignment(torch.randn(2, 6, 8, dtype=torch.bfloat16), (2, 3))
    assert found.dtype == torch.bfloat16 and found.shape == (2, 24, 8) and grid == (4, 6)
    assert not list(alignment.parameters())
