"""The average is torch's, and a model that has it for a while is afterwards as it was."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from anyvlm.training.weight_average import WeightAverage


def new_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    return model


def train(model, step) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))


def test_is_torchs_average():
    """From the first update on, where the decay is less than its warmup's: 0.1."""
    model = new_model()
    average, expected = WeightAverage(model, 0.1), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    expected.update_parameters(model)  # torch's first one copies
    for step in range(5):
        train(model, step)
        average.update(model)
        expected.update_parameters(model)
    with average.applied(model):
        torch.testing.assert_close(dict(model.named_parameters()), dict(expected.module.named_parameters()))
    assert not any("0/weight" in name for name in average.state_dict())  # the frozen one


def test_warmup_forgets_where_it_began():
    """After the same steps a slow average would still be half the untrained weights."""
    model = new_model()
    average, start = WeightAverage(model, 0.999), model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight.add_(1.0)
    for _ in range(20):
        average.update(model)
    with average.applied(model):
        moved = model[2].weight.detach() - start
    assert 0.99 < float(moved.mean()) <= 1.0


def test_model_is_as_it_was_and_so_are_its_gradients():
    model, inputs = new_model(), torch.randn(5, 3)
    average = WeightAverage(model)
    train(model, 0)
    model(inputs).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = model(inputs).square().sum()
    with torch.no_grad(), average.applied(model):
        assert not torch.equal(model[2].weight, before["2.weight"])
        model(inputs)
    loss.backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(
        one is other is None or torch.equal(one, other)
        for one, other in zip(expected, (p.grad for p in model.parameters()))
    )
    average.copy_to(model)
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_half_precision_is_averaged_in_single():
    model = new_model().to(torch.bfloat16)
    average = WeightAverage(model, 0.9)
    assert {tensor.dtype for name, tensor in average.state_dict().items() if name != "updates"} == {torch.float32}
    average.update(model)
    with average.applied(model):
        assert model[2].weight.dtype == torch.bfloat16


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="Nothing in this model is trained"):
        WeightAverage(new_model().requires_grad_(False))
    with pytest.raises(ValueError, match="decay=1"):
        WeightAverage(new_model(), 1)
