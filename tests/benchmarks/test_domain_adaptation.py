"""The benchmark runs on shapes drawn here, and how it tells domains apart."""

import json

import pytest


pytest.importorskip("sklearn", reason="scikit-learn is in the [test] extra")

import domain_adaptation
from domain_pictures import TEST, TRAINING, VALIDATION, shapes
from typer.testing import CliRunner


@pytest.fixture
def command():
    import typer

    app = typer.Typer()
    app.command()(domain_adaptation.main)
    return app


def test_it_runs_and_writes_every_figure(tmp_path, command):
    output = tmp_path / "figures.json"
    ran = CliRunner().invoke(command, ["--quick", "--seeds", "2", "--output", str(output)])
    assert ran.exit_code == 0, ran.output
    result = json.loads(output.read_text())
    assert list(result["seeds"]) == ["1000", "1001"]
    for rows in result["seeds"].values():
        assert list(rows) == ["before", "none", "pictures", "adapted"]
        assert all(0 <= row[key] <= 100 for row in rows.values() for key in ("source", "target", "told_apart"))
        assert len(rows["adapted"]["classifier"]) == 3
        assert rows["none"]["classifier"] == rows["pictures"]["classifier"] == []
    assert "domain-adversarial" in ran.output


def test_choosing_says_nothing_about_answers_of_the_target(tmp_path, command):
    output = tmp_path / "figures.json"
    ran = CliRunner().invoke(command, ["--quick", "--choose", "--seeds", "1", "--output", str(output)])
    assert ran.exit_code == 0, ran.output
    assert {seed: list(row) for seed, row in json.loads(output.read_text())["seeds"].items()} == {
        "500": ["source", "told_apart"]
    }


def test_a_trained_model_gives_exact_answers(tmp_path):
    """Tall and wide bars are told apart after a little training, and only with the pictures in their places."""
    pair = shapes(tmp_path)
    settings = domain_adaptation.Settings(steps=80, batch_size=16)
    model, processor, _ = domain_adaptation.train(pair, settings, 0, tmp_path, "none")
    pictures, labels = pair.source.part(TRAINING)
    right = domain_adaptation.exact_answers(model, processor, pictures, labels, pair.classes)
    assert right >= 90
    assert domain_adaptation.exact_answers(model, processor, pictures, 1 - labels, pair.classes) == pytest.approx(
        100 - right
    )
    sides = (pair.source.part(VALIDATION)[0], pair.source.part(TEST)[0])
    told_apart = domain_adaptation.told_apart(model, processor, *sides)
    of_domains = domain_adaptation.told_apart(
        model, processor, pair.source.part(TRAINING)[0], pair.target.part(TRAINING)[0]
    )
    assert told_apart < 75 < of_domains


def test_no_picture_is_in_two_parts():
    assert len({*TRAINING, *VALIDATION, *TEST}) == 5
