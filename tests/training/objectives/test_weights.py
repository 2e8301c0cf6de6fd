"""Schedules against torch's and numpy's; learned weights settle where Kendall et al. say."""

import numpy as np
import pytest
import torch
from torch import nn

from anyvlm.training.objectives.domain_adversarial import reversal_strength
from anyvlm.training.objectives.weights import UncertaintyMixing, loss_weight


PROGRESS = np.linspace(0, 1, 21)


def test_a_number_stays_one():
    assert loss_weight(0.5) == 0.5
    assert loss_weight({"weight": 2, "schedule": "constant"}) == 2.0


def test_straight_lines_are_numpys():
    weight = loss_weight(
        {"weight": 0.5, "schedule": {"type": "linear", "from": 1, "to": 3, "begin": 0.2, "until": 0.6}}
    )
    assert [weight(p) for p in PROGRESS] == pytest.approx(0.5 * np.interp(PROGRESS, [0.2, 0.6], [1, 3]))
    weight = loss_weight({"schedule": "warmup"})
    assert [weight(p) for p in PROGRESS] == pytest.approx(np.interp(PROGRESS, [0, 0.1], [0, 1]))


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    weight = loss_weight({"schedule": "cosine"})
    for progress in PROGRESS:
        assert weight(progress) == pytest.approx(annealing.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        annealing.step()


def test_ramp_is_that_of_domain_adversarial_training():
    weight = loss_weight({"weight": 0.3, "schedule": {"type": "ramp", "slope": 5}})
    assert [weight(p) for p in PROGRESS] == pytest.approx([0.3 * reversal_strength(p, 5) for p in PROGRESS])


@pytest.mark.parametrize(
    "setting, messages",
    [
        ("much", ["is a number"]),
        (-1, ["at least 0"]),
        (float("nan"), ["finite"]),
        (
            {"weight": "x", "rate": 1, "schedule": "sudden"},
            ["not rate", "not 'x'", "constant, linear, cosine, warmup, ramp"],
        ),
        ({"schedule": {"type": "linear", "begin": 0.5, "until": 0.2, "slope": 1}}, ["not slope", "begin < until"]),
        ({"schedule": {"type": "warmup", "until": "soon"}}, ["not 'soon'"]),
        ({"schedule": "warmup", "weight": True}, ["not True"]),
    ],
)
def test_everything_wrong_is_said_at_once(setting, messages):
    with pytest.raises(ValueError) as raised:
        loss_weight(setting)
    assert all(message in str(raised.value) for message in messages)


def test_learned_weights_settle_where_each_loss_counts_half():
    """The derivative of exp(-s) L + s/2 is zero where exp(-s) L = 1/2."""
    mixing = UncertaintyMixing(["language_model", "contrastive"])
    losses = {"language_model": torch.tensor(2.0), "contrastive": torch.tensor(0.1), "matching": torch.tensor(5.0)}
    assert [mixing.factor(name) for name in losses] == [1, 1, 1]
    optimizer = torch.optim.Adam(mixing.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        total = sum(mixing.factor(name) * loss for name, loss in losses.items()) + mixing.penalty(list(losses))
        total.backward()
        optimizer.step()
    found = {name: float(torch.as_tensor(mixing.factor(name) * loss).detach()) for name, loss in losses.items()}
    assert found == pytest.approx({"language_model": 0.5, "contrastive": 0.5, "matching": 5.0}, abs=1e-2)
