"""Losses of a recipe: built by name, and everything wrong with them said at once."""

import inspect

import pytest
from test_contrastive import composed

from anyvlm.training.objectives.base import Objective
from anyvlm.training.objectives.contrastive import ContrastiveObjective
from anyvlm.training.objectives.matching import MatchingObjective
from anyvlm.training.objectives.registry import (
    OBJECTIVES,
    build_losses,
    check_losses,
    objective_class,
    objective_settings,
)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_name_leads_to_a_class_and_its_settings(name):
    assert issubclass(objective_class(name), Objective)
    has_no_parameters = name in ("text_kl", "semi_supervised")
    assert "learning_rate" in objective_settings(name) or has_no_parameters
    assert "model" not in objective_settings(name)


def test_built_with_their_settings_and_weights():
    model, _ = composed()
    objectives, weights = build_losses(
        {
            "language_model": 1,
            "contrastive": {"weight": 0.5, "schedule": "warmup", "embedding_size": 8, "loss": "sigmoid"},
            "matching": 0.1,
            "domain_adversarial": {"domains": ["a", "b"], "weight": 0.2},
        },
        model,
    )
    assert isinstance(objectives["contrastive"], ContrastiveObjective)
    assert objectives["contrastive"].text_head[-1].weight.shape == (8, 32)
    assert objectives["contrastive"].loss == "sigmoid"
    assert isinstance(objectives["matching"], MatchingObjective)
    assert list(objectives) == ["contrastive", "matching", "domain_adversarial"]
    assert weights["language_model"] == 1.0 and weights["matching"] == 0.1 and weights["domain_adversarial"] == 0.2
    assert weights["contrastive"](0.05) == pytest.approx(0.25)


def test_everything_wrong_at_once():
    losses = {
        "language_model": {"size": 3},
        "contrastiv": 1,
        "contrastive": {"embedding": 8, "weight": -1},
        "matching": {"schedule": "sudden"},
        "domain_adversarial": {},
    }
    problems = check_losses(losses)
    expected = [
        ("losses.language_model", "not size"),
        ("'contrastiv'", "Choose among language_model, contrastive, matching"),
        ("losses.contrastive", "at least 0"),
        ("losses.contrastive", "'embedding'. Choose among weight, schedule, embedding_size"),
        ("losses.matching", "constant, linear"),
        ("losses.domain_adversarial", "domains is missing"),
    ]
    assert len(problems) == len(expected)
    for problem, parts in zip(problems, expected):
        assert all(part in problem for part in parts), problem
    model, _ = composed()
    with pytest.raises(ValueError) as raised:
        build_losses(losses, model)
    assert all(problem in str(raised.value) for problem in problems)
    assert objective_settings("domain_adversarial")["domains"] is inspect.Parameter.empty
